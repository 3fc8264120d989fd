"""Closed contours of a mask, a hole cut in by a channel without width (DICOM's keyhole)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.masks import extent_of
from ..extras import require

FLOAT = npt.NDArray[np.float64]

_LEVEL = 0.51
"""Where a contour crosses from 1 inside to 0 outside: half-way between the centres of two pixels,
but for a hundredth, by which programs that round to whole pixels round to the one inside."""
_ASIDE = 0.01
"""Where on an edge a channel begins: beside the row of centres, and rounded still on it."""


def contours_of(mask: npt.NDArray[np.bool_]) -> list[FLOAT]:
    """The pieces of a mask, each as one closed contour.

    Marching squares: all pixel centres inside the mask, and none else, lie inside the contours. A
    hole is joined to the contour around it by a channel that is passed twice, as the standard has
    it (PS3.3, C.8.8.6.3): filled by parity, by winding or by whole pixels the area is the same.

    Args:
        mask: (H, W).

    Returns:
        (n, 2) x and y in pixels, 0 at the centre of the first one; the last point is not repeated.

    Raises:
        MissingError: contourpy is not installed.
    """
    contourpy = require("contourpy", extra="dicom", what_for="RTSTRUCT")
    extent = extent_of(mask)
    if extent is None:
        return []
    (top, bottom), (left, right) = extent
    cut = mask[top:bottom, left:right]
    corner = np.array([left - 1, top - 1])  # of the padded cut
    generator = contourpy.contour_generator(
        z=np.pad(cut, 1).astype(np.float64), name="serial", fill_type="OuterOffset"
    )
    pieces, ends = generator.filled(_LEVEL, np.inf)
    found = []
    for points, offsets in zip(pieces, ends, strict=True):
        rings = [points[a : b - 1] for a, b in itertools.pairwise(offsets)]
        found.append(_without_straights(_joined(rings)) + corner)
    return found


@dataclass(frozen=True)
class _Channel:
    """A way from a ring to a hole on its right, along one row of pixels inside.

    Attributes:
        edge: of the ring, by the corner where it begins.
        here: (1, 2) the point of that edge where the channel begins.
        hole: number of the other ring.
        its_edge: where it ends there.
        there: (1, 2) its end.
    """

    edge: int
    here: FLOAT
    hole: int
    its_edge: int
    there: FLOAT


def _joined(rings: list[FLOAT]) -> FLOAT:
    """One ring of a contour and the holes in it, which run the other way round."""
    channels = _channels(rings)
    path: list[FLOAT] = []
    ahead: list[FLOAT | tuple[int, int]] = [(0, -1)]
    while ahead:
        item = ahead.pop()
        if not isinstance(item, tuple):
            path.append(item)
            continue
        ring, start = item  # around it, from the corner after this edge
        turned = np.roll(rings[ring], -start - 1, axis=0)
        ends = {(c.edge - start - 1) % len(turned) + 1: c for c in channels.get(ring, ())}
        parts: list[FLOAT | tuple[int, int]] = []
        done = 0
        for end, c in sorted(ends.items()):
            parts += [turned[done:end], c.here, c.there, (c.hole, c.its_edge), c.there, c.here]
            done = end
        ahead += reversed([*parts, turned[done:]])
    return np.concatenate(path)


def _channels(rings: list[FLOAT]) -> dict[int, list[_Channel]]:
    """From every hole's leftmost corner to what is next on its left, by the ring that is there.

    Between the two all pixels are inside, so a channel crosses nothing. It runs a little below the
    pixels' centres: whether one on a contour counts as inside is for every program to say.
    """
    points = np.concatenate(rings)
    ring_of = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    starts = np.cumsum([0, *(len(ring) for ring in rings)])
    rows = np.rint(points[:, 1])
    on_rows = np.flatnonzero(np.abs(points[:, 1] - rows) < 1e-6)
    sorted_ = on_rows[np.lexsort((points[on_rows, 0], rows[on_rows]))]
    rank = np.zeros(len(points), np.int64)
    rank[sorted_] = np.arange(len(sorted_))

    def below(index: int) -> tuple[int, FLOAT]:
        ring, at = rings[ring_of[index]], index - starts[ring_of[index]]
        edge = at if ring[(at + 1) % len(ring)][1] > ring[at][1] else (at - 1) % len(ring)
        other = ring[(edge + 1) % len(ring)] if edge == at else ring[edge]
        return int(edge), (ring[at] + _ASIDE * (other - ring[at]))[None]

    found: dict[int, list[_Channel]] = {}
    for hole in range(1, len(rings)):
        leftmost = int(starts[hole] + rings[hole][:, 0].argmin())
        before = int(sorted_[rank[leftmost] - 1])
        edge, here = below(before)
        its_edge, there = below(leftmost)
        channel = _Channel(edge, here, hole, its_edge, there)
        found.setdefault(int(ring_of[before]), []).append(channel)
    return found


def _without_straights(ring: FLOAT) -> FLOAT:
    """A ring without the points in the middle of straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    back = (before * after).sum(axis=1) < 0
    return np.asarray(ring[(np.abs(turn) > 1e-9) | back])
