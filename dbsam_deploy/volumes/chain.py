"""Objects carried from slice to slice: the mask of one slice prompts the next.

A chain starts at an anchor, a slice whose mask is known, and goes one way. On each slice the model
is asked with a box around the mask before it, and a rule says whether the answer still is the
object. All objects go through a volume together: each slice is opened at most once upwards and once
downwards, and the decoder is asked for all of a slice's objects in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..core.masks import Prediction
from ..prediction.segment import Progress, prompts_at_once
from .stop_rules import Appearance, ChainRule, MaskArray, SliceAnswer, next_box, overlap, why_not

Intensities = Callable[[int], ByteArray]
"""Slice → (H, W) grey or (H, W, 3) RGB pixels."""
Bounds = Mapping[int, tuple[int, int]]
"""Label → its first slice and the one after its last."""


class SliceDecoder(Protocol):
    """What segments one slice of a plane with prompts."""

    def decode(
        self,
        index: int,
        boxes: FloatArray,
        *,
        points: FloatArray | None = None,
        labels: npt.NDArray[np.int32] | None = None,
        mask_input: FloatArray | None = None,
    ) -> Prediction:
        """Masks (N, 1, H, W) of slice `index`.

        Args:
            index: slice of the plane.
            boxes: (N, 4) float32 x0, y0, x1, y1 in the slice's frame.
            points: (N, P, 2) float32 x, y in the slice's frame.
            labels: (N, P) int32, 1 inside, 0 outside, -1 no point.
            mask_input: (N, 4G, 4G) float32 logits of an earlier answer.
        """
        ...


@dataclass(frozen=True, eq=False)
class Anchor:
    """A slice on which an object's mask is known.

    Attributes:
        label: the object.
        index: slice of the plane.
        mask: (H, W), not empty.
        iou: the decoder's own estimate of the mask's IoU; 1 for a mask that a user drew.
        logits: (4G, 4G) float32, if the mask comes from the decoder.
        box: (4,) float32, the prompt that gave the mask, if it was one.
    """

    label: int
    index: int
    mask: MaskArray
    iou: float = 1.0
    logits: FloatArray | None = None
    box: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class SliceMask:
    """An object's mask on one slice.

    Attributes:
        label: the object.
        index: slice of the plane.
        mask: (H, W), not empty.
        iou: the decoder's own estimate of its IoU.
        logits: (4G, 4G) float32, where the decoder gave them.
    """

    label: int
    index: int
    mask: MaskArray
    iou: float
    logits: FloatArray | None = None


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


def _ignore(*_: Any) -> None:
    """Default of what is told about a run: says nothing."""


def propagate(
    decoder: SliceDecoder,
    anchors: Sequence[Anchor],
    depth: int,
    rule: ChainRule,
    *,
    bounds: Bounds | None = None,
    limits: Bounds | None = None,
    steps: tuple[int, ...] = (1, -1),
    spacing_mm: tuple[float, float, float] | None = None,
    intensities: Intensities | None = None,
    progress: Progress = _ignore,
    ended: Callable[[ChainEnd], None] = _ignore,
) -> Iterator[SliceMask]:
    """Carry every anchor's object through the volume, to both sides.

    A chain ends where the rule says so, at its label's next anchor and bounds, and with the volume.
    Between two anchors, each slice is of one of the two chains, which change on the slice on which
    they agree best.

    Args:
        decoder: the model.
        anchors: any number of objects, one or more slices of each.
        depth: slices of the plane.
        rule: see `ChainRule`.
        bounds: of labels of known extent: no rule ends a chain, empty masks are passed over.
        limits: of labels that shall not be carried further, whatever their extent.
        steps: 1 for upwards, -1 for downwards, in the order in which they are gone.
        spacing_mm: distance between slices, rows and columns, for a margin in mm.
        intensities: the slices' pixels, if the rule shall look at them.
        progress: called with slices done and slices that there may be in all, as far as known.
        ended: called with the end of each chain.

    Yields:
        Masks of other slices than the anchors', each label and slice at most once, in no order.

    Raises:
        InputError: an anchor that is empty, given twice, or outside the volume or its bounds.
    """
    chains = _chains(anchors, steps, depth, rule, bounds or {}, limits or {})
    pairs = _pairs(chains)
    held = {chain for pair in pairs for chain in pair}
    for chain, found in _steps(decoder, chains, steps, spacing_mm, intensities, progress):
        if chain in held:
            chain.hold(found)
        else:
            yield found
    for chain in chains:
        ended(chain.end())
    yield from (mask for pair in pairs for mask in _joined(*pair))


def _steps(
    decoder: SliceDecoder,
    chains: Sequence[_Chain],
    steps: tuple[int, ...],
    spacing_mm: tuple[float, float, float] | None,
    intensities: Intensities | None,
    progress: Progress,
) -> Iterator[tuple[_Chain, SliceMask]]:
    """Slice by slice the masks that the chains' rule accepts, all upwards first or downwards."""
    if intensities is not None:
        for chain in chains:
            chain.look_at(intensities(chain.anchor.index))
    done = 0
    for number, step in enumerate(steps):
        own = [chain for chain in chains if chain.step == step]
        later = {z for c in chains if c.step in steps[number + 1 :] for z in c.slices}
        while left := {z for chain in own for z in chain.slices}:
            progress(done, done + len(left) + len(later))
            index = min(left) if step > 0 else max(left)
            here = [chain for chain in own if index in chain.slices]
            pixels = None if intensities is None else intensities(index)
            for chain, found in _decode(decoder, index, here, spacing_mm):
                if chain.take(found, pixels):
                    yield chain, found
            done += 1
    progress(done, done)


def _check(anchors: Sequence[Anchor], depth: int, bounds: Bounds) -> None:
    seen: set[tuple[int, int]] = set()
    for anchor in anchors:
        first, end = bounds.get(anchor.label, (0, depth))
        if not max(first, 0) <= anchor.index < min(end, depth):
            raise InputError(
                f"slice {anchor.index} for object {anchor.label}: expected one of "
                f"{max(first, 0)} to {min(end, depth) - 1}"
            )
        if (anchor.label, anchor.index) in seen:
            raise InputError(
                f"object {anchor.label} has two masks on slice {anchor.index}: expected one"
            )
        if not anchor.mask.any():
            raise InputError(
                f"object {anchor.label} has an empty mask on slice {anchor.index}, so there is "
                "nothing to carry on: draw another box, or prompt another slice"
            )
        seen.add((anchor.label, anchor.index))


def _chains(
    anchors: Sequence[Anchor],
    steps: tuple[int, ...],
    depth: int,
    rule: ChainRule,
    bounds: Bounds,
    limits: Bounds,
) -> list[_Chain]:
    """One of each anchor and direction; errors are those of `propagate`."""
    _check(anchors, depth, bounds)
    stops = ((bounds, "the object's known end"), (limits, "the last slice that was asked for"))
    return [
        _Chain(anchor, step, _ends(anchor, step, anchors, depth, rule, stops), rule, bounds)
        for anchor in anchors
        for step in steps
    ]


def _ends(
    anchor: Anchor,
    step: int,
    anchors: Sequence[Anchor],
    depth: int,
    rule: ChainRule,
    stops: Sequence[tuple[Bounds, str]],
) -> tuple[int, str]:
    """The first slice that a chain must not enter, and why."""
    limits = [(depth if step > 0 else -1, "the end of the volume")]
    for bounds, reason in stops:
        if anchor.label in bounds:
            first, end = bounds[anchor.label]
            limits.append((end if step > 0 else first - 1, reason))
    if rule.reach is not None:
        limits.append((anchor.index + step * (rule.reach + 1), f"a reach of {rule.reach} slices"))
    limits += [
        (other.index, f"slice {other.index}, whose mask is known")
        for other in anchors
        if other.label == anchor.label and (other.index - anchor.index) * step > 0
    ]
    return min(limits, key=lambda limit: (limit[0] - anchor.index) * step)


class _Chain:
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

    def look_at(self, pixels: ByteArray) -> None:
        """Note what the object looks like on the anchor's slice."""
        self.first = SliceAnswer(
            self.first.mask, self.first.iou, Appearance.of(pixels, self.first.mask)
        )

    def take(self, found: SliceMask, pixels: ByteArray | None) -> bool:
        """Go on by one slice, if what was found there is the object; else end, or pass over it."""
        look = pixels is not None and found.mask.any()
        answer = SliceAnswer(
            found.mask,
            found.iou,
            Appearance.of(pixels, found.mask) if look and pixels is not None else None,
        )
        self.slices = self.slices[1:]
        if self.is_bounded:
            if not answer.mask.any():
                return False
        elif reason := why_not(answer, self.before, self.first, self.rule):
            self.reason = f"slice {found.index}: {reason}"
            self.slices = range(0)
            return False
        self.before, self.last = answer, found.index
        return True

    def hold(self, found: SliceMask) -> None:
        """Keep a mask, as bits, until it is joined."""
        empty = SliceMask(found.label, found.index, found.mask[:0], found.iou, found.logits)
        self.held[found.index] = (empty, np.packbits(found.mask))

    def held_mask(self, index: int) -> SliceMask:
        """A mask that was kept."""
        found, bits = self.held[index]
        shape = self.anchor.mask.shape
        mask = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
        return SliceMask(found.label, index, mask, found.iou, found.logits)

    def end(self) -> ChainEnd:
        """How far it came."""
        return ChainEnd(self.anchor.label, self.anchor.index, self.last, self.reason)


def _decode(
    decoder: SliceDecoder,
    index: int,
    chains: Sequence[_Chain],
    spacing_mm: tuple[float, float, float] | None,
) -> Iterator[tuple[_Chain, SliceMask]]:
    """Ask for the objects of all chains on a slice, as many in one call as memory allows."""
    plane = None if spacing_mm is None else spacing_mm[1:]
    height, width = chains[0].anchor.mask.shape
    at_once = prompts_at_once((height, width))
    for start in range(0, len(chains), at_once):
        part = chains[start : start + at_once]
        boxes = np.stack([next_box(chain.before.mask, chain.rule, plane) for chain in part])
        answer = decoder.decode(index, boxes)
        for row, chain in enumerate(part):
            logits = None if answer.logits is None else answer.logits[row, 0]
            mask = np.asarray(answer.masks[row, 0] != 0)
            iou = float(answer.ious[row, 0])
            yield chain, SliceMask(chain.anchor.label, index, mask, iou, logits)


def _pairs(chains: Sequence[_Chain]) -> list[tuple[_Chain, _Chain]]:
    """Upward and downward chains of a label that come from two neighbouring anchors."""
    pairs = []
    for up in chains:
        above = [
            chain
            for chain in chains
            if chain.anchor.label == up.anchor.label and chain.anchor.index > up.anchor.index
        ]
        if up.step > 0 and above:
            index = min(chain.anchor.index for chain in above)
            pairs += [(up, c) for c in above if c.step < 0 and c.anchor.index == index]
    return pairs


def _joined(up: _Chain, down: _Chain) -> Iterator[SliceMask]:
    """The masks between two anchors, each slice from one of the chains that come from them."""
    both = sorted(set(up.held) & set(down.held))
    middle = (up.anchor.index + down.anchor.index) / 2
    last_of_up = down.anchor.index  # a slice that one chain alone has is that chain's
    if both:
        agreement = {z: overlap(up.held_mask(z).mask, down.held_mask(z).mask) for z in both}
        last_of_up = max(both, key=lambda z: (agreement[z], -abs(z - middle)))
    for z in sorted(set(up.held) | set(down.held)):
        of_up = z in up.held and (z <= last_of_up or z not in down.held)
        yield (up if of_up else down).held_mask(z)
