"""What a phase trains on, made from the material: the teacher's bank, examples, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from ..core.errors import InputError
from ..core.imaging import Preprocessing
from ..model import DbSam, variant_config
from ..model.weights import LoadedModel
from .bank import Banks, fill_bank, open_bank
from .datasets import EmbeddingExamples, Example, MaskExamples, RefineExamples
from .feature_bank import fill_feature_bank, open_feature_bank
from .material import Material, shares
from .objectives import calibrate_batch_norm
from .prompts import Growth
from .recipe import Phase, Refine, TrainingRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

CALIBRATION_BATCHES, CALIBRATION_IMAGES = 4, 4

Counter = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(what, how many) → a context that yields what advances a progress bar by one."""


def prepare_banks(
    recipe: TrainingRecipe,
    phase: Phase,
    material: Material,
    *,
    teacher: LoadedModel,
    folder: Path,
    accelerator: Accelerator,
    counter: Counter,
) -> Banks:
    """The teacher's embeddings of `recipe.bank_images` images, computed where they are missing.

    Args:
        recipe: seed, augmentation, number of images, and the student.
        phase: which kinds of images in which shares.
        material: the images.
        teacher: on the device it shall run on.
        folder: where banks are kept.
        accelerator: the processes share the work.
        counter: for progress.

    Raises:
        InputError: the teacher's embeddings have another size than the student's.
    """
    _check_grids(recipe, teacher)
    parts = []
    for kind, share in shares(phase).items():
        images = material.mixture({kind: 1.0})
        count = max(1, round(recipe.bank_images * share))
        bank = open_bank(
            folder, teacher, images, recipe.augmentation, seed=recipe.seed, count=count
        )
        mine = range(accelerator.process_index, bank.count, accelerator.num_processes)
        with counter(f"teacher on {kind} images", len(mine)) as advance:
            fill_bank(
                bank,
                teacher,
                images,
                recipe.augmentation,
                seed=recipe.seed,
                indices=mine,
                autocast=accelerator.autocast,
                advance=advance,
            )
        parts.append(bank)
    accelerator.wait_for_everyone()
    return Banks(tuple(parts))


def _check_grids(recipe: TrainingRecipe, teacher: LoadedModel) -> None:
    if teacher.preprocessing.high_res:
        raise InputError(f"teacher {recipe.teacher}: SAM 2's embedding is one of three parts")
    student = variant_config(recipe.variant, image_size=recipe.image_size).frame
    if teacher.preprocessing.grid != student.grid:
        raise InputError(
            f"teacher {recipe.teacher}: embeddings of {teacher.preprocessing.grid}×"
            f"{teacher.preprocessing.grid}, the student's are {student.grid}×{student.grid}; "
            "choose image_size so that they are equal"
        )


def prepare_examples(
    recipe: TrainingRecipe,
    phase: Phase,
    material: Material,
    banks: Banks | None,
    preprocessing: Preprocessing,
) -> Dataset[Example]:
    """Examples of a phase: windows of the banks, or images with prompts and masks without banks."""
    if banks is not None:
        return EmbeddingExamples(banks, preprocessing, phase.crop_size, recipe.seed)
    return MaskExamples(
        material.mixture(shares(phase)),
        recipe.augmentation,
        preprocessing,
        phase.objects,
        Growth(phase.growth_px),
        recipe.seed,
    )


def prepare_features(
    recipe: TrainingRecipe,
    phase: Refine,
    material: Material,
    *,
    model: LoadedModel,
    folder: Path,
    accelerator: Accelerator,
    counter: Counter,
) -> RefineExamples:
    """Examples of the phase `refine`, after the encoder has run where its features are missing.

    Args:
        recipe: seed and augmentation.
        phase: which kinds of images in which shares, how many, and the prompts.
        material: the images.
        model: on the device it shall run on.
        folder: where features are kept.
        accelerator: the processes share the work.
        counter: for progress.

    Raises:
        InputError: an encoder without a neck of its own.
    """
    images = material.mixture(shares(phase))
    augmentation, seed = recipe.augmentation, recipe.seed
    bank = open_feature_bank(folder, model, images, augmentation, seed=seed, count=phase.views)
    mine = range(accelerator.process_index, bank.count, accelerator.num_processes)
    with counter("features of images", len(mine)) as advance:
        fill_feature_bank(
            bank,
            model,
            images,
            augmentation,
            seed=seed,
            indices=mine,
            autocast=accelerator.autocast,
            advance=advance,
        )
    accelerator.wait_for_everyone()
    return RefineExamples(bank, model.preprocessing, phase, seed)


def calibrate(model: DbSam, examples: Dataset[Example], device: torch.device) -> None:
    """Fresh BatchNorm statistics from the first examples, on every process the same.

    A model without a convolution branch has no fresh BatchNorm and is left as it is.
    """
    adapter = getattr(model.image_encoder, "adapter", None)
    if adapter is None:
        return
    batches = []
    for b in range(CALIBRATION_BATCHES):
        picked = range(b * CALIBRATION_IMAGES, (b + 1) * CALIBRATION_IMAGES)
        batches.append(torch.stack([examples[i]["pixels"] for i in picked]).to(device))
    calibrate_batch_norm(adapter.spatial_prior_module, batches)
