"""From a slice that was just decided to its neighbours, and no further than may be changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..volumes.frames import Plane
from ..volumes.objects import Change, slab
from ..volumes.session import VolumePredictor
from ..volumes.stop_rules import ChainRule

PLANES: tuple[Plane, ...] = ("stored", "coronal", "sagittal")
"""Those across each axis of (D, H, W) in a volume that nobody placed in a patient."""

_LOG = logging.getLogger(__name__)
_AGAIN = 0.1
"""Of what a slice takes, its part once it is encoded: those found in time are asked again."""
_CUT = "an answer ended after %d of %d slices, for time"


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
    when_late: Callable[[], None],
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
        rule: see `ChainRule`.
        deadline: of `time.monotonic`, by which a chain goes no further.
        when_late: called for each chain that it cuts off.
    """
    depth = session.volume.shape[axis]
    reach = rule.reach or depth
    for step, direction in ((1, "up"), (-1, "down")):
        last = min(index + reach, depth - 1) if step > 0 else max(index - reach, 0)
        beyond = [abs(wall - index) for wall in walls if (wall - index) * step > 0]
        if beyond:
            half = min(beyond) // 2
            last = min(last, index + half) if step > 0 else max(last, index - half)
        if last == index:
            continue
        until = deadline if step < 0 else (time.monotonic() + deadline) / 2  # half for each way
        how: dict[str, Any] = {"plane": PLANES[axis], "from_slice": index, "direction": direction}
        meant = last
        change, last = _in_time(session, label, (index, last), until, {**how, "rule": rule})
        if last != meant:
            _LOG.warning(_CUT, abs(last - index), abs(meant - index))
            when_late()
        if change is None:
            continue
        has_ended = change.ends[0].last != last and not beyond
        if has_ended and _goes_on(session, label, axis, last, step):
            session.undo()
            change = session.propagate(label, **how, rule=rule)
        yield change


def _in_time(
    session: VolumePredictor,
    label: int,
    way: tuple[int, int],
    deadline: float,
    how: dict[str, Any],
) -> tuple[Change | None, int]:
    """Carry an object along a way, or as far as there is time, and say how far that was meant."""
    (index, last), done, seen, again, is_known = way, 0, time.monotonic(), 0.0, True
    step, view = (1 if last > index else -1), session.slices.along(PLANES.index(how["plane"]))

    def watch(slices: int, most: int) -> None:
        nonlocal done, seen, again, is_known
        now = time.monotonic()
        done, taken, seen = slices, now - seen, now
        quick = taken * (1.0 if is_known else _AGAIN)
        again += quick
        if slices == most:
            return
        is_known = session.slices.is_encoded(view, index + step * (slices + 1))
        if now + again + quick + (quick if is_known else taken) > deadline:
            raise _OutOfTimeError

    try:
        return session.propagate(label, until=last, progress=watch, **how), last
    except _OutOfTimeError:
        if not done:
            return None, index
    reached = index + done if last > index else index - done
    return session.propagate(label, until=reached, **how), reached


def _goes_on(session: VolumePredictor, label: int, axis: int, last: int, step: int) -> bool:
    """Whether there is something of the object behind `last`."""
    first, end = (last + 1, None) if step > 0 else (0, last)
    return bool(session.mask(label, slab(session.volume.shape, axis, first, end)).any())
