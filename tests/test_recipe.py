"""Recipes: every committed file is valid, unknown content is refused."""

import re
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.recipe import (
    CALIBRATORS,
    available_precisions,
    calibration_plan,
    load_recipe,
    read_recipe,
)
from dbsam_deploy.resources import resource_dir

EIGHT_BITS = (0.98, 0.95, 0.85, 0.005)
GATES = {
    "fp32": (0.99999, 0.999, 0.99, 0.0005),
    "fp16": (0.999, 0.98, 0.95, 0.002),
    "int8": EIGHT_BITS,
    "fp8": EIGHT_BITS,
    "int8_weights": EIGHT_BITS,
}


@pytest.mark.parametrize("precision", available_precisions())
def test_committed_recipes_carry_the_agreed_gates(precision):
    recipe = load_recipe(precision)
    gate = recipe.gate
    assert recipe.precision == precision
    assert GATES[precision] == (
        gate.embedding_cosine,
        gate.mask_agreement_mean,
        gate.mask_agreement_p5,
        gate.dice_drop,
    )


@pytest.mark.parametrize("precision", available_precisions())
def test_a_recipe_cannot_be_changed_and_is_equal_to_itself(precision):
    recipe = load_recipe(precision)
    assert hash(recipe) == hash(load_recipe(precision))  # no list and no table in it
    assert recipe == load_recipe(precision)


def test_a_recipe_holds_what_its_file_says(tmp_path):
    text = (resource_dir("export") / "int8.toml").read_text()
    for old, new in (
        ("fp32_islands = []", 'fp32_islands = ["a.*", "b"]'),
        ('graphs = ["encoder"]', 'graphs = ["decoder", "encoder"]'),
        ('operators = ["MatMul", "Gemm", "Conv"]', 'operators = ["Conv", "Gemm"]'),
        ("outputs = []", 'outputs = ["Gemm"]'),
        ("weights_only = []", 'weights_only = ["c.*", "d"]'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    recipe = read_recipe(path)
    assert (recipe.precision, recipe.dtype, recipe.opset) == ("mine", "float32", 18)
    assert recipe.fp32_islands == ("a.*", "b")
    found = recipe.quantization
    assert found.graphs == ("decoder", "encoder")
    assert (found.operators, found.outputs) == (("Conv", "Gemm"), ("Gemm",))
    assert found.weights_only == ("c.*", "d")
    assert found.exclude[0] == "*.sampling_offsets"
    assert (found.smoothing, found.rounding, found.recentre) == (0, "gptq", True)
    assert (found.calibration.percentile, found.calibration.seed) == (99.999, 0)
    parity = recipe.parity
    assert (parity.images, parity.boxes_per_image) == (6, 8)
    assert (parity.box_jitter_px, parity.min_object_px) == (20, 16)
    path.write_text(text.replace('fp32_islands = ["a.*", "b"]', ""))
    assert read_recipe(path).fp32_islands == ()


@pytest.mark.parametrize("table", ["gate", "parity"])
def test_a_table_that_is_not_there_is_named(tmp_path, table):
    text = (resource_dir("export") / "fp32.toml").read_text()
    path = tmp_path / "fp32.toml"
    path.write_text(re.sub(rf"(?ms)^\[{table}\].*?(?=^\[|\Z)", "", text))
    with pytest.raises(InputError, match=rf"fp32\.toml \[{table}\]: unknown keys \[\], missing"):
        read_recipe(path)


def test_unknown_precision():
    with pytest.raises(
        InputError, match="'fp12': expected one of fp16, fp32, fp8, int8, int8_weights"
    ):
        load_recipe("fp12")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opset = 18", "opset = 18\nspeed = 9", r"unknown keys \['speed'\]"),
        ("opset = 18", "", r"missing keys \['opset'\]"),
        ("opset = 18", 'opset = "18"', "opset = '18', expected int"),
        ("opset = 18", "opset = true", "opset = True, expected int"),
        ("dice_drop = 0.0005", "", r"\[gate\].*missing keys \['dice_drop'\]"),
        ('dtype = "float32"', 'dtype = "int3"', "dtype 'int3'"),
        ("fp32_islands = []", "fp32_islands = 3", "fp32_islands = 3, expected a list of strings"),
        ("fp32_islands = []", 'optional_fusions = "x"', "optional_fusions = 'x', expected a list"),
        ("fp32_islands = []", 'optional_fusions = ["x"]', r"\['x'\], expected depthwise_conv_gelu"),
        ("[gate]", "[gate", "recipe"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused(tmp_path, old, new, message):
    text = (resource_dir("export") / "fp32.toml").read_text()
    assert old in text
    path = tmp_path / "fp32.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_recipe(path)


def test_what_the_committed_recipes_quantise():
    assert load_recipe("fp32").quantization is load_recipe("fp16").quantization is None
    for precision in ("int8", "fp8"):
        plan = load_recipe(precision).quantization
        assert (plan.format, plan.graphs) == (precision, ("encoder",))
        assert plan.calibration.calibrator in CALIBRATORS
        assert (plan.calibration.images, plan.calibration.held_back) == (32, 8)
    assert load_recipe("fp8").opset >= 19
    weights = load_recipe("int8_weights").quantization
    assert (weights.format, weights.calibration) == ("int8-weights", None)
    assert set(weights.graphs) == {"encoder", "decoder", "prompt_decoder"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('format = "int8"', 'format = "int4"', r"format \['int4'\], expected int8, fp8"),
        ('["MatMul", "Gemm", "Conv"]', '["MatMul", "Softmax"]', r"operators \['Softmax'\]"),
        ("outputs = []", 'outputs = ["LayerNorm"]', r"outputs \['LayerNorm'\]"),
        ("outputs = []", "outputs = [1]", r"outputs = \[1\], expected strings"),
        ('["encoder"]', "[1]", r"graphs = \[1\], expected strings"),
        ('["MatMul", "Gemm", "Conv"]', "[1]", r"operators = \[1\], expected strings"),
        ("weights_only = []", "weights_only = [1]", r"weights_only = \[1\], expected strings"),
        ("exclude = [", "exclude = [1,", r"exclude = \[1, .*, expected strings"),
        ("recentre = true", "recentre = 2", r"recentre \[2\], expected True, False"),
        ('rounding = "gptq"', 'rounding = "up"', r"rounding \['up'\], expected nearest, gptq"),
        ('tool = "onnxruntime"', 'tool = "hope"', r"tool \['hope'\], expected onnxruntime"),
        ("smoothing = ", "smoothing = 1", "smoothing is 0 to below 1"),
        ("smoothing = ", "extra = 1\nsmoothing = ", r"unknown keys \['extra'\]"),
        ("images = 32", "images = 0", "images and held_back at least 1"),
        ("held_back = 8", "held_back = 0", "images and held_back at least 1"),
        ("held_back = 8", "", r"\[quantization.calibration\].*missing keys \['held_back'\]"),
        ("seed = 0", 'seed = "x"', "seed = 'x', expected int"),
        ('calibrator = "', 'calibrator = "best ', r"calibrator \['best .*expected max"),
        ('format = "int8"', 'format = "int8-weights"', "int8-weights has none"),
    ],
)
def test_a_quantisation_that_is_not_understood_is_refused(tmp_path, old, new, message):
    text = (resource_dir("export") / "int8.toml").read_text()
    assert old in text
    path = tmp_path / "int8.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_recipe(path)


def test_ranges_need_a_table_of_their_own(tmp_path):
    text = (resource_dir("export") / "int8.toml").read_text()
    path = tmp_path / "int8.toml"
    path.write_text(text[: text.index("[quantization.calibration]")])
    with pytest.raises(InputError, match=r"int8 and fp8 need a \[quantization.calibration\] table"):
        read_recipe(path)


def quantised(tmp_path, **changes):
    """The int8 recipe with other values."""
    text = (resource_dir("export") / "int8.toml").read_text()
    rest, table = text.split("[quantization]")
    for name, value in changes.items():
        table, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", table)
        assert count == 1
    path = tmp_path / "int8.toml"
    path.write_text(f"{rest}[quantization]{table}")
    return read_recipe(path).quantization


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("smoothing", ["0.0", "0.999"], ["1.0", "-0.001"]),
        ("images", ["1"], ["0"]),
        ("held_back", ["1"], ["0"]),
        ("percentile", ["50.001", "100.0"], ["50.0", "100.001"]),
    ],
)
def test_a_range_ends_where_it_is_said_to(tmp_path, name, taken, refused):
    for value in taken:
        found = quantised(tmp_path, **{name: value})
        assert float(getattr(found if name == "smoothing" else found.calibration, name)) == float(
            value
        )
    for value in refused:
        with pytest.raises(InputError, match=r"int8\.toml \[quantization\]: smoothing is 0 to"):
            quantised(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"recentre": "true", "rounding": '"nearest"'},
        {"recentre": "false", "rounding": '"gptq"'},
    ],
)
def test_what_only_our_own_tool_does_is_refused_for_the_other(tmp_path, changes):
    assert quantised(tmp_path, **changes).tool == "onnxruntime"
    with pytest.raises(InputError, match='expected rounding = "nearest" and recentre = false'):
        quantised(tmp_path, tool='"modelopt"', **changes)
    plain = {"recentre": "false", "rounding": '"nearest"'}
    assert quantised(tmp_path, tool='"modelopt"', **plain).tool == "modelopt"


def test_a_message_names_file_and_table(tmp_path):
    text = (resource_dir("export") / "int8.toml").read_text()
    path = tmp_path / "int8.toml"
    for old, new, where in (
        ("opset = ", "speed = 1\nopset = ", "int8.toml: unknown keys ['speed']"),
        ("tool = ", "speed = 1\ntool = ", "int8.toml [quantization]: unknown keys ['speed']"),
        ("seed = ", "speed = 1\nseed = ", "int8.toml [quantization.calibration]: unknown keys"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=re.escape(f"recipe {path.parent}/{where}")):
            read_recipe(path)


def test_fp8_in_an_old_opset_is_refused_before_anything_is_exported(tmp_path):
    text = (resource_dir("export") / "fp8.toml").read_text()
    assert "opset = 19" in text
    path = tmp_path / "fp8.toml"
    path.write_text(text.replace("opset = 19", "opset = 18"))
    with pytest.raises(InputError, match="opset = 18; fp8 needs opset 19 or later"):
        read_recipe(path)


IMAGES = Path("images")


def test_only_recipes_with_ranges_ask_for_images():
    for precision in ("int8", "fp8"):
        recipe = load_recipe(precision)
        for budget in (None, 0.005, 0.999):
            assert calibration_plan(recipe, IMAGES, budget) is recipe.quantization.calibration
            with pytest.raises(InputError, match=r"int8 and fp8 need real images.*--calib"):
                calibration_plan(recipe, None, budget)
    for precision in ("fp32", "int8_weights"):
        recipe = load_recipe(precision)
        assert calibration_plan(recipe, None, None) is None
        for path, budget in ((IMAGES, None), (None, 0.005), (IMAGES, 0.005)):
            with pytest.raises(InputError, match=rf"with ranges .*; {precision} has none"):
                calibration_plan(recipe, path, budget)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_budget_is_a_loss_between_0_and_1(budget):
    with pytest.raises(InputError, match=f"--budget {budget}: expected a loss between 0 and 1"):
        calibration_plan(load_recipe("int8"), IMAGES, budget)
