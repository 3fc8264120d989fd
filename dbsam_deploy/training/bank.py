"""The teacher's embeddings of a fixed set of augmented images, computed once and kept on disk.

A teacher's pass costs more than a student's step on a window; kept, it serves for every window that
is ever cut from the image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..core.contract import EMBEDDING_CHANNELS
from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray, preprocess
from ..files.atomic import write_atomically
from ..images.npz_files import read_array
from ..model.weights import LoadedModel
from .augmentation import Augmentation, augment
from .samples import Mixture, Sample

Item = dict[str, npt.NDArray[Any]]
Make = Callable[[int], Item]
"""Number of an item → its arrays by name."""
Autocast = Callable[[], AbstractContextManager[None]]

MAX_PART_BYTES = 256 * 1024 * 1024
"""Largest image, or embeddings of one, that is read."""
_STREAM = 1
"""Separates these draws from training's own, which have the same seed."""


@dataclass(frozen=True)
class Draws:
    """Augmented images by number: the same for the same number.

    Attributes:
        images: drawn from.
        augmentation: of each, before a model sees it.
        seed: of the draws.
    """

    images: Mixture
    augmentation: Augmentation
    seed: int

    def sample(self, stream: int, index: int) -> Sample:
        """One of them; a `stream` is for one use, others have other images."""
        rng = np.random.default_rng([self.seed, stream, index])
        return augment(self.images.draw(rng), self.augmentation, int(rng.integers(2**31)))

    @property
    def described(self) -> list[Any]:
        """All that they depend on, for a hash."""
        sources = [(source.name, len(source)) for source in self.images.sources]
        return [sources, self.images.shares, repr(self.augmentation), self.seed]


@dataclass(frozen=True)
class NumberedFiles:
    """Items 0 … count - 1 that are computed once and kept, one npz each.

    Attributes:
        folder: where the files lie; named by the hash of what they were made of.
        count: how many.
    """

    folder: Path
    count: int

    def path(self, index: int) -> Path:
        """File of one item."""
        return self.folder / f"{index:06d}.npz"

    def arrays(self, index: int, *names: str) -> list[npt.NDArray[Any]]:
        """Parts of an item.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self.path(index)
        try:
            return [read_array(path, name, MAX_PART_BYTES) for name in names]
        except InputError as error:
            raise InputError(f"{error}: delete it and start again") from error

    def fill(self, indices: Iterable[int], make: Make, advance: Callable[[], None]) -> None:
        """Make what is missing of `indices`; files already there are kept.

        Args:
            indices: which items, for one process among several.
            make: their arrays.
            advance: called after each item, made or not.
        """
        for index in indices:
            path = self.path(index)
            if not path.is_file():
                arrays = make(index)
                with write_atomically(path) as stream:
                    np.savez(stream, allow_pickle=False, **arrays)
            advance()


class Bank(NumberedFiles):
    """Images with the teacher's embeddings."""

    def read(self, index: int) -> tuple[ByteArray, FloatArray]:
        """Image (H, W, 3) uint8 and embeddings (256, G, G) float32.

        Raises:
            InputError: the file is missing or damaged.
        """
        image, embeddings = self.arrays(index, "image", "embeddings")
        if image.ndim != 3 or embeddings.ndim != 3 or len(embeddings) != EMBEDDING_CHANNELS:
            raise InputError(
                f"{self.path(index)}: image {image.shape} and embeddings {embeddings.shape}; "
                f"expected (H, W, 3) and ({EMBEDDING_CHANNELS}, G, G); delete it and start again"
            )
        return image, embeddings.astype(np.float32)

    def variance(self) -> float:
        """Variance of the embeddings over the first 16 images: the unit of the loss."""
        values = [self.read(index)[1] for index in range(min(16, self.count))]
        return float(np.concatenate([v.ravel() for v in values]).var())


@dataclass(frozen=True)
class Banks:
    """Several banks, one a kind of source, as one."""

    parts: tuple[Bank, ...]

    @property
    def count(self) -> int:
        """Images in all."""
        return sum(bank.count for bank in self.parts)

    def read(self, index: int) -> tuple[ByteArray, FloatArray]:
        """See `Bank.read`; `index` runs through the banks one after another."""
        for bank in self.parts:
            if index < bank.count:
                return bank.read(index)
            index -= bank.count
        raise IndexError(index)

    def variance(self) -> float:
        """Mean of the banks' variances."""
        return float(np.mean([bank.variance() for bank in self.parts]))


def open_bank(root: Path, teacher: LoadedModel, draws: Draws, count: int) -> Bank:
    """The bank of the first images, a folder in `root` that is named by what it is made of."""
    parts = (teacher.weights["sha256"], *draws.described)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = root / f"bank-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return Bank(folder, count)


def embeddings_by(teacher: LoadedModel, draws: Draws, autocast: Autocast) -> Make:
    """What fills a bank.

    Args:
        teacher: its encoder runs where its parameters are.
        draws: labels are not used.
        autocast: precision of the teacher's pass.

    Returns:
        Number → `image` (H, W, 3) uint8 and the teacher's `embeddings` (256, G, G) float16.
    """
    encoder: Any = teacher.model
    encoder.to(memory_format=torch.channels_last)  # a third faster on a CPU
    device = next(encoder.parameters()).device

    def make(index: int) -> Item:
        sample = draws.sample(_STREAM, index)
        pixels = torch.from_numpy(preprocess(sample.image, teacher.preprocessing))
        with torch.no_grad(), autocast():
            embeddings = encoder.encode(pixels.to(device, memory_format=torch.channels_last))[0]
        return {"image": sample.image, "embeddings": embeddings.cpu().to(torch.float16).numpy()}

    return make
