"""Objects carried from slice to slice: the mask of one slice prompts the next.

A chain starts at an anchor, a slice whose mask is known, and goes one way. On each slice the model
is asked with a box around what looks like the object on the slice before (`transfer`), and a rule
says whether the answer still is the object. All objects go through a volume together: each slice is
opened at most once upwards and once downwards, and the decoder is asked for all of a slice's
objects in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..core.masks import Prediction
from ..prediction.segment import Progress, ignore, prompts_at_once
from .links import Anchor, Bounds, Chain, ChainEnd, SliceMask
from .stop_rules import ChainRule, next_box, overlap, wider_box

Intensities = Callable[[int], ByteArray]
"""Slice → (H, W) grey or (H, W, 3) RGB pixels."""


WIDER_PX = (2.0, 4.0)
"""Wider boxes beside a prompt's own, see `ChainRule.margin_px`."""


class SliceDecoder(Protocol):
    """What segments one slice of a plane."""

    def decode(self, index: int, boxes: FloatArray) -> Prediction:
        """Masks (N, 1, H, W) of slice `index` for (N, 4) float32 x0, y0, x1, y1 on it.

        Boxes alone: with a point in the last mask, or its logits, weights that were trained with
        boxes did worse.
        """
        ...


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
    progress: Progress = ignore,
    ended: Callable[[ChainEnd], None] = ignore,
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
    chains: Sequence[Chain],
    steps: tuple[int, ...],
    spacing_mm: tuple[float, float, float] | None,
    intensities: Intensities | None,
    progress: Progress,
) -> Iterator[tuple[Chain, SliceMask]]:
    """Slice by slice the masks that the chains' rule accepts, all upwards first or downwards."""
    _follow_surer(decoder, chains)
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
            pixels = None if intensities is None else intensities(index)
            active = [chain for chain in own if index in chain.slices]
            here = [chain for chain in active if chain.look_ahead(index, pixels, spacing_mm)]
            for chain, found in _decode(decoder, index, here, spacing_mm):
                if chain.take(found, pixels):
                    yield chain, found
            done += 1
    progress(done, done)


def _follow_surer(decoder: SliceDecoder, chains: Sequence[Chain]) -> None:
    """Ask for boxes a little wider than the prompts' own; follow a mask that is much surer.

    A model can find half an organ in its tight box, and all of it in one a pixel wider.
    """
    slices: dict[int, list[tuple[Chain, FloatArray]]] = {}
    for chain in chains:
        prompt, shape = chain.anchor.prompt, chain.anchor.mask.shape
        if chain.slices and prompt is not None:
            wider = np.stack([wider_box(prompt, margin, shape) for margin in WIDER_PX])
            slices.setdefault(chain.anchor.index, []).append((chain, wider))
    for index, here in slices.items():
        boxes = np.unique(np.concatenate([wider for _, wider in here]), axis=0)
        at_once = prompts_at_once(here[0][0].anchor.mask.shape)
        for start in range(0, len(boxes), at_once):
            part = boxes[start : start + at_once]
            answer = decoder.decode(index, part)
            for chain, wider in here:
                for row in np.flatnonzero((part[:, None] == wider).all(-1).any(-1)):
                    iou, mask = float(answer.ious[row, 0]), np.asarray(answer.masks[row, 0] != 0)
                    chain.follow_surer(mask, iou)


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
) -> list[Chain]:
    """One of each anchor and direction; errors are those of `propagate`."""
    _check(anchors, depth, bounds)
    stops = ((bounds, "the object's known end"), (limits, "the last slice that was asked for"))
    return [
        Chain(anchor, step, _ends(anchor, step, anchors, depth, rule, stops), rule, bounds)
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


def _decode(
    decoder: SliceDecoder,
    index: int,
    chains: Sequence[Chain],
    spacing_mm: tuple[float, float, float] | None,
) -> Iterator[tuple[Chain, SliceMask]]:
    """Ask for the objects of all chains on a slice, as many in one call as memory allows."""
    plane = None if spacing_mm is None else spacing_mm[1:]
    at_once = prompts_at_once(chains[0].anchor.mask.shape) if chains else 1
    for start in range(0, len(chains), at_once):
        part = chains[start : start + at_once]
        boxes = np.stack([_box(chain, plane) for chain in part])
        answer = decoder.decode(index, boxes)
        asked = None if answer.logits is None else boxes
        for row, chain in enumerate(part):
            mask = np.asarray(answer.masks[row, 0] != 0) & chain.allowed
            iou = float(answer.ious[row, 0])
            yield chain, SliceMask(chain.anchor.label, index, mask, iou, asked, row)


def _box(chain: Chain, spacing_mm: tuple[float, float] | None) -> FloatArray:
    """(4,) around the expected outline, inside what is known to hold the object.

    Beside the anchor it holds that slice's prompt too, as the anchor's mask may be a part of it.
    """
    box, within = next_box(chain.outline, chain.rule, spacing_mm), chain.anchor.within
    prompt = chain.anchor.prompt
    if prompt is not None and chain.last == chain.anchor.index:
        box = np.concatenate([np.minimum(box[:2], prompt[:2]), np.maximum(box[2:], prompt[2:])])
    if within is None:
        return box
    inner = np.concatenate([np.maximum(box[:2], within[:2]), np.minimum(box[2:], within[2:])])
    return inner if (inner[:2] < inner[2:]).all() else box


def _pairs(chains: Sequence[Chain]) -> list[tuple[Chain, Chain]]:
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


def _joined(up: Chain, down: Chain) -> Iterator[SliceMask]:
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
