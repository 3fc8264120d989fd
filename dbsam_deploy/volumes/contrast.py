"""What an object looks like beside what surrounds it, and how far it goes on by that.

A label that is carried by the image alone (`transfer`) moves by little from slice to slice. Where
an object widens by more, its own grey values say so, if its surroundings on the anchor's slice have
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from .stop_rules import Appearance, MaskArray
from .transfer import grid_step, local_mean, reduced

RING_PX = 6
"""Width of what surrounds an object, in pixels of the grid."""
GROWTH_PX = 3
"""How far an outline grows at most on one slice."""
MAX_MATCH = 0.5
"""An object that looks more like its surroundings than this is not told from them by brightness."""
MIN_ODDS = 1.5
"""A pixel is the object's where its surroundings' mean log odds are above this."""
_RARE = 1e-4  # share of a grey value that was not seen


@dataclass(frozen=True, eq=False)
class Contrast:
    """How much more often each grey value is the object's than its surroundings'.

    Attributes:
        odds: (256,) float32, logarithms.
    """

    odds: FloatArray

    @classmethod
    def of(cls, pixels: npt.NDArray[np.uint8], mask: MaskArray) -> Self | None:
        """Of (H, W) or (H, W, 3) pixels and an (H, W) mask; None where brightness tells nothing."""
        step = grid_step(mask.shape)
        small = reduced(mask, step) > 0.5
        core = ~_spread(~small)
        ring = _spread(small, RING_PX) & ~_spread(small)
        core = core if core.any() else small
        if not core.any() or not ring.any():
            return None
        grey = _grey(pixels, step)
        own, around = Appearance.of(grey, core), Appearance.of(grey, ring)
        if own.match(around) > MAX_MATCH:
            return None
        return cls(np.log((own.shares + _RARE) / (around.shares + _RARE)).astype(np.float32))

    def grown(self, outline: MaskArray, pixels: npt.NDArray[np.uint8]) -> MaskArray:
        """An (H, W) outline and what goes on from it, on a slice with these pixels.

        By at most `GROWTH_PX`, over pixels that are the object's by their brightness, and no
        further than a part two pixels wide goes.
        """
        step = grid_step(outline.shape)
        known = reduced(outline, step) > 0.5
        alike = local_mean(self.odds[_grey(pixels, step)]) > MIN_ODDS
        grown = known
        for _ in range(GROWTH_PX):
            grown = known | (_spread(grown) & alike)
        grown = _spread(~_spread(~grown))  # thin threads are none of it
        height, width = outline.shape
        return outline | grown.repeat(step, 0).repeat(step, 1)[:height, :width]


def _grey(pixels: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    return np.rint(reduced(pixels, step)).astype(np.uint8)


def _spread(mask: MaskArray, pixels: int = 1) -> MaskArray:
    """A mask and its neighbours above, below, left and right, so many times."""
    for _ in range(pixels):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask
