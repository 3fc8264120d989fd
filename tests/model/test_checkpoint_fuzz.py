"""Files that a writer got wrong: each is loaded as it says, or refused in one line.

For thousands of new ones: `pytest tests/model/test_checkpoint_fuzz.py --hypothesis-profile=fuzz`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from support.adapter_fuzz import adapter_case, with_adapter
from support.checkpoint_fuzz import (
    CHANGES,
    VARIANT_OF,
    Case,
    Described,
    good_case,
    narrow_shapes,
    thin_variants,
    write,
)

from dbsam_deploy.core.errors import CheckpointError, InputError
from dbsam_deploy.model import VARIANTS, inspection, weights
from dbsam_deploy.model.inspection import inspect_weights
from dbsam_deploy.model.weights import LoadedModel, load_model

FEWER = settings(max_examples=settings().max_examples // 2)
STEPS = st.lists(
    st.tuples(st.sampled_from(list(CHANGES)), st.integers(0, 10**6), st.integers(0, 10**6)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module", autouse=True)
def thin() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in thin_variants().items():
            patch.setitem(VARIANTS, name, config)
        patch.setattr(weights, "_build", Described)
        patch.setattr(inspection, "shapes_of", narrow_shapes)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def loaded_or_refused(path: Path, **options: Any) -> LoadedModel | str:
    try:
        return load_model(checkpoint=path, **options)
    except (CheckpointError, InputError) as error:
        refusal = error.message
    assert "\n" not in refusal
    assert len(refusal) < 1500
    return refusal


def check(case: Case, path: Path) -> str:
    """Empty where it was loaded, or why it was refused."""
    loaded = loaded_or_refused(path)
    try:
        facts = inspect_weights(path)
    except CheckpointError as error:
        facts = {"refused": error.message}
    if isinstance(loaded, str):
        return loaded
    assert facts["refused"] == ""
    assert facts["variant"] == loaded.model.config.name == VARIANT_OF[case.layout]
    assert not case.must_refuse
    found = loaded.model.state_dict()
    for own, expected in case.expected.items():
        assert expected is not None, f"{own} came from nowhere"
        assert torch.equal(found[own], expected.to(found[own].dtype)), own
    return ""


@pytest.mark.parametrize(("wrapper", "layout"), list(enumerate(VARIANT_OF)))
def test_a_good_file_is_loaded_whatever_is_around_it(folder, layout, wrapper):
    write(good_case(layout), folder / "good.pth", wrapper)
    assert check(good_case(layout), folder / "good.pth") == ""


def test_a_vit_with_a_key_of_another_encoder_is_refused(folder):
    """Which then decides on the variant, whose tables are other ones."""
    case = good_case("SAM-Med2D")
    case.state["image_encoder.patch_embed.seq.9.c.weight"] = torch.ones(2)
    write(case, folder / "mixed.pth", 0)
    assert check(case, folder / "mixed.pth")


@FEWER
@given(layout=st.sampled_from(list(VARIANT_OF)), steps=STEPS, wrapper=st.integers(0, 99))
def test_a_changed_file_is_loaded_as_it_says_or_refused(folder, layout, steps, wrapper):
    case = good_case(layout)
    for step in steps:
        case.change(*step)
    note(f"touched {case.touched}, must be refused: {case.must_refuse}")
    write(case, folder / "changed.pth", wrapper)
    check(case, folder / "changed.pth")


@pytest.fixture(scope="module")
def base(folder) -> Path:
    write(good_case("SAM"), folder / "base.pth", 0)
    return folder / "base.pth"


def check_adapter(case: Case, base: Path, path: Path, scale: float) -> bool:
    """Whether it was merged."""
    loaded = loaded_or_refused(base, adapter=path)
    if isinstance(loaded, str):
        return False
    assert not case.must_refuse
    found, before = loaded.model.state_dict(), good_case("SAM").expected
    for name, weight in before.items():
        expected = weight
        if name.endswith("attn.qkv.weight"):
            expected = with_adapter(weight, int(name.split(".")[2]), case, scale)
        assert expected is not None, f"{name} has half an adapter"
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)
    return True


def write_adapter(case: Case, folder: Path, config: dict[str, Any]) -> Path:
    if case.layout == "SAMed":
        write(case, folder / "lora.pth", 0)
        return folder / "lora.pth"
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    write(case, folder / "lora" / "adapter_model.bin", 0)
    return folder / "lora"


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


@pytest.mark.parametrize("form", ["peft", "SAMed"])
def test_a_good_adapter_is_merged(folder, base, form):
    path = write_adapter(adapter_case(form), folder, PEFT)
    assert check_adapter(adapter_case(form), base, path, 3.0)


@FEWER
@given(
    form=st.sampled_from(["peft", "SAMed"]),
    steps=STEPS,
    rank=st.sampled_from([2, 2, 2, 3, 0, -2, 2.0, "2", None, True]),
    alpha=st.sampled_from([6, 6, 6, 0, 1e400, "6", None, [6]]),
)
def test_a_changed_adapter_is_merged_as_it_says_or_refused(folder, base, form, steps, rank, alpha):
    case = adapter_case(form)
    for step in steps:
        case.change(*step)
    note(f"touched {case.touched}, must be refused: {case.must_refuse}")
    path = write_adapter(case, folder, {**PEFT, "r": rank, "lora_alpha": alpha})
    check_adapter(case, base, path, float(alpha) / 2 if isinstance(alpha, int | str) else 3.0)
