"""What training scripts wrap a model in: found by its keys, each loaded as it is, or refused.

The files of tests/model/wrappers/ were written by the libraries themselves
(tests/support/wrapper_files.py); the others have the structure that their sources give them.
"""

import argparse
import datetime
from collections import Counter, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.shapes import shapes_of

FILES = Path(__file__).parent / "wrappers"

KEYS = list(shapes_of("sam_vit_b"))
STATE = {name: torch.full((2,), float(i)) for i, name in enumerate(KEYS)}
OTHER = {name: tensor + 1000 for name, tensor in STATE.items()}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
    "param_groups": [{"lr": 0.1}],
}


def under(prefix: str, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def split(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def inside(word: str) -> dict[str, torch.Tensor]:
    """As a wrapper of one of the model's parts names its parameters."""
    return {name.replace("blocks.3.", f"blocks.3.{word}."): t for name, t in STATE.items()}


EXTRAS = {
    "epoch": 3,
    "optimizer": OPTIMIZER,
    "loss": np.float64(0.25),
    "best": np.array([1.0, 2.0]),
    "args": argparse.Namespace(vit="b", out=Path("a")),
    "when": datetime.datetime(2026, 1, 2),
    "seen": defaultdict(list, a=[1]),
    "lr_scheduler": {"milestones": Counter([1, 1])},
    "last": deque([0.5], maxlen=9),
    "names": {"a", "b"},
    "raw": b"\x00\xff",
}
"""What may lie beside the weights; none of it is made again."""

LOADED = {
    "plain": STATE,
    "model, optimizer, epoch": {"model": STATE, "optimizer": OPTIMIZER, "epoch": 3},
    "net": {"net": STATE},
    "params": {"params": STATE},
    "module.": under("module."),
    "sam.": {"state_dict": under("sam.")},
    "net. in a model": {"model": under("net.")},
    "_orig_mod.": under("_orig_mod."),
    "module._orig_mod.": {"state_dict": under("module._orig_mod.")},
    "five prefixes": {"a": {"b": under("_orig_mod.module.model.net.sam.")}},
    "a list": [STATE, {"epoch": 3}],
    "a tuple": ("vit_b", STATE),
    "the parts apart": {**split(STATE), "optimizer": OPTIMIZER},
    "the parts apart, in parallel": {
        part: {f"module.{name}": tensor for name, tensor in tensors.items()}
        for part, tensors in split(STATE).items()
    },
    "one block compiled": inside("_orig_mod"),
    "one block checkpointed": inside("_checkpoint_wrapped_module"),
    "sharded": under("_fsdp_wrapped_module."),
    "a loss with weights": {"state_dict": {**under("model."), "criterion.weight": torch.ones(2)}},
    "image statistics": {
        **STATE,
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]),
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]),
    },
    "averaged": {"n_averaged": torch.tensor(3), **under("module.")},
    "all sorts of extras": {"model": STATE, **EXTRAS},
    "the moments of an optimiser by name": {
        "optimizer": {"state": {name: {"exp_avg": t + 5} for name, t in STATE.items()}},
        "model": STATE,
    },
    "one table under two names": {"model": STATE, "state_dict": STATE},
    "one module under two names": {"state_dict": {**under("sam."), **under("model.")}},
    "deepspeed": {"module": STATE, "optimizer": None, "ds_version": "0.15"},
}


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_loaded(tmp_path, name, is_zip):
    torch.save(LOADED[name], tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(tmp_path / "w.pth").tensors
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in STATE.items())


AVERAGED = {
    "timm": {"state_dict": STATE, "state_dict_ema": OTHER, "arch": "sam"},
    "BasicSR": {"params": STATE, "params_ema": OTHER},
    "a module": {"model": STATE, "ema": {"n_averaged": torch.tensor(3), **under("module.", OTHER)}},
    "Lightning": {"state_dict": {**under("net."), **under("net_ema.", OTHER)}},
    "ema_model": {"model": STATE, "ema_model": OTHER},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_the_moving_average_is_taken_where_it_is_asked_for(tmp_path, name):
    torch.save(AVERAGED[name], tmp_path / "w.pth")
    for weights, expected in ((None, STATE), ("model", STATE), ("ema", OTHER)):
        found = read_checkpoint(tmp_path / "w.pth", weights=weights)
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.items())
        other = "model" if weights == "ema" else "ema"
        assert f"--weights {other} takes" in found.notes[0]


def numbered(start: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of the small model in tests/model/wrappers/."""
    expected = {}
    for name in sorted(tensors):
        count = tensors[name].numel()
        expected[name] = (torch.arange(count) + start).reshape(tensors[name].shape)
        start += count
    return expected


WRITTEN = {
    "lightning.ckpt": (None, 0),
    "lightning_compiled.ckpt": (None, 0),
    "mmengine.pth": (None, 0),
    "monai.pt": (None, 0),
    "averaged_model.pth": (None, 0),
    "data_parallel.pth": (None, 0),
    "accelerate": (None, 0),
    "accelerate/model.safetensors": (None, 0),
    "timm_average.pth.tar": (None, 0),
    "timm_average.pth.tar ": ("ema", 1000),
    "lightning_average.ckpt": (None, 1000),  # what Lightning itself would load
    "lightning_average.ckpt ": ("model", 0),
    "mmengine_average.pth": (None, 1000),
    "mmengine_average.pth ": ("model", 0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_the_libraries_themselves(name):
    weights, start = WRITTEN[name]
    found = read_checkpoint(FILES / name.strip(), weights=weights).tensors
    assert len(found) == 6
    for key, expected in numbered(start, found).items():
        assert torch.equal(found[key], expected), key


def test_what_is_ignored_is_said_by_name(tmp_path):
    torch.save(
        {"state_dict": {**under("sam."), "head.weight": torch.ones(2)}, **EXTRAS},
        tmp_path / "w.ckpt",
    )
    notes = read_checkpoint(tmp_path / "w.ckpt").notes
    assert notes[0] == "found under state_dict.sam"
    assert notes[1].startswith("ignored: epoch, optimizer, loss, best, args, when, seen")
    assert notes[1].endswith("and 4 more")


def test_other_image_statistics_than_sams_are_said(tmp_path):
    torch.save({**STATE, "pixel_mean": torch.zeros(3, 1, 1)}, tmp_path / "w.pth")
    notes = read_checkpoint(tmp_path / "w.pth").notes
    assert "its pixel_mean (0, 0, 0) is not SAM's: prepare images as it was trained" in notes


def test_of_several_models_one_has_to_be_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {**under("student."), **under("teacher.", OTHER)}}, path)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert error.value.message == (
        f"checkpoint {path}: 2 models in it: name one with --key; "
        f"`python -m dbsam_deploy.inspect_file {path}` shows what it holds"
    )
    assert error.value.details == (
        "state_dict.student  314 tensors, 0.0 M numbers, float32",
        "state_dict.teacher  314 tensors, 0.0 M numbers, float32",
    )
    for key in ("teacher", "state_dict.teacher"):
        found = read_checkpoint(path, key=key).tensors
        assert all(torch.equal(found[name], tensor) for name, tensor in OTHER.items())
    with pytest.raises(CheckpointError, match="--key a fits 0 of the 2 models in it"):
        read_checkpoint(path, key="a")
    with pytest.raises(CheckpointError, match="2 models in it: name one with --key"):
        read_checkpoint(path, weights="ema")


def test_an_average_that_is_not_there(tmp_path):
    torch.save({"model": STATE}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"--weights ema: it has one model only, model; drop"):
        read_checkpoint(tmp_path / "w.pth", weights="ema")


def test_what_belongs_to_the_model_is_not_ignored(tmp_path):
    torch.save(
        {"state_dict": {**under("model."), "model.texture.weight": torch.ones(2)}},
        tmp_path / "w.pth",
    )
    assert "texture.weight" in read_checkpoint(tmp_path / "w.pth").tensors  # and does not fit


KEY = "image_encoder.pos_embed"
ODD = {
    "sparse": (lambda: torch.eye(4).to_sparse(), f"{KEY} is sparse; expected a tensor of plain"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), f"{KEY} is sparse"),
    "meta": (lambda: torch.ones(4, device="meta"), rf"{KEY} is without numbers \(device meta\)"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        f"{KEY} is quantised",
    ),
    "quantised by channel": (
        lambda: torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8
        ),
        f"{KEY} is quantised",
    ),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64), f"{KEY} is complex; expected"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        f"{KEY} is nested",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_tensors_that_are_no_plain_numbers(tmp_path, name):
    make, message = ODD[name]
    path = tmp_path / "w.pth"
    torch.save({**STATE, KEY: make()}, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(f"`python -m dbsam_deploy.inspect_file {path}` shows what it holds")


def test_the_same_tensor_twice(tmp_path):
    torch.save({**STATE, "image_encoder.module.pos_embed": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed is there twice, once as image_encoder.m"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save(
        {**split(STATE), "mask_decoder.iou_token.weight": torch.zeros(2)}, tmp_path / "w.pth"
    )
    with pytest.raises(CheckpointError, match=r"iou_token\.weight is there twice"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_modules_and_programs_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "module.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="a TorchScript program: save the model's state dict"):
        read_checkpoint(tmp_path / "program.pt")


def test_safetensors_with_a_prefix(tmp_path):
    save_file(under("_orig_mod.model."), tmp_path / "w.safetensors")
    found = read_checkpoint(tmp_path / "w.safetensors").tensors
    assert all(torch.equal(found[key], tensor) for key, tensor in STATE.items())


def test_a_folder_without_its_weights(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"weights in parts \(model\.safetensors\.index"):
        read_checkpoint(tmp_path)


def test_names_that_a_terminal_would_obey(tmp_path):
    torch.save({"a\x1b[2J": STATE, "b\n": OTHER}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "w.pth")
    assert "\x1b" not in str(error.value)
    assert "a?[2J" in str(error.value)
