"""What an export is made of: what it says of itself, what it compares, what makes it start anew."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.manifests import reseal
from support.toy_exports import FIGURES, Toy

from dbsam_deploy import export as door
from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.points import usual_record
from dbsam_deploy.engines.build import Choice
from dbsam_deploy.engines.device import Gpu
from dbsam_deploy.export import Stages, export, main
from dbsam_deploy.files.inputs import key_of
from dbsam_deploy.quantization import quantizer
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification import provenance
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.parity import Figures


def said_again(toy: Toy, weights: str = "a") -> str:
    console = Console(record=True, width=500, file=io.StringIO())
    export(toy.options, console, stages=toy.stages(weights))
    return console.export_text()


def test_only_packages_that_take_part_make_it_again_and_it_says_which(
    toy: Toy, monkeypatch
) -> None:
    versions = {"python": "3", "torch": "2.13.0", "onnxruntime": "1.32.0"}

    def installed(packages: tuple[str, ...] = ("openvino", "torch")) -> dict[str, str]:
        return {name: version for name, version in versions.items() if name in packages}

    for module in (door, provenance):
        monkeypatch.setattr(module, "installed_versions", installed)
    toy.run("a")
    versions.update({"openvino": "2026.4.1", "tensorrt": "11", "nvidia-modelopt": "1"})
    assert "is up to date" in said_again(toy)
    versions["torch"] = "2.14.0"
    assert "exported again: changed since: torch (2.13.0, now 2.14.0)\n" in said_again(toy)
    versions["onnxruntime"] = "1.33.0"
    assert "changed since: onnxruntime (1.32.0, now 1.33.0)\n" in said_again(toy)
    assert "changed since: weights (a, now b)\n" in said_again(toy, "b")
    (toy.output / "fp32" / "decoder.onnx").write_bytes(b"")
    assert "exported again: " in (text := said_again(toy, "b"))
    assert "decoder.onnx was changed after manifest.json was written" in text


def test_a_publication_says_what_it_was_made_of(toy: Toy, capsys) -> None:
    arguments = ["--precision", "fp32", "--engine", "none", "--data", str(toy.data)]
    assert main([*arguments, "--output", str(toy.output)], stages=toy.stages("a")) == 0
    artefact, made = load_artefact(toy.output / "fp32"), toy.graphs["a"]
    assert (artefact.precision, artefact.variant) == ("fp32", "lite_medsam")
    assert (artefact.preprocessing, artefact.graphs) == (made.preprocessing, made.graphs)
    points = usual_record("x", trained=False)  # nothing is measured on these weights
    assert artefact.weights == {**made.weights, "sha256": "a", "points": points}
    assert artefact.figures == {**FIGURES.as_dict(), "dice_drop": 0}
    assert (artefact.versions, artefact.quantization) == ({"python": "3"}, {})
    assert artefact.key == key_of(artefact.inputs)
    assert artefact.inputs["weights"] == "a"
    parts = {"weights", "model", "recipe", "calibration", "images of the comparison", "python"}
    assert set(artefact.inputs) == parts | {"code of the export", "code of the comparison"}
    printed = capsys.readouterr().out
    assert f"serve --repository {toy.output / 'model_repository_fp32'}\n" in printed
    assert all(item.file in printed for item in artefact.graphs.values())


def test_the_comparison_gets_both_models_and_as_many_images_as_are_asked_for(toy: Toy) -> None:
    shutil.copy(toy.data / "2DBox_case.npz", toy.data / "another.npz")
    asked: list[tuple[Any, ...]] = []

    def compare(
        references: Any,
        open_deployed: Callable[[], Any],
        *more: Any,
        progress: Callable[[str], None],
        keep: object,
    ) -> Figures:
        progress("case")
        asked.append((references.backend, open_deployed().backend, *more))
        return FIGURES

    for images in (1, 2, None):
        shutil.rmtree(toy.output, ignore_errors=True)
        options = replace(toy.options, data_images=images)
        export(options, Console(quiet=True), stages=replace(toy.stages("a"), compare=compare))
    assert [len(cases) for *_, cases in asked] == [1, 2, 2]
    reference, deployed, how, (case, _) = asked[-1]
    assert (reference, deployed) == ("pytorch-cpu", "onnxruntime-cpu")
    assert (how, case.name) == (toy.graphs["a"].preprocessing, "2DBox_case[0]")
    with pytest.raises(InputError, match="--data-images 0: expected at least 1"):
        export(replace(toy.options, data_images=0), stages=toy.stages("a"))


@pytest.mark.parametrize("gpu", [None, Gpu("Another", "sm_90", "13.0"), Gpu("This", "sm_86", "13")])
def test_engines_are_built_of_what_is_published_and_verified_where_they_run(
    toy: Toy, gpu: Gpu | None
) -> None:
    record = SimpleNamespace(targets=("sm_86",), parity=None, is_verified=False)
    request: Any = SimpleNamespace(
        options=SimpleNamespace(kind="a kind"), builder=SimpleNamespace(gpu=gpu)
    )
    done: list[tuple[object, ...]] = []

    def build(artefact: Artefact, asked: object, step: Callable[[str], None]) -> Any:
        step("building")
        done.append((artefact.folder, asked))
        return {"encoder": record}

    def verify(*arguments: Any, progress: Callable[[str], None]) -> Any:
        progress("case")
        artefact, kind, reference, cases, gate = arguments
        done.append((artefact.folder, kind, reference.backend, len(cases), gate))
        return {"encoder": SimpleNamespace(**{**vars(record), "is_verified": True})}

    stages = replace(
        toy.stages("a"),
        choose_engines=lambda *asked: done.append(asked) or Choice(request, "a note"),
        build_engines=build,
        verify_engines=verify,
    )
    options = replace(toy.options, engine="tensorrt-rtx", targets=("sm_86",))
    published = export(options, Console(quiet=True), stages=stages)
    folder, runs_here = toy.output / "fp32", gpu is not None and gpu.target == "sm_86"
    assert done[:2] == [("tensorrt-rtx", ("sm_86",), folder), (folder, request)]
    gate = load_recipe("fp32").gate
    assert done[2:] == [(folder, "a kind", "pytorch-cpu", 1, gate)] * runs_here
    assert published.engines["encoder"].is_verified == runs_here
    assert published.engine_note == "a note"


def test_an_export_that_does_not_say_what_it_was_made_of_is_made_again(toy: Toy) -> None:
    toy.run("a")
    reseal(toy.output / "fp32" / "manifest.json", inputs={}, key="")
    assert "exported again: an earlier version of this library made it\n" in said_again(toy)
    assert "up to date; nothing was exported again\n" in said_again(toy)
    with np.load(toy.data / "2DBox_case.npz") as arrays:
        image, labels = arrays["imgs"], arrays["gts"]
    np.savez(toy.data / "2DBox_case.npz", imgs=image + np.uint8(1), gts=labels)
    assert "changed since: images of the comparison\n" in said_again(toy)
    labels[8, 8:40] = 0  # the box is a row shorter
    np.savez(toy.data / "2DBox_case.npz", imgs=image + np.uint8(1), gts=labels)
    assert "changed since: images of the comparison\n" in said_again(toy)


ALWAYS = {"torch", "segment-anything", "onnx", "onnxscript", "onnx-ir", "numpy"}
EIGHT_BITS = {"onnxruntime", "onnxruntime-gpu", "ml-dtypes", "pillow"}
MODELOPT = {"nvidia-modelopt", "onnx-graphsurgeon", "onnxslim"}


@pytest.mark.parametrize(
    ("precision", "mode", "packages"),
    [
        ("fp32", "sam", ALWAYS),
        ("fp32", "medsam", ALWAYS),
        ("int8_weights", "sam", ALWAYS | EIGHT_BITS),
        ("int8_weights", "medsam", ALWAYS | EIGHT_BITS | {"scikit-image"}),
        ("int8", "sam", ALWAYS | EIGHT_BITS | MODELOPT),
    ],
)
def test_the_packages_that_take_part_are_those_that_change_the_result(
    toy: Toy, monkeypatch, precision: str, mode: str, packages: set[str]
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(
        provenance, "installed_versions", lambda names: asked.append(set(names)) or {}
    )
    monkeypatch.setattr(quantizer, "check_modelopt", lambda plan: None)  # as if it were here
    recipe = load_recipe(precision)
    if precision == "int8":
        few = replace(recipe.quantization.calibration, images=2, held_back=1)
        plan = replace(recipe.quantization, calibration=few, tool="modelopt")
        recipe = replace(recipe, quantization=plan)
    loaded = toy.stages("a").load_model()
    loaded = replace(loaded, preprocessing=replace(loaded.preprocessing, mode=mode))

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    stages = Stages(load_recipe=lambda _: recipe, load_model=lambda **_: loaded, export_graph=stop)
    calibration = bundled_examples() if precision == "int8" else None
    options = replace(toy.options, precision=precision, calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        export(options, Console(quiet=True), stages=stages)
    compared = {"torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "pillow"}
    assert asked == [packages, compared | ({"scikit-image"} if mode == "medsam" else set())]
