"""Recipes: every committed file is valid, unknown content is refused."""

import pytest

from dbsam_deploy.errors import InputError
from dbsam_deploy.recipe import available_precisions, load_recipe, read_recipe
from dbsam_deploy.resources import resource_dir

GATES = {"fp32": (0.99999, 0.999, 0.99, 0.0005), "fp16": (0.999, 0.98, 0.95, 0.002)}


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


def test_unknown_precision():
    with pytest.raises(InputError, match="'fp12': expected one of fp16, fp32"):
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
