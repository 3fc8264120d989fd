"""From a slice that was just decided to its neighbours, and no further than may be changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..volumes.embeddings import SharedPredictor, image_key
from ..volumes.frames import Plane
from ..volumes.objects import Change
from ..volumes.session import VolumePredictor
from ..volumes.stop_rules import ChainRule

PLANES: tuple[Plane, ...] = ("stored", "coronal", "sagittal")
"""Those across each axis of (D, H, W) in a volume that nobody placed in a patient."""


class _OutOfTimeError(Exception):
    """The answer would come too late."""


def carry(
    session: VolumePredictor,
    label: int,
    axis: int,
    index: int,
    walls: frozenset[int],
    rule: ChainRule,
    deadline: float,
) -> Iterator[Change]:
    """Carry an object from a slice both ways; each change can be taken back.

    Towards another decided slice half of the way is gone, which leaves the rest to that one's own
    chain. What an earlier chain found within the way is replaced. What lies beyond stays where the
    reach ended the chain, and goes where the object ended.

    Args:
        session: with the object on the slice.
        label: the object.
        axis: of (D, H, W).
        index: of the slice.
        walls: the other decided slices.
        rule: with a reach.
        deadline: of `time.monotonic`; a chain that is not done by then changes nothing.
    """

    def watch(*_: int) -> None:
        if time.monotonic() > deadline:
            raise _OutOfTimeError

    depth, reach = session.volume.shape[axis], rule.reach or 1
    for step, direction in ((1, "up"), (-1, "down")):
        last = min(index + reach, depth - 1) if step > 0 else max(index - reach, 0)
        beyond = [abs(wall - index) for wall in walls if (wall - index) * step > 0]
        if beyond:
            half = min(beyond) // 2
            last = min(last, index + half) if step > 0 else max(last, index - half)
        if last == index:
            continue
        how: dict[str, Any] = {"plane": PLANES[axis], "from_slice": index, "direction": direction}
        how |= {"rule": rule, "progress": watch}
        try:
            change = session.propagate(label, until=last, **how)
            has_ended = change.ends[0].last != last and not beyond
            if has_ended and _goes_on(session, label, axis, last, step):
                session.undo()
                change = session.propagate(label, **how)
        except _OutOfTimeError:
            return
        yield change


def measured_reach(shared: SharedPredictor, budget_s: float) -> int:
    """Slices to each side that a model finds within a budget, from two that are timed.

    Args:
        shared: the model.
        budget_s: seconds for one side, none of its slices encoded before.
    """
    rng, spent = np.random.default_rng(0), 0.0
    for _ in range(2):  # the first one also pays for what a runtime does once
        image = rng.integers(0, 256, (512, 512, 3), np.uint8)
        start = time.perf_counter()
        boxes = np.array([[128.0, 128.0, 384.0, 384.0]])
        shared.ask(image_key(image), lambda: image, lambda model: model.predict_boxes(boxes))  # noqa: B023
        spent = time.perf_counter() - start
    return max(1, int(budget_s / spent))


def _goes_on(session: VolumePredictor, label: int, axis: int, last: int, step: int) -> bool:
    """Whether there is something of the object behind `last`."""
    extent = [(0, side) for side in session.volume.shape]
    extent[axis] = (last + 1, extent[axis][1]) if step > 0 else (0, last)
    return bool(session.mask(label, tuple(extent)).any())  # type: ignore[arg-type]
