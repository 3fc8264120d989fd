"""One object on its way from slice to slice, and what is known of it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core.imaging import ByteArray, FloatArray
from .stop_rules import LIKELY, Appearance, ChainRule, MaskArray, SliceAnswer, why_not
from .transfer import transferred

Bounds = Mapping[int, tuple[int, int]]
"""Label → its first slice and the one after its last."""


@dataclass(frozen=True, eq=False)
class SliceMask:
    """An object's mask on one slice.

    Attributes:
        label: the object.
        index: slice of the plane.
        mask: (H, W), not empty.
        iou: the decoder's own estimate of the mask's IoU; 1 for a mask that a user drew.
        boxes: (N, 4) of the call that this answers, where the decoder gave logits.
        row: which of them.
    """

    label: int
    index: int
    mask: MaskArray
    iou: float = 1.0
    boxes: FloatArray | None = None
    row: int = 0


@dataclass(frozen=True, eq=False)
class Anchor(SliceMask):
    """A mask that is known, from which chains start.

    Attributes:
        within: (4,) box that the object lies in on every slice, where that is known.
        prompt: (4,) box that was drawn around the object, where its mask is the answer. The mask
            may have missed a part.
    """

    within: FloatArray | None = None
    prompt: FloatArray | None = None


@dataclass(frozen=True)
class ChainEnd:
    """Where a chain ended and why.

    Attributes:
        label: the object.
        anchor: the slice that the chain came from.
        last: its last slice with a mask; the anchor's if there is no other.
        reason: in words.
    """

    label: int
    anchor: int
    last: int
    reason: str


class Chain:
    """One object on its way from an anchor, to one side.

    Args:
        anchor: where it starts.
        step: 1 or -1.
        limit: the first slice that it must not enter, and why.
        rule: says when it ends before.
        bounds: labels whose extent is known.
    """

    def __init__(
        self, anchor: Anchor, step: int, limit: tuple[int, str], rule: ChainRule, bounds: Bounds
    ) -> None:
        self.anchor, self.step, self.rule = anchor, step, rule
        self.is_bounded = anchor.label in bounds
        self.slices = range(anchor.index + step, limit[0], step)
        self.reason = limit[1]
        self.first = self.before = SliceAnswer(anchor.mask, anchor.iou)
        self.last = anchor.index
        self.held: dict[int, tuple[SliceMask, npt.NDArray[np.uint8]]] = {}
        self.pixels: ByteArray | None = None  # of the slice before
        self.outline, self.allowed = anchor.mask, np.ones_like(anchor.mask)

    def follow_surer(self, mask: MaskArray, iou: float) -> None:
        """Follow another mask of the anchor's slice, if it is much surer than the anchor's own."""
        least = max(self.anchor.iou + self.rule.surer_by, self.first.iou)
        if mask.any() and iou > least:
            self.first = self.before = SliceAnswer(mask, iou)

    def look_at(self, pixels: ByteArray) -> None:
        """Note what the object looks like on the anchor's slice."""
        self.pixels = pixels
        self.first = replace(self.first, appearance=Appearance.of(pixels, self.first.mask))

    def look_ahead(
        self,
        index: int,
        pixels: ByteArray | None,
        spacing_mm: tuple[float, float, float] | None,
    ) -> bool:
        """Find where the object is to be expected on a slice; end, if nothing there looks like it.

        Without pixels it is expected where it was.
        """
        self.outline = self.before.mask
        self.allowed = np.ones_like(self.outline)
        if pixels is None or self.pixels is None or not self.rule.follow_image:
            return True
        likeness = transferred(self.pixels, pixels, self.before.mask, spacing_mm)
        if (likeness > LIKELY).any():
            self.outline = likeness > LIKELY
            self.allowed = likeness >= self.rule.min_likeness
        elif not self.is_bounded:
            self.stop(f"slice {index}: nothing there looks like the object")
            return False
        return True

    def stop(self, reason: str) -> None:
        """End here."""
        self.reason, self.slices = reason, range(0)

    def take(self, found: SliceMask, pixels: ByteArray | None) -> bool:
        """Go on by one slice, if what was found there is the object; else end, or pass over it."""
        answer = SliceAnswer(found.mask, found.iou)
        if pixels is not None and found.mask.any():
            answer = replace(answer, appearance=Appearance.of(pixels, found.mask))
        self.slices = self.slices[1:]
        if self.is_bounded:
            if not answer.mask.any():
                return False
        elif reason := why_not(answer, self.before, self.first, self.rule):
            self.stop(f"slice {found.index}: {reason}")
            return False
        self.pixels = pixels
        self.before, self.last = answer, found.index
        return True

    def hold(self, found: SliceMask) -> None:
        """Keep a mask, as bits, until it is joined."""
        self.held[found.index] = (replace(found, mask=found.mask[:0]), np.packbits(found.mask))

    def held_mask(self, index: int) -> SliceMask:
        """A mask that was kept."""
        found, bits = self.held[index]
        shape = self.anchor.mask.shape
        mask = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
        return replace(found, mask=mask)

    def end(self) -> ChainEnd:
        """How far it came."""
        return ChainEnd(self.anchor.label, self.anchor.index, self.last, self.reason)
