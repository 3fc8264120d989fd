"""Closed contours of a mask, a hole cut in by a channel without width (DICOM's keyhole)."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from ..extras import require

FLOAT = npt.NDArray[np.float64]

_LEVEL = 0.51
"""Where a contour crosses from 1 inside to 0 outside: half-way between the centres of two pixels,
but for a hundredth, by which programs that round to whole pixels round to the one inside."""


def contours_of(mask: npt.NDArray[np.bool_]) -> list[FLOAT]:
    """The pieces of a mask, each as one closed contour.

    Marching squares: all pixel centres inside the mask, and none else, lie inside the contours. A
    hole is joined to the contour around it by a channel that is passed twice, as the standard has
    it (PS3.3, C.8.8.6.3); programs that fill by parity or by winding find the same area.

    Args:
        mask: (H, W).

    Returns:
        (n, 2) x and y in pixels, 0 at the centre of the first one; the last point is not repeated.

    Raises:
        MissingError: contourpy is not installed.
    """
    contourpy = require("contourpy", extra="dicom", what_for="RTSTRUCT")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    corner = np.array([columns[0] - 1, rows[0] - 1])  # of the padded cut
    generator = contourpy.contour_generator(
        z=np.pad(cut, 1).astype(np.float64), name="serial", fill_type="OuterOffset"
    )
    pieces, ends = generator.filled(_LEVEL, np.inf)
    found = []
    for points, offsets in zip(pieces, ends, strict=True):
        rings = [points[a : b - 1] for a, b in itertools.pairwise(offsets)]
        outer, *holes = (_without_straights(ring) for ring in rings)
        found.append(_joined(outer, holes) + corner)
    return found


def _without_straights(ring: FLOAT) -> FLOAT:
    """A ring without the points in the middle of straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return np.asarray(ring[np.abs(turn) > 1e-9])


def _joined(outer: FLOAT, holes: list[FLOAT]) -> FLOAT:
    """One ring of a contour and its holes, the nearest hole first, so that no channel crosses one.

    A hole runs the other way round than what is outside it, as contourpy gives it.
    """
    ring, left = outer, list(holes)
    while left:
        nearest = [_nearest(ring, hole) for hole in left]
        chosen = int(np.argmin([distance for distance, _, _ in nearest]))
        _, at, start = nearest[chosen]
        hole = np.roll(left.pop(chosen), -start, axis=0)
        ring = np.concatenate([ring[: at + 1], hole, hole[:1], ring[at:]])
    return ring


def _nearest(ring: FLOAT, hole: FLOAT) -> tuple[float, int, int]:
    """Smallest distance (squared) of two corners, and which they are."""
    best = (np.inf, 0, 0)
    for start, point in enumerate(hole):
        distances = ((ring - point) ** 2).sum(axis=1)
        at = int(distances.argmin())
        best = min(best, (float(distances[at]), at, start))
    return best
