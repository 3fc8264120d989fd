"""Models whose masks are known in advance, and drawn volumes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.volumes.chain import propagate
from dbsam_deploy.volumes.links import Anchor, ChainEnd, SliceMask
from dbsam_deploy.volumes.stop_rules import ChainRule

SIDE = 64
Answerer = Callable[[int, np.ndarray], np.ndarray]


class Scripted:
    """A decoder whose answer to a box on a slice is a function; it notes what it was asked."""

    def __init__(self, answer: Answerer, ious: Callable[[int], float] = lambda z: 0.9) -> None:
        self.answer, self.ious = answer, ious
        self.asked: list[tuple[int, np.ndarray]] = []

    def decode(self, index: int, boxes: np.ndarray) -> Prediction:
        self.asked.append((index, boxes))
        masks = np.stack([self.answer(index, box) for box in boxes])
        ious = np.full((len(boxes), 1), self.ious(index), np.float32)
        return Prediction(masks[:, None].astype(np.uint8), ious)

    @property
    def opened(self) -> list[int]:
        return [index for index, _ in self.asked]


def within(truth: np.ndarray) -> Answerer:
    """The truth's pixels inside the box."""

    def answer(index: int, box: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = box.round().astype(int)
        inside = np.zeros(truth.shape[1:], bool)
        inside[y0:y1, x0:x1] = True
        return truth[index] & inside

    return answer


def square(row: int, column: int, length: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[row : row + length, column : column + length] = True
    return mask


def tube(depth: int, first: int, end: int, *, slide: int = 0) -> np.ndarray:
    """(depth, SIDE, SIDE): a square of 16 on slices first … end - 1 that slides along x."""
    truth = np.zeros((depth, SIDE, SIDE), bool)
    for z in range(first, end):
        truth[z] = square(20, 10 + slide * (z - first), 16)
    return truth


def anchor(truth: np.ndarray, index: int, label: int = 1, iou: float = 0.9) -> Anchor:
    return Anchor(label, index, truth[index], iou)


def run(
    decoder: Scripted,
    anchors: list[Anchor],
    depth: int,
    rule: ChainRule | None = None,
    **more: Any,
) -> tuple[dict[tuple[int, int], SliceMask], dict[tuple[int, bool], ChainEnd]]:
    """Masks by label and slice, and ends by label and whether upwards."""
    ends: list[ChainEnd] = []
    found = list(propagate(decoder, anchors, depth, rule or ChainRule(), ended=ends.append, **more))
    keys = [(item.label, item.index) for item in found]
    assert len(keys) == len(set(keys))
    up = [number % 2 == 0 for number in range(len(ends))]
    return dict(zip(keys, found, strict=True)), {
        (end.label, way): end for end, way in zip(ends, up, strict=True)
    }


def pictured(truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Pixels of a bright object on a darker ground, with noise."""
    noise = np.random.default_rng(seed).normal(0, 5, truth.shape)
    return (np.where(truth, 150, 80) + noise).clip(0, 255).astype(np.uint8)


def fills_its_box(index: int, box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box.round().astype(int)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask
