"""Between a graph's export and its fusions: images, ranges that are kept, sweeps, facts."""

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console
from rich.progress import Progress

from dbsam_deploy.cli import progress_bars
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.work import WorkFolder
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.quantization import quantizer as quantized_graph
from dbsam_deploy.quantization.qdq import quantize_graph
from dbsam_deploy.quantization.quantizer import Quantizer, calibration_images
from dbsam_deploy.quantization.sweep import Judge, Measured
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification.cases import bundled_examples

INT8 = load_recipe("int8")
EXAMPLES = bundled_examples()


ONE_BLOCK = ("image_encoder.adapter*", "*.patch_embed.*", "*.neck.*", "*.blocks.[!0]*")


def few(recipe=INT8, **changes):
    """Few images, and no rounding by error, which takes long, unless it is asked for."""
    plan = recipe.quantization
    changes = {"rounding": "nearest", **changes}
    calibration = replace(plan.calibration, images=3, held_back=2)
    return replace(recipe, quantization=replace(plan, calibration=calibration, **changes))


@pytest.fixture
def make(small_models, monkeypatch):
    """`make(recipe, path, budget)`: a quantiser of an untrained encoder at 64×64."""
    model = small_models("db_sam_4level")
    loaded = LoadedModel(model, Preprocessing(64), {"sha256": "0"})

    def build(recipe, path=EXAMPLES, budget=None):
        images = calibration_images(recipe, path, budget)
        bars = progress_bars(Console(file=io.StringIO(), force_terminal=True))
        return Quantizer.of(loaded, recipe, images, budget, bars)

    return build


@pytest.fixture
def encoder(float_encoder, tmp_path):
    """The float encoder in a work folder."""
    path = tmp_path / "encoder.onnx"
    shutil.copy(float_encoder("int8"), path)
    return path


@pytest.fixture
def observed(monkeypatch):
    """Calls of `calibrate`."""
    calls, calibrate = [], quantized_graph.calibrate

    def counting(*arguments, **options):
        calls.append(arguments)
        return calibrate(*arguments, **options)

    monkeypatch.setattr(quantized_graph, "calibrate", counting)
    return calls


def test_images_are_asked_for_exactly_where_they_are_needed():
    assert calibration_images(load_recipe("fp32"), None, None) is None
    assert calibration_images(load_recipe("int8_weights"), None, None) is None
    for name in ("fp16", "int8_weights"):
        with pytest.raises(InputError, match=f"for recipes with ranges .* {name} has none"):
            calibration_images(load_recipe(name), bundled_examples(), None)
        with pytest.raises(InputError, match=f"for recipes with ranges .* {name} has none"):
            calibration_images(load_recipe(name), None, 0.1)
    with pytest.raises(InputError, match="int8 and fp8 need real images"):
        calibration_images(INT8, None, None)
    for budget in (0, 1, -0.1, float("nan")):
        with pytest.raises(InputError, match="expected a loss between 0 and 1"):
            calibration_images(INT8, bundled_examples(), budget)


def test_graphs_without_images_or_unknown_ones_are_refused(make):
    with pytest.raises(InputError, match="ranges can be found for the encoder alone"):
        make(few(graphs=("encoder", "decoder")))
    with pytest.raises(InputError, match="are not all known"):
        make(few(graphs=("encoders",)))


def test_a_recipe_that_quantises_nothing_leaves_graphs_alone(make, encoder, tmp_path):
    before = encoder.read_bytes()
    nothing = make(load_recipe("fp32"), None)
    assert nothing.run("encoder", encoder) == ()
    assert nothing.describe(tmp_path) == {}
    assert make(few()).run("decoder", encoder) == ()
    assert encoder.read_bytes() == before
    with pytest.raises(InputError, match="needs a recipe that quantises, and a budget"):
        make(few()).sweep(encoder, tmp_path)


def test_a_graph_is_quantised_in_its_file_and_described(make, encoder, tmp_path):
    size = encoder.stat().st_size
    quantizer = make(few())
    modules = quantizer.run("encoder", encoder)
    assert "image_encoder.blocks.0.mlp.lin1" in modules
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load(encoder).graph.node)
    facts = quantizer.describe(tmp_path)
    graph = facts["graphs"]["encoder"]
    assert (graph["layers"], graph["float_bytes"]) == (len(modules), size)
    assert "left_out" not in graph
    assert facts["budget"] is None
    calibration = facts["calibration"]
    assert [len(calibration[name]) for name in ("images", "held_back")] == [3, 2]
    assert all(len(image["sha256"]) == 64 for image in calibration["images"])
    assert json.loads(json.dumps(facts)) == facts


def test_the_key_follows_images_and_budget(make, tmp_path):
    (path,) = bundled_examples().glob("MR_*.npz")
    keys = {
        make(few()).key,
        make(few(), budget=0.1).key,
        make(few(), path).key,
        make(load_recipe("fp32"), None).key,
    }
    assert len(keys) == 4
    assert make(few()).key == make(few()).key


def test_ranges_of_an_interrupted_run_are_taken_over(make, encoder, observed, tmp_path):
    exclude = (*INT8.quantization.exclude, *ONE_BLOCK)
    recipe = few(rounding="gptq", exclude=exclude)
    first = make(recipe)._calibrate(encoder, tmp_path)
    again = make(recipe)._calibrate(encoder, tmp_path)
    assert len(observed) == 1
    assert first.codes
    assert again.codes.keys() == first.codes.keys()
    for name, codes in first.codes.items():
        np.testing.assert_array_equal(again.codes[name], codes)
    assert (again.path, again.layers, again.thresholds) == (
        first.path,
        first.layers,
        first.thresholds,
    )
    # Other images, another recipe or another graph: other ranges.
    (path,) = bundled_examples().glob("MR_*.npz")
    make(recipe, path)._calibrate(encoder, tmp_path)
    make(few(operators=("Conv",)))._calibrate(encoder, tmp_path)
    assert len(observed) == 3
    quantize_graph(first, recipe.quantization, encoder)
    make(recipe)._calibrate(encoder, tmp_path)
    assert len(observed) == 4


def flip(path):
    """Change one digit or byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    at = next(i for i in range(len(content) // 2, len(content)) if content[i] in b"12345678")
    content[at] += 1
    path.write_bytes(content)


def test_a_damaged_record_of_ranges_is_ignored_with_a_note(
    make, encoder, tmp_path, monkeypatch, capsys
):
    exclude = (*INT8.quantization.exclude, *ONE_BLOCK)
    recipe, calls = few(exclude=exclude), []
    first = make(recipe)._calibrate(encoder, tmp_path)
    monkeypatch.setattr(quantized_graph, "calibrate", lambda *a, **o: calls.append(a) or first)
    state = tmp_path / "ranges.json"
    (codes,) = tmp_path.glob("codes-*.npz")
    damages = [
        *(partial(state.write_text, text) for text in ("", "[]", "[" * 100_000)),
        lambda: flip(state),
        lambda: codes.write_bytes(codes.read_bytes()[:-1]),
        codes.unlink,
    ]
    for damage in damages:
        damage()
        assert make(recipe)._calibrate(encoder, tmp_path).thresholds == first.thresholds
        assert "ranges.json is damaged" in capsys.readouterr().err
    assert len(calls) == len(damages)
    make(recipe)._calibrate(encoder, tmp_path)
    assert len(calls) == len(damages)


def test_a_run_that_is_killed_while_it_quantises_goes_on_with_its_codes(
    make, float_encoder, observed, tmp_path, monkeypatch
):
    """As in an export: the next run finds its scratch tidied, and exports the float graph again."""
    exclude = (*INT8.quantization.exclude, *ONE_BLOCK)
    recipe = few(rounding="gptq", exclude=exclude)

    def run(root):
        work = WorkFolder(root, (Quantizer.SCRATCH,))
        work.open(pytest.fail)
        path = Path(shutil.copy(float_encoder("int8"), work.scratch / "encoder.onnx"))
        make(recipe).run("encoder", path)
        return path.read_bytes()

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(quantized_graph, "quantize_graph", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert len(observed) == 2
    assert run(tmp_path / "killed") == whole
    assert len(observed) == 2


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def costs(self, exclude):
    """The neck costs nearly everything."""
    share = 1 - len(exclude) / 100
    loss = 0.001 if any(".neck." in name for name in exclude) else 0.2
    return Measured(0.999 - loss, loss, 1 - loss, 1 - loss, loss, share)


def test_a_budget_runs_the_sweep_and_its_choice_is_used_and_described(
    make, encoder, monkeypatch, tmp_path
):
    monkeypatch.setattr(Judge, "_measure", costs)
    quantizer = make(few(), budget=0.05)
    with quantizer.bars:
        quantizer.run("encoder", encoder)
    facts = quantizer.describe(tmp_path)
    graph = facts["graphs"]["encoder"]
    (left_out,) = graph["left_out"]
    assert ".neck." in left_out
    assert facts["budget"] == 0.05
    assert left_out in graph["excluded"]
    assert not [name for name in make(few()).run("decoder", encoder) if name in graph["excluded"]]
    bars = quantizer.bars
    assert [task.completed for task in bars.tasks] == [task.total for task in bars.tasks]
    assert isinstance(bars, Progress)


def test_a_sweep_leaves_the_float_graph_as_it_is_and_measures_once(make, encoder, tmp_path):
    kept = ("image_encoder.adapter*", "*.patch_embed.*", "*.blocks.*")
    own = (pattern for pattern in INT8.quantization.exclude if pattern != "*.neck.0")
    recipe = few(exclude=(*own, *kept))
    before = encoder.read_bytes()
    quantizer = make(recipe, budget=0.9)
    found = quantizer.sweep(encoder, tmp_path)
    assert encoder.read_bytes() == before
    assert len(found.ranked) == 2
    for row in found.ranked:
        assert 0 < row.alone.error < 1
        assert row.left_out.error == next(
            other.alone.error for other in found.ranked if other is not row
        )
    np.testing.assert_allclose(
        found.everything.mac_share, sum(row.alone.mac_share for row in found.ranked)
    )
