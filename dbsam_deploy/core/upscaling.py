"""Bilinear resizing of logits in stages, as PyTorch computes it, and masks of their sign.

Element-wise IEEE arithmetic in a fixed order: each value is the same bit for bit whether the whole
or a part is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Span = tuple[int, int]
"""First element of an axis, and last + 1."""
_BLOCK_ROWS = 128
_SURE = np.float32(1e-30)
"""Means of elements above it are above 0, whatever they are rounded to."""
_MOST_RUNS = 4
"""More pieces of a block of rows than these are computed as one."""


@dataclass(frozen=True)
class Upscale:
    """`F.interpolate(mode="bilinear", align_corners=False)` to `size`, then its top-left `crop`."""

    size: tuple[int, int]
    crop: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Line:
    """One axis of a stage: each element is `low·(1 - weight) + high·weight` of two elements."""

    low: npt.NDArray[np.intp]
    high: npt.NDArray[np.intp]
    weight: FloatArray
    is_identity: bool


@lru_cache(64)
def _line(length: int, size: int, crop: int) -> Line:
    if length == size:
        return Line(np.arange(crop), np.arange(crop), np.zeros(crop, np.float32), True)
    source = (np.arange(crop) + 0.5) * (length / size) - 0.5
    source = np.clip(source, 0, length - 1)
    low = np.floor(source).astype(np.intp)
    high = np.minimum(low + 1, length - 1)
    return Line(low, high, (source - low).astype(np.float32), False)


def axis_lines(shape: tuple[int, int], stages: tuple[Upscale, ...], axis: int) -> list[Line]:
    """One axis of each stage, for an input of this shape."""
    lengths = [shape[axis], *(stage.crop[axis] for stage in stages)]
    return [
        _line(length, stage.size[axis], stage.crop[axis])
        for length, stage in zip(lengths, stages, strict=False)
    ]


def resample(x: FloatArray, stages: tuple[Upscale, ...]) -> FloatArray:
    """(h, w) → the last stage's crop."""
    shape = (x.shape[0], x.shape[1])
    height, width = stages[-1].crop
    rows, columns = axis_lines(shape, stages, 0), axis_lines(shape, stages, 1)
    out = np.empty((height, width), np.float32)
    for block in _blocks((0, height)):
        out[slice(*block)] = _part(x, rows, columns, block, (0, width))
    return out


def value_at(x: FloatArray, stages: tuple[Upscale, ...], row: int, column: int) -> float:
    """`resample(x, stages)[row, column]`, bit for bit, and no more than it needs."""
    shape = (x.shape[0], x.shape[1])
    rows, columns = axis_lines(shape, stages, 0), axis_lines(shape, stages, 1)
    return float(_part(x, rows, columns, (row, row + 1), (column, column + 1))[0, 0])


def sign_mask(x: FloatArray, stages: tuple[Upscale, ...], out: npt.NDArray[np.uint8]) -> None:
    """Write `resample(x, stages) > 0` into `out`.

    Only what depends on elements of both signs is computed: where all are 0 or less, so is their
    mean, and where all are above 0, it is too.
    """
    positive = x > 0
    out[...] = 0
    if not positive.any():
        return
    shape = (x.shape[0], x.shape[1])
    lines = axis_lines(shape, stages, 0), axis_lines(shape, stages, 1)
    rows, columns = (
        _reached(lines[axis], np.flatnonzero(positive.any(axis=1 - axis))) for axis in (0, 1)
    )
    if columns[0] >= columns[1]:  # all positive elements are outside the crop, or between samples
        return
    sure = x > _SURE
    low, high = (source[slice(*columns)] for source in _sources(lines[1]))
    for block in _blocks(rows):
        needed = slice(*_windows(lines[0], block)[0])
        all_sure = _counted(sure[needed].all(axis=0), low, high) == high + 1 - low
        mixed = (_counted(positive[needed].any(axis=0), low, high) > 0) & ~all_sure
        target = out[slice(*block), slice(*columns)]
        target[:] = all_sure
        for start, stop in _runs(mixed):
            piece = columns[0] + start, columns[0] + stop
            part = _part(x, lines[0], lines[1], block, piece)
            np.greater(part, 0, out=target[:, start:stop].view(bool))


def _sources(lines: list[Line]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and last element of the input that each element of the last stage depends on."""
    low, high = lines[-1].low, lines[-1].high
    for line in reversed(lines[:-1]):
        low, high = line.low[low], line.high[high]
    return low, high


def _counted(
    flags: npt.NDArray[np.bool_] | np.bool_, first: npt.NDArray[np.intp], last: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """How many flags are set from each first to its last."""
    before = np.concatenate(([0], np.cumsum(flags)))
    counts: npt.NDArray[np.intp] = before[last + 1] - before[first]
    return counts


def _runs(flags: npt.NDArray[np.bool_]) -> list[Span]:
    """Where flags are set, or from the first to the last one if there are too many pieces."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    return runs if len(runs) <= _MOST_RUNS else [(runs[0][0], runs[-1][1])]


def _blocks(rows: Span) -> Iterator[Span]:
    """Rows that are computed together: few enough for the processor's cache."""
    for start in range(*rows, _BLOCK_ROWS):
        yield start, min(start + _BLOCK_ROWS, rows[1])


def _reached(lines: list[Line], positive: npt.NDArray[np.intp]) -> Span:
    """First and last + 1 element of the last stage that depends on an element in `positive`."""
    low, high = _sources(lines)
    start = int(np.searchsorted(high, positive[0], "left"))
    return start, int(np.searchsorted(low, positive[-1], "right"))


def _windows(lines: list[Line], last: Span) -> list[Span]:
    """Elements that each stage needs for `last` of the final one; the first item is the input's."""
    windows = [last]
    for line in reversed(lines):
        start, stop = windows[0]
        windows.insert(0, (int(line.low[start]), int(line.high[stop - 1]) + 1))
    return windows


def _part(
    x: FloatArray, rows: list[Line], columns: list[Line], height: Span, width: Span
) -> FloatArray:
    """Rows and columns of the last stage, computed column by column: those lie in one piece."""
    windows = _windows(rows, height), _windows(columns, width)
    x = np.ascontiguousarray(x[slice(*windows[0][0]), slice(*windows[1][0])].T)
    for index, lines in enumerate(zip(rows, columns, strict=True)):
        for axis in (0, 1):
            if not lines[axis].is_identity:
                first = windows[axis][index][0]
                x = _between(x, lines[axis], 1 - axis, first, slice(*windows[axis][index + 1]))
    return x.T


def _between(x: FloatArray, line: Line, axis: int, first: int, wanted: slice) -> FloatArray:
    low, high, weight = line.low[wanted] - first, line.high[wanted] - first, line.weight[wanted]
    weight = weight[:, None] if axis == 0 else weight[None, :]
    below, above = np.take(x, low, axis), np.take(x, high, axis)
    below *= 1 - weight
    above *= weight
    below += above
    return below
