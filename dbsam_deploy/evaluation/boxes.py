"""Boxes made from the truth, grown at random but the same every time, and boxes as masks.

The random numbers of a file depend on its name alone: `numpy.random.default_rng(crc32(name))` draws
four whole numbers an object, for x0, y0, x1 and y1 in this order. So the same file has the same
boxes in every run, on every machine and whatever else is evaluated with it. With 0–20 px, objects
in the order of slices and then labels, and objects under 16 px left out before anything is drawn,
these are the boxes of the LiteMedSAM reference figures.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..core.masks import mask_box
from .metrics import BoolArray

GROWTH_FRAME = 1024
"""Side of the frame in which growth is given; the image's longer side is scaled to it."""


@dataclass(frozen=True)
class BoxGrowth:
    """By how much each side of a box moves outwards.

    Attributes:
        low: fewest pixels, where the image's longer side is 1024.
        high: most pixels; drawn uniformly among the whole numbers low … high.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= GROWTH_FRAME:
            raise InputError(
                f"box growth {self.low} to {self.high} px: expected 0 <= low <= high <= "
                f"{GROWTH_FRAME}"
            )

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}–{self.high}"


def file_generator(file_name: str, seed: int = 0) -> np.random.Generator:
    """The random numbers of a file.

    Args:
        file_name: name without folders.
        seed: 0 for the boxes of the reference figures; any other number for other boxes.
    """
    name = zlib.crc32(file_name.encode())
    return np.random.default_rng(name if seed == 0 else [name, seed])


def tight_box(mask: BoolArray, *, inclusive: bool) -> npt.NDArray[np.float64]:
    """x0, y0, x1, y1 of the mask's pixels.

    Args:
        mask: (H, W), not empty.
        inclusive: x1 and y1 name the last column and row, as in MedSAM's code; else the ones after,
            so that the box encloses whole pixels.
    """
    return mask_box(mask) - (0, 0, int(inclusive), int(inclusive))


def grow_box(
    box: npt.NDArray[np.float64],
    size: tuple[int, int],
    growth: BoxGrowth,
    rng: np.random.Generator,
) -> FloatArray:
    """Move each side outwards by a random amount, kept inside the image and at least 1 px wide.

    Args:
        box: x0, y0, x1, y1 in the image frame.
        size: height and width of the image.
        growth: how much, at 1024 scale.
        rng: four numbers are drawn, also where low equals high.

    Returns:
        (4,) float32.
    """
    height, width = size
    drawn = rng.integers(growth.low, growth.high + 1, 4)
    moved = box + drawn * (-1, -1, 1, 1) * (max(size) / GROWTH_FRAME)
    x0, y0, x1, y1 = np.clip(moved, 0, (width, height, width, height))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return np.array([x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)], np.float32)


def fill_box(box: npt.NDArray[np.floating], size: tuple[int, int], *, inclusive: bool) -> BoolArray:
    """(H, W) mask of the box's pixels, its sides rounded to whole pixels (ties to even).

    Args:
        box: x0, y0, x1, y1 in the image frame.
        size: height and width of the image.
        inclusive: as in `tight_box`.
    """
    x0, y0, x1, y1 = np.rint(box.astype(np.float64)).astype(int)
    end = 1 if inclusive else 0
    mask = np.zeros(size, bool)
    mask[max(y0, 0) : y1 + end, max(x0, 0) : x1 + end] = True
    return mask
