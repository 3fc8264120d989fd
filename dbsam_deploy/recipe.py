"""A precision recipe: `export/<precision>.toml` → a frozen `Recipe`.

`--precision X` is valid exactly when `export/X.toml` exists; everything that changes numbers is in
the file. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from .core.errors import InputError
from .files.regular import small_text
from .resources import resource_dir

T = TypeVar("T")

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}

CALIBRATORS = ("max", "percentile", "entropy", "mse")
OPERATORS = ("MatMul", "Gemm", "Conv")
ROUNDINGS = ("nearest", "gptq")
TOOLS = ("onnxruntime", "modelopt")
OPTIONAL_FUSIONS = ("depthwise_conv_gelu", "windowed_attention")


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
class CalibrationPlan:
    """How the ranges of activations are found.

    Attributes:
        calibrator: `max`, `percentile`, `entropy` or `mse`.
        percentile: of the magnitudes, for `percentile`.
        images: images whose activations are observed.
        held_back: further images on which a sensitivity sweep measures what it tries.
        seed: of the choice of images.
    """

    calibrator: Literal["max", "percentile", "entropy", "mse"]
    percentile: float
    images: int
    held_back: int
    seed: int


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how; weights always symmetrically, with a scale for each channel.

    Attributes:
        format: `int8` or `fp8` (weights and activations), or `int8-weights` (weights only).
        graphs: graphs of the contract that are quantised.
        operators: ONNX operators with a constant weight: Linear is MatMul or Gemm, and Conv.
        outputs: those of them whose output is quantised as well as its inputs.
        exclude: patterns (fnmatch) of module paths that stay as they are.
        weights_only: patterns of modules whose weights are rounded while their inputs are not: they
            make the file smaller and lose less.
        smoothing: SmoothQuant's alpha, by which ranges move from activations into weights; 0 = off.
        rounding: of int8 weights: to the `nearest`, or `gptq`, which keeps to a layer's output.
        recentre: whether one-sided inputs are moved to the middle of their range (int8).
        tool: what places Q/DQ: `onnxruntime` or `modelopt` (int8 and fp8).
        calibration: None for `int8-weights`, which needs no data.
    """

    format: Literal["int8", "fp8", "int8-weights"]
    graphs: tuple[str, ...]
    operators: tuple[str, ...]
    outputs: tuple[str, ...]
    exclude: tuple[str, ...]
    weights_only: tuple[str, ...]
    smoothing: float
    rounding: Literal["nearest", "gptq"]
    recentre: bool
    tool: Literal["onnxruntime", "modelopt"]
    calibration: CalibrationPlan | None


@dataclass(frozen=True)
class Recipe:
    """One precision.

    Attributes:
        precision: the file's stem.
        description: one line for `--help` and reports.
        dtype: dtype of weights and activations in the graph.
        opset: ONNX opset.
        fp32_islands: patterns (fnmatch) of module paths that stay float32, by graph-wide path.
        optional_fusions: of `OPTIONAL_FUSIONS`, fused operators that no recipe has by itself: they
            have not proved yet on a GPU that they pay.
        gate: accuracy floor.
        parity: comparison protocol.
        quantization: what is quantised; None for a recipe without a [quantization] table.
    """

    precision: str
    description: str
    dtype: Literal["float32", "float16"]
    opset: int
    fp32_islands: tuple[str, ...]
    optional_fusions: tuple[str, ...]
    gate: Gate
    parity: Parity
    quantization: Quantization | None


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
        body = tomllib.loads(small_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe {path}: {error}") from error
    body["precision"] = path.stem
    for name in ("fp32_islands", "optional_fusions"):
        if not isinstance(given := body.get(name, []), list):
            raise InputError(f"recipe {path}: {name} = {given!r}, expected a list of strings")
        body[name] = tuple(given)
    for name, kind in (("gate", Gate), ("parity", Parity)):
        body[name] = build_table(kind, body.get(name, {}), f"{path} [{name}]")
    body["quantization"] = _quantization(body.get("quantization"), path)
    recipe = build_table(Recipe, body, str(path))
    if recipe.dtype not in ("float32", "float16"):
        raise InputError(f"recipe {path}: dtype {recipe.dtype!r}, expected float32 or float16")
    if unknown := [name for name in recipe.optional_fusions if name not in OPTIONAL_FUSIONS]:
        raise InputError(
            f"recipe {path}: optional_fusions {unknown}, expected {', '.join(OPTIONAL_FUSIONS)}"
        )
    plan = recipe.quantization
    if plan is not None and plan.format == "fp8" and recipe.opset < 19:
        raise InputError(f"recipe {path}: opset = {recipe.opset}; fp8 needs opset 19 or later")
    return recipe


def _quantization(table: dict[str, Any] | None, path: Path) -> Quantization | None:
    """The [quantization] table, if there is one.

    Raises:
        InputError: see `read_recipe`; or values that do not go together.
    """
    if table is None:
        return None
    where, values = f"{path} [quantization]", dict(table)
    for name in ("graphs", "operators", "outputs", "exclude", "weights_only"):
        if not all(isinstance(item, str) for item in values.get(name, ())):
            raise InputError(f"recipe {where}: {name} = {values[name]!r}, expected strings")
        if name in values:
            values[name] = tuple(values[name])
    plan = values.get("calibration")
    values["calibration"] = (
        None
        if plan is None
        else build_table(CalibrationPlan, plan, f"{path} [quantization.calibration]")
    )
    found = build_table(Quantization, values, where)
    _check_quantization(found, where)
    return found


def _check_quantization(found: Quantization, where: str) -> None:
    plan = found.calibration
    choices: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
        ("format", (found.format,), ("int8", "fp8", "int8-weights")),
        ("operators", found.operators, OPERATORS),
        ("outputs", found.outputs, found.operators),
        ("rounding", (found.rounding,), ROUNDINGS),
        ("recentre", (found.recentre,), (True, False)),
        ("tool", (found.tool,), TOOLS),
        ("calibrator", () if plan is None else (plan.calibrator,), CALIBRATORS),
    ]
    for name, values, known in choices:
        if unknown := [value for value in values if value not in known]:
            raise InputError(
                f"recipe {where}: {name} {unknown}, expected {', '.join(map(str, known))}"
            )
    if (plan is None) != (found.format == "int8-weights"):
        raise InputError(
            f"recipe {where}: int8 and fp8 need a [quantization.calibration] table, int8-weights "
            "has none"
        )
    if (found.format, found.tool) != ("int8", "onnxruntime") and (
        found.recentre or found.rounding != "nearest"
    ):
        raise InputError(
            f'recipe {where}: rounding = "gptq" and recentre = true are for format = "int8" with '
            'tool = "onnxruntime"; expected rounding = "nearest" and recentre = false'
        )
    in_range = 0 <= found.smoothing < 1 and (
        plan is None or (plan.images > 0 and plan.held_back > 0 and 50 < plan.percentile <= 100)
    )
    if not in_range:
        raise InputError(
            f"recipe {where}: smoothing is 0 to below 1, images and held_back at least 1, "
            "percentile above 50 and at most 100"
        )


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


CALIBRATION_ADVICE = (
    "pass --calibration PATH, a folder (sub-folders included) or one file with images like those "
    "that will be segmented: .npz with imgs, .nii, .nii.gz, .png, .jpg"
)


def calibration_plan(
    recipe: Recipe, path: Path | None, budget: float | None
) -> CalibrationPlan | None:
    """What the recipe asks of images, None if it wants none; nothing is read.

    Args:
        recipe: the precision.
        path: what the user named.
        budget: see `options.export_options.ExportOptions`.

    Raises:
        InputError: images that are wanted and not given, or given for nothing; or a budget that is
            not between 0 and 1.
    """
    if budget is not None and not 0 < budget < 1:
        raise InputError(f"--budget {budget}: expected a loss between 0 and 1, such as 0.005")
    plan = recipe.quantization.calibration if recipe.quantization else None
    if plan is not None and path is None:
        raise InputError(
            f"int8 and fp8 need real images to find their ranges: {CALIBRATION_ADVICE}"
        )
    if plan is None and (path or budget is not None):
        raise InputError(
            f"--calibration and --budget are for recipes with ranges (int8, fp8); "
            f"{recipe.precision} has none"
        )
    return plan
