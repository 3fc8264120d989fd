"""What a phase trains on, made from the material: the teacher's bank, examples, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from ..core.errors import InputError
from ..core.imaging import Preprocessing
from ..model import DbSam, variant_config
from ..model.weights import LoadedModel
from .bank import Banks, Draws, Make, NumberedFiles, embeddings_by, open_bank
from .datasets import EmbeddingExamples, Example, MaskExamples, RefineExamples
from .feature_bank import features_by, open_feature_bank
from .material import Material, shares
from .objectives import calibrate_batch_norm
from .prompts import Growth
from .recipe import Phase, Refine, TrainingRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

CALIBRATION_BATCHES, CALIBRATION_IMAGES = 4, 4

Counter = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(what, how many) → a context that yields what advances a progress bar by one."""


@dataclass(frozen=True)
class BankKeeper:
    """Where banks are kept, and who fills them.

    Attributes:
        folder: where banks are kept.
        accelerator: its processes share the work.
        counter: for progress.
    """

    folder: Path
    accelerator: Accelerator
    counter: Counter

    def fill(self, files: NumberedFiles, make: Make, what: str) -> None:
        """Fill this process's share of the files."""
        ours = self.accelerator
        mine = range(ours.process_index, files.count, ours.num_processes)
        with self.counter(what, len(mine)) as advance:
            files.fill(mine, make, advance)


def prepare_banks(
    recipe: TrainingRecipe,
    phase: Phase,
    material: Material,
    teacher: LoadedModel,
    keeper: BankKeeper,
) -> Banks:
    """The teacher's embeddings of `recipe.bank_images` images, computed where they are missing.

    Args:
        recipe: seed, augmentation, number of images, and the student.
        phase: which kinds of images in which shares.
        material: the images.
        teacher: on the device it shall run on.
        keeper: of the banks.

    Raises:
        InputError: the teacher's embeddings have another size than the student's.
    """
    _check_grids(recipe, teacher)
    parts = []
    for kind, share in shares(phase).items():
        draws = Draws(material.mixture({kind: 1.0}), recipe.augmentation, recipe.seed)
        count = max(1, round(recipe.bank_images * share))
        bank = open_bank(keeper.folder, teacher, draws, count)
        make = embeddings_by(teacher, draws, keeper.accelerator.autocast)
        keeper.fill(bank, make, f"teacher on {kind} images")
        parts.append(bank)
    keeper.accelerator.wait_for_everyone()
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
        return EmbeddingExamples(
            banks, phase.crop_size, preprocessing=preprocessing, seed=recipe.seed
        )
    return MaskExamples(
        material.mixture(shares(phase)),
        recipe.augmentation,
        phase.objects,
        Growth(phase.growth_px),
        preprocessing=preprocessing,
        seed=recipe.seed,
    )


def prepare_features(
    recipe: TrainingRecipe,
    phase: Refine,
    material: Material,
    model: LoadedModel,
    keeper: BankKeeper,
) -> RefineExamples:
    """Examples of the phase `refine`, after the encoder has run where its features are missing.

    Args:
        recipe: seed and augmentation.
        phase: which kinds of images in which shares, how many, and the prompts.
        material: the images.
        model: on the device it shall run on.
        keeper: of the features.

    Raises:
        InputError: an encoder without a neck of its own.
    """
    draws = Draws(material.mixture(shares(phase)), recipe.augmentation, recipe.seed)
    bank = open_feature_bank(keeper.folder, model, draws, phase.views)
    make = features_by(model, draws, keeper.accelerator.autocast)
    keeper.fill(bank, make, "features of images")
    keeper.accelerator.wait_for_everyone()
    return RefineExamples(bank, phase, preprocessing=model.preprocessing, seed=recipe.seed)


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
