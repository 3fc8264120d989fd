"""A training recipe: `export/training/<name>.toml` → a frozen `TrainingRecipe`.

Everything that changes the weights is in the file, its seed included; what only says where data lie
is on the command line. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.errors import InputError
from ..files.regular import small_text
from ..recipe import build_table
from .augmentation import Augmentation
from .choices import Freeze, find_training_recipe

Precision = Literal["no", "bf16", "fp16"]

PHASES = ("distill", "tune")
"""Phases in the order they run; a recipe has `tune`, and may have `distill` before it."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW.

    Attributes:
        weight_decay: decoupled weight decay; not applied to norms, biases and position tables.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        clip_norm: largest norm of the whole gradient.
    """

    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Attributes:
        steps: optimiser steps.
        batch: images in one step, over all processes and accumulated micro-batches.
        learning_rate: peak, reached after the warm-up.
        warmup_steps: linear warm-up; then (1 - progress)^poly_power.
        poly_power: exponent of the polynomial decay.
        freeze: `paper`: ViT blocks and prompt encoder stay as they are; `as_coded`: the official
            code's, the ViT blocks alone; `none`: everything is trained.
        crop_size: side in model-frame pixels of the window an image is trained on; 0: whole frame.
        growth_px: a box grows by uniform 0 to this on each side, at 1024 px scale.
        objects: box prompts of an image.
        iou_weight: weight of the squared error of `iou_predictions`; the paper has none (0).
        real: share of drawn images that come from the data folder.
        synthetic: share that the generator draws.
        unlabelled: share from the folder of unlabelled images (distillation only).
        validate_every: steps between validations; 0: none.
        patience: validations without a better Dice after which the phase ends; 0: never. With
            patience the best weights are published, without it the last.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    poly_power: float
    freeze: str
    crop_size: int
    growth_px: int
    objects: int
    iou_weight: float
    real: float
    synthetic: float
    unlabelled: float
    validate_every: int
    patience: int


@dataclass(frozen=True)
class TrainingRecipe:
    """A whole training.

    Attributes:
        name: the file's stem.
        description: one line for `--help`.
        variant: what is trained.
        image_size: side of the model frame in px.
        seed: of fresh weights, draws, augmentation and prompts.
        precision: autocast dtype (`bf16`, `fp16`, or `no` for float32).
        teacher: variant whose embeddings the distillation learns, "" without distillation.
        bank_images: images whose teacher embeddings are computed once and kept on disk.
        checkpoint_every: steps between resume points.
        optimizer: see `Optimizer`.
        augmentation: see `Augmentation`.
        distill: embeddings of the teacher, on images without labels; None: no such phase.
        tune: masks.
    """

    name: str
    description: str
    variant: str
    image_size: int
    seed: int
    precision: str
    teacher: str
    bank_images: int
    checkpoint_every: int
    optimizer: Optimizer
    augmentation: Augmentation
    distill: Phase | None
    tune: Phase

    def phases(self) -> list[tuple[str, Phase]]:
        """(name, phase) in the order they run."""
        return [(name, phase) for name in PHASES if (phase := getattr(self, name)) is not None]


def load_training_recipe(name: str) -> TrainingRecipe:
    """Read `export/training/<name>.toml`, or the file `name` if it ends in `.toml`.

    Raises:
        InputError: see `choices.find_training_recipe` and `read_training_recipe`.
    """
    return read_training_recipe(find_training_recipe(name))


def read_training_recipe(path: Path) -> TrainingRecipe:
    """Read a recipe file.

    Raises:
        InputError: not TOML, an unknown or missing key, a value of the wrong type or out of range.
    """
    try:
        body = tomllib.loads(small_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe {path}: {error}") from error
    body["name"] = path.stem
    for table, kind in (("optimizer", Optimizer), ("augmentation", Augmentation)):
        body[table] = build_table(kind, body.get(table, {}), f"{path} [{table}]")
    for name in PHASES:
        body[name] = _phase(body[name], f"{path} [{name}]") if name in body else None
    recipe = build_table(TrainingRecipe, body, str(path))
    _check(recipe, path)
    return recipe


def _phase(table: dict[str, Any], where: str) -> Phase:
    phase = build_table(Phase, table, where)
    if phase.freeze not in get_args(Freeze):
        raise InputError(
            f"recipe {where}: freeze {phase.freeze!r}, expected one of {get_args(Freeze)}"
        )
    positive = ("steps", "batch", "learning_rate", "poly_power", "objects")
    for name in positive:
        if getattr(phase, name) <= 0:
            raise InputError(f"recipe {where}: {name} = {getattr(phase, name)}, expected above 0")
    for name in ("warmup_steps", "crop_size", "growth_px", "validate_every", "patience"):
        if getattr(phase, name) < 0:
            raise InputError(f"recipe {where}: {name} = {getattr(phase, name)}, expected 0 or more")
    shares = (phase.real, phase.synthetic, phase.unlabelled)
    if min(shares) < 0 or sum(shares) <= 0:
        raise InputError(
            f"recipe {where}: real, synthetic, unlabelled = {shares}; expected shares of 0 or more "
            "that are not all 0"
        )
    return phase


def _check(recipe: TrainingRecipe, path: Path) -> None:
    if recipe.tune is None:
        raise InputError(f"recipe {path}: no [tune] table; a training ends with it")
    if recipe.precision not in get_args(Precision):
        raise InputError(
            f"recipe {path}: precision {recipe.precision!r}, expected one of {get_args(Precision)}"
        )
    if bool(recipe.teacher) != (recipe.distill is not None):
        raise InputError(
            f"recipe {path}: teacher = {recipe.teacher!r} and "
            f"{'a' if recipe.distill else 'no'} [distill] table; give both or neither"
        )
    if recipe.tune.unlabelled or recipe.tune.crop_size:
        raise InputError(
            f"recipe {path} [tune]: unlabelled and crop_size must be 0: masks are learned on whole "
            "labelled images"
        )
    if recipe.checkpoint_every <= 0:
        raise InputError(f"recipe {path}: checkpoint_every must be above 0")
