"""A training recipe: `export/training/<name>.toml` → a frozen `TrainingRecipe`.

Everything that changes the weights is in the file, its seed included; what only says where data lie
is on the command line. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.errors import InputError
from ..files.regular import small_text
from ..recipe import build_table
from .augmentation import Augmentation
from .choices import PHASES, Freeze, find_training_recipe

Precision = Literal["no", "bf16", "fp16"]


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
            code's, the ViT blocks alone; `none`: everything is trained; `trunk`: the encoder up to
            its neck.
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
class PromptShares:
    """How often each kind of prompt is trained; an image's prompts are all of one kind.

    Attributes:
        box: a box alone.
        click: a point inside the object, no box.
        box_click: a box with one wrong side and the point that says so, or a point inside.
        correction: a box, then the first answer's logits with a point where it is wrong.
    """

    box: float
    click: float
    box_click: float
    correction: float


@dataclass(frozen=True)
class Refine(Phase):
    """Neck, prompt encoder and decoder on features that are computed once.

    Attributes:
        views: augmented images whose features are kept on disk.
        tight_boxes: how often a box is the object's own.
        even_boxes: how often all sides of a box move by the same amount.
        pieces: how often a label of several pieces stands for one of them.
        together: how often an object and the one most like it are one, in one box.
        multimask_weight: weight of the best of the three masks of `multimask`.
        ema: decay of the running mean of the weights.
        blend: the phase ends this far between the weights it began with (0) and that mean (1).
        prompts: see `PromptShares`.
    """

    views: int
    tight_boxes: float
    even_boxes: float
    pieces: float
    together: float
    multimask_weight: float
    ema: float
    blend: float
    prompts: PromptShares


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
        refine: masks again, with more kinds of prompts and the encoder fixed; None: no such phase.
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
    tune: Phase | None
    refine: Refine | None

    def phases(self) -> list[tuple[str, Phase]]:
        """(name, phase) in the order they run."""
        return [(name, phase) for name in PHASES if (phase := getattr(self, name)) is not None]

    def only(self, names: Sequence[str]) -> TrainingRecipe:
        """The recipe with these phases alone, all for none.

        Raises:
            InputError: a phase that the recipe does not have.
        """
        known = [name for name, _ in self.phases()]
        for name in names:
            if name not in known:
                raise InputError(f"phase {name!r}: recipe {self.name} has {', '.join(known)}")
        if not names:
            return self
        return replace(
            self,
            teacher=self.teacher if "distill" in names else "",
            distill=self.distill if "distill" in names else None,
            tune=self.tune if "tune" in names else None,
            refine=self.refine if "refine" in names else None,
        )


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
        of = Refine if name == "refine" else Phase
        body[name] = _phase(body[name], f"{path} [{name}]", of) if name in body else None
    recipe = build_table(TrainingRecipe, body, str(path))
    _check(recipe, path)
    return recipe


def _phase(table: dict[str, Any], where: str, kind: type[Phase]) -> Phase:
    if kind is Refine:
        prompts = build_table(PromptShares, table.get("prompts", {}), f"{where} prompts")
        kinds = asdict(prompts).values()
        if min(kinds) < 0 or not any(kinds):
            raise InputError(f"recipe {where}: {prompts}; expected shares that are not all 0")
        table = table | {"prompts": prompts}
    phase = build_table(kind, table, where)
    if isinstance(phase, Refine):
        _check_refine(phase, where)
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


def _check_refine(phase: Refine, where: str) -> None:
    parts = ("tight_boxes", "even_boxes", "pieces", "together", "blend")
    for name in (*parts, "ema"):
        if not 0 <= getattr(phase, name) <= 1 - (name == "ema") * 1e-6:
            raise InputError(f"recipe {where}: {name} = {getattr(phase, name)}, expected 0–1")
    if phase.views < 1 or phase.multimask_weight < 0:
        raise InputError(f"recipe {where}: expected views above 0 and multimask_weight from 0")
    if phase.freeze != "trunk" or phase.validate_every or phase.patience:
        raise InputError(
            f'recipe {where}: freeze must be "trunk", validate_every and patience 0: features are '
            "computed once, and what the phase ends with is a mean of weights"
        )


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
    masks = [phase for name, phase in recipe.phases() if name != "distill"]
    if any(phase.unlabelled or phase.crop_size for phase in masks):
        raise InputError(
            f"recipe {path} [tune], [refine]: unlabelled and crop_size must be 0: masks are "
            "learned on whole labelled images"
        )
    if recipe.checkpoint_every <= 0:
        raise InputError(f"recipe {path}: checkpoint_every must be above 0")
