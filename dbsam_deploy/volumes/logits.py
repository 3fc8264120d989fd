"""Logits of what a session asked, within a budget of bytes; what was dropped is asked again.

They are found by the question, all prompts of one call on one slice, and the same question has the
same answer: what is made of logits does not depend on which of them were kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from ..core.masks import Prediction
from .array_store import ArrayStore

RAM_BYTES = 64 * 1024 * 1024
"""Logits kept in memory: of 512 objects on a slice at SAM's size."""
DISK_BYTES = 1024 * 1024 * 1024
"""Logits kept in the scratch file: 8192 of these."""
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Question:
    """What a model is asked about one slice in one call.

    Attributes:
        axis: of (D, H, W), along which slices are counted.
        index: the slice.
        prompts: `PromptArrays` of N objects, in voxels of the slice.
        multimask: whether there are three answers to each.
        adapt_points: see `Predictor.predict_prompts`.
    """

    axis: int
    index: int
    prompts: Mapping[str, npt.NDArray[Any]]
    multimask: bool = False
    adapt_points: bool = True

    @cached_property
    def key(self) -> bytes:
        """The same for the same question."""
        flags = (self.axis, self.index, self.multimask, self.adapt_points)
        whole = hashlib.blake2b(repr(flags).encode())
        for name, array in sorted(self.prompts.items()):
            whole.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return whole.digest()


class Answered(NamedTuple):
    """One mask among the answers to a question: its row of N, and which of three."""

    question: Question
    row: int
    alternative: int = 0


class LogitsStore:
    """Logits (4G, 4G) of answers; threads may share it.

    Args:
        ask: answers a question once more, with logits.
        ram_bytes: see `ArrayStore`.
        disk_bytes: see `ArrayStore`.
    """

    def __init__(
        self,
        ask: Callable[[Question], Prediction],
        ram_bytes: int = RAM_BYTES,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        self._ask = ask
        self.arrays = _Arrays(ram_bytes, disk_bytes)

    def keep(self, answered: Answered, logits: FloatArray) -> FloatArray:
        """Keep what a decoder gave, and return what `get` will."""
        question, row, alternative = answered
        key = (question.key, row, alternative)
        return self.arrays.put(key, np.clip(logits, -_LARGEST, _LARGEST))

    def get(self, answered: Answered) -> FloatArray:
        """Logits as float32, kept or asked again.

        Raises:
            DbsamError: they have to be asked again, and the model does not answer.
        """
        question, row, alternative = answered
        kept = self.arrays.get((question.key, row, alternative))
        if kept is not None:
            return kept
        again = self._ask(question).known_logits()
        if not question.multimask:  # those of the slice's other objects are likely to be next
            for other in range(len(again)):
                self.keep(Answered(question, other), again[other, 0])
        return self.keep(answered, again[row, alternative])


class _Arrays(ArrayStore[tuple[bytes, int, int]]):
    what, instead = "logits", "slices are decoded again"
