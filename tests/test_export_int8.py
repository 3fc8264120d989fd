"""Exports in 8 bits: what is published, what is refused, and what makes an export start anew."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console
from support.graph_builder import weight_bytes

from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import AccuracyError
from dbsam_deploy.export import ExportOptions, export, main
from dbsam_deploy.quantization.sweep import Judge, Measured
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.report import closing_table

SIZE = 256


@pytest.fixture
def build(quick_stages, tmp_path):
    """`build(precision, **options)`: an export of finished float graphs, with few images."""

    def run_export(precision, stages=quick_stages, **options):
        chosen = ExportOptions(precision, image_size=SIZE, output=tmp_path / "build", engine="none")
        return export(replace(chosen, **options), Console(quiet=True), stages=stages)

    return run_export


@pytest.fixture
def nearest(quick_stages):
    """Stages whose recipes round to the nearest, for what is not about rounding."""

    def load_recipe(precision):
        recipe = quick_stages.load_recipe(precision)
        return replace(recipe, quantization=replace(recipe.quantization, rounding="nearest"))

    return replace(quick_stages, load_recipe=load_recipe)


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def no_export(*args, **kwargs):
    raise AssertionError("exported again although nothing changed")


def test_the_manifest_says_what_was_quantised_on_which_images(published_int8, float_graphs):
    options, published = published_int8
    folder = options.output / "int8"
    artefact = load_artefact(folder)
    assert artefact == published.artefact
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json",
        "gate.npz",
        *(f"{g}.onnx" for g in artefact.graphs),
    }
    body = json.loads((folder / "manifest.json").read_text())["quantization"]
    graph = body["graphs"]["encoder"]
    assert list(body["graphs"]) == ["encoder"]
    assert graph["format"] == "int8"
    assert graph["layers"] > 50
    assert graph["mac_share"] > 0.8
    assert any("sampling_offsets" in module for module in graph["excluded"])
    assert graph["float_bytes"] == (float_graphs / "encoder.onnx").stat().st_size
    images = body["calibration"]["images"]
    assert (len(images), len(body["calibration"]["held_back"])) == (8, 2)
    assert len({image["sha256"] for image in images}) == 8
    assert {image["file"] for image in images} <= {p.name for p in bundled_examples().iterdir()}
    figures = artefact.figures
    assert figures["embedding_cosine"] >= 0.98
    assert figures["mask_agreement_mean"] >= 0.95
    assert figures["mask_agreement_p5"] >= 0.85


def test_the_encoder_is_small_and_typed_in_the_graph(published_int8, float_graphs):
    _, published = published_int8
    path = published.artefact.path("encoder")
    assert path.stat().st_size <= 0.31 * (float_graphs / "encoder.onnx").stat().st_size
    found = operators(path)
    assert found.count("QuantizeLinear") > 30
    assert "MsDeformAttn" in found  # the fusions look behind the pairs
    assert "QuantizeLinear" not in operators(published.artefact.path("decoder"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["image"]


def test_the_closing_table_has_a_row_for_each_quantised_graph(published_int8):
    _, published = published_int8
    console = Console(record=True, width=120)
    closing_table(published.artefact, published.figures, published.repository.folder, console)
    text = console.export_text()
    graph = published.artefact.quantization["graphs"]["encoder"]
    (row,) = (line for line in text.splitlines() if ", 8 images" in line)
    for piece in ("encoder", "int8", f"{graph['calibrator']}, 8 images", f"{graph['layers']}"):
        assert piece in row
    assert f"{len(graph['excluded'])}" in row
    assert f"{100 * graph['mac_share']:.1f} %" in row
    share = published.artefact.graphs["encoder"].size_bytes / graph["float_bytes"]
    assert f"{100 * share:.0f} %" in row


def test_only_other_images_make_it_start_anew(published_int8, quick_stages, build, tmp_path):
    options, first = published_int8
    shutil.copytree(options.output, tmp_path / "build")
    examples, stages = bundled_examples(), replace(quick_stages, export_graph=no_export)
    assert build("int8", stages, calibration=examples).artefact.key == first.artefact.key
    (stack,) = examples.glob("MR_*.npz")
    with pytest.raises(AssertionError, match="exported again"):
        build("int8", stages, calibration=stack)
    with pytest.raises(AssertionError, match="exported again"):
        build("int8", stages, calibration=examples, budget=0.5)
    kept = load_artefact(tmp_path / "build" / "int8")
    assert kept == replace(first.artefact, folder=kept.folder)


def test_ranges_that_clip_too_much_are_not_published(build, nearest, tmp_path):
    """A real miss: half of every activation is clipped."""

    def clipping(precision):
        recipe = nearest.load_recipe(precision)
        plan = recipe.quantization
        how = replace(plan.calibration, calibrator="percentile", percentile=50.1)
        return replace(recipe, quantization=replace(plan, calibration=how))

    stages = replace(nearest, load_recipe=clipping)
    with pytest.raises(AccuracyError, match=r"int8 db_sam_tiny misses its gate .* cosine 0\.\d+ <"):
        build("int8", stages, calibration=bundled_examples())
    assert not (tmp_path / "build" / "int8").exists()
    assert not (tmp_path / "build" / "model_repository_int8").exists()


def test_a_budget_leaves_layers_out_and_an_interrupted_sweep_goes_on(build, nearest, monkeypatch):
    """The neck costs too much; killed in the middle, nothing is measured twice."""
    made = []

    def measure(self, exclude):
        if len(made) == 5 and made[-1] is not None:
            made.append(None)
            raise KeyboardInterrupt
        made.append(exclude)
        loss = 0.001 if "image_encoder.neck.2" in exclude else 0.01
        return Measured(0.999, loss, 1 - loss, 1 - loss, loss, 0.5)

    monkeypatch.setattr(Judge, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        build("int8", nearest, calibration=bundled_examples(), budget=0.005)
    published = build("int8", nearest, calibration=bundled_examples(), budget=0.005)
    done = [tuple(sorted(exclude)) for exclude in made if exclude is not None]
    assert len(done) == len(set(done)) > 5
    facts = published.artefact.quantization
    assert facts["budget"] == 0.005
    graph = facts["graphs"]["encoder"]
    assert graph["left_out"] == ["image_encoder.neck.2"]
    assert "image_encoder.neck.2" in graph["excluded"]
    assert "image_encoder.blocks.0.mlp.lin1" not in graph["excluded"]


def test_weights_alone_need_no_images(build, float_graphs):
    artefact = build("int8_weights").artefact
    assert set(artefact.quantization["graphs"]) == set(artefact.graphs)
    assert artefact.quantization["calibration"] is None
    for name in artefact.graphs:
        small, whole = artefact.path(name), float_graphs / f"{name}.onnx"
        assert small.stat().st_size < 0.35 * whole.stat().st_size
        assert "QuantizeLinear" not in operators(small)


def test_fp8_graphs_hold_float8_weights_and_pairs(build):
    """The whole export with its gate; a CPU says nothing about the speed of fp8."""
    artefact = build("fp8", calibration=bundled_examples()).artefact
    model = onnx.load(artefact.path("encoder"))
    assert model.opset_import[0].version >= 19
    sizes = weight_bytes(model)
    assert sizes["FLOAT8E4M3FN"] > sizes["FLOAT"]
    assert "INT8" not in sizes
    assert artefact.quantization["graphs"]["encoder"]["format"] == "fp8"
    assert artefact.figures["embedding_cosine"] >= 0.995


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int8"], "int8 and fp8 need real images to find their ranges: pass --calibration PATH"),
        (["fp8"], "need real images"),
        (["int8", "--calibration", "nowhere"], "nowhere: no such file or folder"),
        (["int8", "--calibration", "empty"], "empty: no images"),
        (["int8", "--calibration", "noise.npz"], r"is noise: neighbouring pixels correlate by"),
        (["int8", "--calibration", "notes.txt"], "notes.txt: unknown kind of file"),
        (["int8", "--calibration", "few"], "the recipe wants 32 to calibrate and 8 held back"),
        (["int8", "--calibration", "few", "--budget", "0"], "--budget 0.0: expected a loss"),
        (["int8", "--calibration", "few", "--budget", "7"], "--budget 7.0: expected a loss"),
        (["fp16", "--calibration", "few"], "are for recipes with ranges (int8, fp8); fp16 has"),
        (["int8_weights", "--calibration", "few"], "int8_weights has none"),
        (["fp32", "--budget", "0.1"], "fp32 has none"),
        (["fp32", "--data-images", "0"], "--data-images 0: expected at least 1"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (stack,) = bundled_examples().glob("MR_*.npz")
    (tmp_path / "few" / stack.name).write_bytes(stack.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", imgs=noise)
    assert run(main, ["--precision", *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.startswith("error: ")
    assert "\n" not in err
    assert not (tmp_path / "build").exists()
