"""How a mask prompts the next slice, and when an answer no longer is the object."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..core.masks import mask_box

MaskArray = npt.NDArray[np.bool_]

OF_ANCHOR = 0.9
"""Where a model is unsure of the anchor itself, no other slice has to be surer than this part."""
LIKELY = 0.5
"""From this likeness on a pixel is expected to be the object's."""
_BLUR = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)  # by 4 grey values
MARGIN_FRAME = 256
"""Side of the frame in which a margin in pixels is given; the longer side is scaled to it."""


@dataclass(frozen=True, kw_only=True)
class ChainRule:
    """How a mask becomes the next slice's prompt, and when a chain ends.

    Attributes:
        follow_image: where pixels are known, the box goes around what looks like the object on the
            slice before; else around the last mask.
        min_likeness: what looks less like it than this, from 0 to 1, is no part of the mask.
        margin_px: each side of that box moves outwards by so many pixels, where the slice's longer
            side is 256.
        margin_mm: the same in mm, instead, where the spacing is known.
        surer_by: where a box a little wider than a prompt's has a predicted IoU higher by this, its
            mask is what is followed: the prompt's own has missed a part.
        min_overlap: least IoU of a mask with the one before it.
        min_iou_ratio: least predicted IoU, as a part of the anchor's.
        min_brightness_match: least overlap of the grey values in a mask with those in the anchor's,
            see `Appearance.match`.
        min_joint: least product of predicted IoU and that overlap: a mask may be weak in one, not
            in both; at most `OF_ANCHOR` of the anchor's predicted IoU.
        reach: most slices to each side of an anchor; None for the whole volume.
    """

    follow_image: bool = True
    min_likeness: float = 0.2
    margin_px: float = 2.0
    margin_mm: float | None = None
    surer_by: float = 0.1
    min_overlap: float = 0.15
    min_iou_ratio: float = 0.8
    min_brightness_match: float = 0.7
    min_joint: float = 0.52
    reach: int | None = None

    def __post_init__(self) -> None:
        parts = (self.min_likeness, self.min_overlap, self.min_brightness_match)
        distances = (self.margin_px, self.margin_mm or 0.0)
        values = (*distances, self.surer_by, self.min_iou_ratio, self.min_joint, *parts)
        if min(values) < 0 or max(parts) > 1:
            raise InputError(f"{self}: expected overlaps from 0 to 1 and no negative number")
        if self.reach is not None and self.reach < 1:
            raise InputError(f"reach {self.reach}: expected at least 1 slice, or none for all")

    def relative_to(self, iou: float) -> ChainRule:
        """The same for an anchor that counts as drawn, whose mask has this predicted IoU."""
        least = self.min_iou_ratio * max(0.0, iou)  # an estimate may be negative, or NaN
        return replace(self, min_iou_ratio=least, min_joint=self.least_joint(iou))

    def least_joint(self, iou: float) -> float:
        """Least product of predicted IoU and likeness, for an anchor of this predicted IoU."""
        return min(self.min_joint, OF_ANCHOR * max(0.0, iou))


RULE = ChainRule()
"""The defaults, which measured best, see docs/facts.md."""


def overlap(one: MaskArray, other: MaskArray) -> float:
    """IoU of two masks of one shape; 0 where both are empty."""
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 0.0


def next_box(
    mask: MaskArray, rule: ChainRule, spacing_mm: tuple[float, float] | None = None
) -> FloatArray:
    """(4,) float32 box on the next slice, inside it.

    Args:
        mask: (H, W) where the object is expected, not empty.
        rule: says how much wider the box is.
        spacing_mm: distance between rows and between columns.
    """
    box, size = mask_box(mask).astype(np.float32), mask.shape
    if rule.margin_mm is not None and spacing_mm is not None:
        margin_y, margin_x = (rule.margin_mm / distance for distance in spacing_mm)
        return _wider(box, margin_y, margin_x, size)
    return wider_box(box, rule.margin_px, size)


def wider_box(box: FloatArray, margin_px: float, size: tuple[int, int]) -> FloatArray:
    """(4,) float32 box, wider by so many pixels of `MARGIN_FRAME`, inside a slice of size H, W."""
    margin = margin_px * max(size) / MARGIN_FRAME
    return _wider(box, margin, margin, size)


def _wider(box: FloatArray, margin_y: float, margin_x: float, size: tuple[int, int]) -> FloatArray:
    wider = box + np.array([-margin_x, -margin_y, margin_x, margin_y])
    return np.asarray(np.clip(wider, 0, (*size[::-1], *size[::-1])), np.float32)


@dataclass(frozen=True, eq=False)
class Appearance:
    """How often each grey value occurs in a mask: (256,), blurred, with sum 1."""

    shares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, pixels: npt.NDArray[np.uint8], mask: MaskArray) -> Appearance:
        """Of (H, W) or (H, W, 3) pixels in an (H, W) mask, which has some."""
        shares = np.convolve(np.bincount(pixels[mask].reshape(-1), minlength=256), _BLUR, "same")
        return cls(shares / shares.sum())

    def match(self, other: Appearance) -> float:
        """Bhattacharyya coefficient: 1 for the same grey values, 0 where none is in both."""
        return float(np.sqrt(self.shares * other.shares).sum())


@dataclass(frozen=True, eq=False)
class SliceAnswer:
    """What the model says of an object on a slice.

    Attributes:
        mask: (H, W).
        iou: the decoder's own estimate of its IoU.
        appearance: of the mask, where the slice's pixels are known and it has some.
    """

    mask: MaskArray
    iou: float
    appearance: Appearance | None = None


def why_not(answer: SliceAnswer, before: SliceAnswer, anchor: SliceAnswer, rule: ChainRule) -> str:
    """Why an answer is not the object, in words; empty where it is.

    Args:
        answer: on this slice.
        before: on the slice before it.
        anchor: on the slice that the chain comes from.
        rule: its limits.
    """
    if not answer.mask.any():
        return "the mask is empty"
    common = overlap(answer.mask, before.mask)
    if common < rule.min_overlap:
        return f"IoU with the mask before it {common:.2f}, under {rule.min_overlap:g}"
    least = rule.min_iou_ratio * anchor.iou
    if answer.iou < least:
        return f"predicted IoU {answer.iou:.2f}, under {least:.2f}"
    if answer.appearance is not None and anchor.appearance is not None:
        match = answer.appearance.match(anchor.appearance)
        if match < rule.min_brightness_match:
            return f"brightness like the object's {match:.2f}, under {rule.min_brightness_match:g}"
        joint = rule.least_joint(anchor.iou)
        if answer.iou * match < joint:
            return f"predicted IoU times likeness {answer.iou * match:.2f}, under {joint:.2f}"
    return ""
