"""Training examples as functions of (seed, index): the same on any number of processes.

Example `i` is drawn from its own random stream, so a resumed run, or one spread over several
processes or loader workers, sees exactly what a single uninterrupted process would.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..core.contract import PATCH_SIZE
from ..core.imaging import ByteArray, FloatArray, Preprocessing, preprocess, to_model_frame
from .augmentation import Augmentation, augment
from .bank import Banks
from .clicks import draw_clicks, draw_kind
from .feature_bank import FeatureBank
from .prompts import Growth, draw_prompts
from .recipe import Refine
from .samples import Mixture

Example = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Drawn(Dataset[Example], ABC):
    """Examples that are drawn, each from a random stream of its own.

    Attributes:
        stream: separates the draws of the phases, which have the same seed.
        preprocessing: of the model that is trained.
        seed: of the draws.
    """

    stream: ClassVar[int]
    preprocessing: Preprocessing
    seed: int

    def __getitem__(self, index: int) -> Example:
        """Example number `index`."""
        return self.draw(np.random.default_rng([self.seed, self.stream, index]))

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Example:
        """One example."""


@dataclass(frozen=True)
class EmbeddingExamples(_Drawn):
    """Windows of the bank's images with the teacher's embeddings of the same place.

    Attributes:
        bank: images and the teacher's embeddings of the whole frame.
        crop_size: side of the window in px of the model frame, 0 for the whole frame.
    """

    stream: ClassVar[int] = 2
    bank: Banks
    crop_size: int

    def draw(self, rng: np.random.Generator) -> Example:
        """`pixels` (3, C, C), `corners` (2,) in tokens, `embeddings` (256, C/16, C/16)."""
        image, embeddings = self.bank.read(int(rng.integers(self.bank.count)))
        pixels = preprocess(_rescaled(image, rng), self.preprocessing)[0]
        if not self.crop_size:
            corner = np.zeros(2, np.int64)
        else:
            content = self.preprocessing.content_size((image.shape[0], image.shape[1]))
            corner = _window(content, self.crop_size, rng)
            y, x = (int(v) for v in corner * PATCH_SIZE)
            pixels = pixels[:, y : y + self.crop_size, x : x + self.crop_size]
            side = self.crop_size // PATCH_SIZE
            row, column = (int(v) for v in corner)
            embeddings = embeddings[:, row : row + side, column : column + side]
        return {
            "pixels": torch.from_numpy(np.ascontiguousarray(pixels)),
            "corners": torch.from_numpy(corner),
            "embeddings": torch.from_numpy(np.ascontiguousarray(embeddings)),
        }


@dataclass(frozen=True)
class MaskExamples(_Drawn):
    """Augmented labelled images with box prompts and their masks on the mask grid.

    Attributes:
        images: labelled sources.
        augmentation: of image and labels.
        objects: box prompts of an image; where there are fewer objects some come twice.
        growth: how far the boxes reach beyond their objects.
    """

    stream: ClassVar[int] = 3
    images: Mixture
    augmentation: Augmentation
    objects: int
    growth: Growth

    def draw(self, rng: np.random.Generator) -> Example:
        """`pixels` (3, S, S), `boxes` (N, 4) in the model frame, `masks` (N, 4G, 4G) of 0 and 1."""
        sample = augment(self.images.draw(rng), self.augmentation, int(rng.integers(2**31)))
        prompts = draw_prompts(sample, self.objects, self.growth, rng)
        chosen = list(islice(cycle(range(len(prompts.boxes))), self.objects))
        size = (sample.image.shape[0], sample.image.shape[1])
        boxes = to_model_frame(prompts.boxes[chosen], size, self.preprocessing)
        masks = [to_mask_grid(mask, self.preprocessing) for mask in prompts.masks]
        return {
            "pixels": torch.from_numpy(preprocess(sample.image, self.preprocessing)[0]),
            "boxes": torch.from_numpy(boxes),
            "masks": torch.from_numpy(np.stack([masks[i] for i in chosen])),
        }


@dataclass(frozen=True)
class RefineExamples(_Drawn):
    """Objects of a bank's samples with prompts of all kinds and the features that were kept.

    Attributes:
        bank: samples with features.
        phase: which prompts.
    """

    stream: ClassVar[int] = 5
    bank: FeatureBank
    phase: Refine

    def draw(self, rng: np.random.Generator) -> Example:
        """One image's example, without its batch axis; see `RefineObjective.forward`."""
        sample, features = self.bank.read(int(rng.integers(self.bank.count)))
        phase, how = self.phase, self.preprocessing
        growth = Growth(phase.growth_px, tight=phase.tight_boxes, even=phase.even_boxes)
        prompts = draw_prompts(
            sample, phase.objects, growth, rng, split=phase.pieces, together=phase.together
        )
        kind = draw_kind(phase.prompts, rng)
        boxes, clicks, labels = draw_clicks(kind, prompts.masks, prompts.boxes, rng)
        chosen = list(islice(cycle(range(len(boxes))), phase.objects))
        size = (sample.image.shape[0], sample.image.shape[1])
        masks = np.stack([to_mask_grid(mask, how) for mask in prompts.masks])
        return {
            "features": torch.from_numpy(features),
            "kind": torch.tensor(kind),
            "boxes": torch.from_numpy(to_model_frame(boxes[chosen], size, how)),
            "clicks": torch.from_numpy(to_model_frame(clicks[chosen], size, how)),
            "labels": torch.from_numpy(labels[chosen]),
            "masks": torch.from_numpy(masks[chosen]),
        }


def to_mask_grid(mask: npt.NDArray[np.bool_], how: Preprocessing) -> FloatArray:
    """Image-frame mask → the mask grid of the low-resolution logits.

    Args:
        mask: (H, W) bool.
        how: the model's preprocessing.

    Returns:
        (4G, 4G) float32: 1 where the mask covers at least half a cell, else 0.
    """
    height, width = how.content_size((mask.shape[0], mask.shape[1]))
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    frame = np.zeros((how.frame_side, how.frame_side), np.float32)
    frame[:height, :width] = np.asarray(resized)
    side, step = how.mask_side, how.frame_side // how.mask_side
    covered = frame.reshape(side, step, side, step).mean((1, 3))
    return (covered >= 0.5).astype(np.float32)


class Steps(Sampler[list[int]]):
    """Index lists of one process's micro-batches, from a step on.

    Args:
        start: first optimiser step.
        stop: step after the last.
        batch: images in a step over all processes.
        micro_batch: images in one forward pass of one process.
        rank: this process.
        world: processes.
    """

    def __init__(
        self, start: int, stop: int, *, batch: int, micro_batch: int, rank: int, world: int
    ) -> None:
        self._range = range(start, stop)
        self._batch, self._micro, self._rank, self._world = batch, micro_batch, rank, world

    def __len__(self) -> int:
        return len(self._range) * (self._batch // (self._micro * self._world))

    def __iter__(self) -> Iterator[list[int]]:
        stride = self._micro * self._world
        for step in self._range:
            for offset in range(0, self._batch, stride):
                first = step * self._batch + offset + self._rank * self._micro
                yield list(range(first, first + self._micro))


def loader(examples: Dataset[Example], steps: Steps, workers: int) -> DataLoader[Example]:
    """Batches of `examples` in the order of `steps`, prepared by `workers` processes."""
    return DataLoader(examples, batch_sampler=steps, num_workers=workers)


def _window(
    content: tuple[int, int], crop_size: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Row and column, in tokens, of a window that lies on the image as far as it can."""
    room = [max(0, -(-(side - crop_size) // PATCH_SIZE)) for side in content]
    return np.array([rng.integers(0, r + 1) for r in room], np.int64)


def _rescaled(image: ByteArray, rng: np.random.Generator) -> ByteArray:
    """Another brightness and contrast: the teacher's min–max preprocessing does not see it."""
    low, high = float(image.min()), float(image.max())
    if high == low:
        return image
    new_low = rng.uniform(0, 80)
    new_high = rng.uniform(max(160.0, new_low + 80), 255)
    unit = (image.astype(np.float32) - low) / (high - low)
    return np.rint(unit * (new_high - new_low) + new_low).astype(np.uint8)
