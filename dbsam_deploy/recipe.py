"""A precision recipe: `export/<precision>.toml` → a frozen `Recipe`.

`--precision X` is valid exactly when `export/X.toml` exists; everything that changes numbers is in
the file. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import InputError
from .resources import resource_dir

T = TypeVar("T")

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True)
class Gate:
    """What an artefact must reach against the PyTorch model to be published.

    Attributes:
        embedding_cosine: smallest cosine of any image's embedding.
        mask_agreement_mean: mean Dice between deployed and reference masks.
        mask_agreement_p5: 5th percentile of the same.
        dice_drop: largest loss of mean Dice against the ground truth.
    """

    embedding_cosine: float
    mask_agreement_mean: float
    mask_agreement_p5: float
    dice_drop: float


@dataclass(frozen=True)
class Parity:
    """How an artefact is compared.

    Attributes:
        images: most images (slices) compared, spread evenly over the files.
        boxes_per_image: most objects per image.
        box_jitter_px: each side of a ground-truth box grows by 0 to this, at 1024 px scale.
        min_object_px: smaller objects are skipped.
    """

    images: int
    boxes_per_image: int
    box_jitter_px: int
    min_object_px: int


@dataclass(frozen=True)
class Recipe:
    """One precision.

    Attributes:
        precision: the file's stem.
        description: one line for `--help` and reports.
        dtype: dtype of weights and activations in the graph.
        opset: ONNX opset.
        fp32_islands: patterns (fnmatch) of module paths that stay float32, by graph-wide path.
        gate: accuracy floor.
        parity: comparison protocol.
    """

    precision: str
    description: str
    dtype: Literal["float32", "float16"]
    opset: int
    fp32_islands: tuple[str, ...]
    gate: Gate
    parity: Parity


def available_precisions() -> list[str]:
    """Stems of all recipes."""
    return sorted(path.stem for path in resource_dir("export").glob("*.toml"))


def load_recipe(precision: str) -> Recipe:
    """Read `export/<precision>.toml`.

    Raises:
        InputError: no such recipe, or one that is not valid.
    """
    if precision not in available_precisions():
        raise InputError(
            f"precision {precision!r}: expected one of {', '.join(available_precisions())}"
        )
    return read_recipe(resource_dir("export") / f"{precision}.toml")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InputError: not TOML, an unknown or missing key, or a value of the wrong type.
    """
    try:
        body = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path}: {error}") from error
    body["precision"] = path.stem
    body["fp32_islands"] = tuple(body.get("fp32_islands", ()))
    for name, kind in (("gate", Gate), ("parity", Parity)):
        body[name] = build_table(kind, body.get(name, {}), f"{path} [{name}]")
    recipe = build_table(Recipe, body, str(path))
    if recipe.dtype not in ("float32", "float16"):
        raise InputError(f"recipe {path}: dtype {recipe.dtype!r}, expected float32 or float16")
    return recipe


def build_table(kind: type[T], values: dict[str, Any], where: str) -> T:
    """One TOML table → a frozen dataclass; every key must be there and no other.

    Args:
        kind: dataclass whose fields are the table's keys.
        values: the table.
        where: file and table, for the message.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    names = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if set(values) != set(names):
        raise InputError(
            f"recipe {where}: unknown keys {sorted(set(values) - set(names))}, missing keys "
            f"{sorted(set(names) - set(values))}"
        )
    for name, value in values.items():
        expected = _TYPES.get(str(names[name].type))
        if expected and (not isinstance(value, expected) or isinstance(value, bool)):
            raise InputError(f"recipe {where}: {name} = {value!r}, expected {names[name].type}")
    return kind(**values)
