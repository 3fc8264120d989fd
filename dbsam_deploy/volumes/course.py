"""From where and how far a call carries objects, and what of an earlier call it replaces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..core.contract import BOXES
from ..core.errors import InputError
from ..prediction.segment import Progress
from .chain import propagate
from .links import Anchor, ChainEnd
from .logits import Answered, Question
from .objects import Decoded, Piece, SliceFindings, TrackedObject
from .places import checked_index
from .planes import PlaneView
from .slices import PlaneDecoder, VolumeSlices
from .stop_rules import ChainRule

Direction = Literal["both", "up", "down"]
_STEPS: dict[str, tuple[int, ...]] = {"both": (1, -1), "up": (1,), "down": (-1,)}


class Starts(NamedTuple):
    """What a chain is given; slices are the first and the one after the last.

    Attributes:
        anchors: the slices to start from.
        limits: label → slices to which it may be carried.
        bounds: label → slices within which a 3D box says that the object lies.
    """

    anchors: list[Anchor]
    limits: dict[int, tuple[int, int]]
    bounds: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Course:
    """The way of one call along a plane.

    Attributes:
        view: the plane.
        from_slice: the one prompted slice to start from; None for all.
        steps: 1 for upwards, -1 for downwards.
        limit: the first slice that may be entered, and the one after the last.
    """

    view: PlaneView
    from_slice: int | None
    steps: tuple[int, ...]
    limit: tuple[int, int]

    @classmethod
    def of(
        cls, view: PlaneView, from_slice: int | None, direction: Direction, until: int | None
    ) -> Course:
        """What a user asks for.

        Raises:
            InputError: no direction, a slice that is not there, or an end without a direction.
        """
        if direction not in _STEPS:
            raise InputError(f"direction {direction!r}: expected both, up or down")
        if from_slice is not None:
            from_slice = checked_index(view, from_slice)
        limit = (0, view.depth)
        if until is not None:
            until = checked_index(view, until)
            if direction == "both":
                if from_slice is None:
                    raise InputError(
                        "until goes with a direction (up or down) or a slice to start from"
                    )
                direction = "up" if until > from_slice else "down"
            elif from_slice is not None and (until - from_slice) * _STEPS[direction][0] < 0:
                raise InputError(
                    f"until {until} does not lie {direction} from slice {from_slice}: choose "
                    "another slice or direction"
                )
            limit = (0, until + 1) if direction == "up" else (until, view.depth)
        return cls(view, from_slice, _STEPS[direction], limit)

    def starts(self, objects: Iterable[TrackedObject], *, are_named: bool) -> Starts:
        """The slices to start from, of those that the user prompted.

        Args:
            objects: to carry.
            are_named: whether it is wrong if one of them was not prompted on this plane.

        Raises:
            InputError: nothing to start from.
        """
        found, axis = Starts([], {}, {}), self.view.axis
        for one in objects:
            prompted = one.anchors(axis)
            if not (are_named or prompted):
                continue
            chosen = [z for z in prompted if self.from_slice in (None, z)]
            own = [a for z in chosen if (a := one.anchor(axis, z, self.view.volume.shape))]
            if not own:
                where = "this plane" if self.from_slice is None else f"slice {self.from_slice}"
                raise InputError(
                    f"{one.about.name}: no prompt on {where} found anything to carry on; draw "
                    "another box, or prompt another slice"
                )
            first, end = self.limit
            if self.from_slice is not None:  # the others are walls
                first = max([first, *(z + 1 for z in prompted if z < self.from_slice)])
                end = min([end, *(z for z in prompted if z > self.from_slice)])
            found.anchors.extend(own)
            found.limits[one.about.label] = (first, end)
            if axis in one.bounds:
                found.bounds[one.about.label] = one.bounds[axis][:2]
        if not found.anchors:
            raise InputError("no object was prompted on this plane: prompt one first")
        return found

    def followed(
        self, slices: VolumeSlices, starts: Starts, rule: ChainRule, progress: Progress
    ) -> tuple[dict[int, SliceFindings], tuple[ChainEnd, ...]]:
        """What chains find, by object and slice, and where they end; nothing is written yet."""
        view, ends = self.view, list[ChainEnd]()
        found: dict[int, SliceFindings] = {label: {} for label in starts.limits}
        for one in propagate(
            PlaneDecoder(slices, view),
            starts.anchors,
            view.depth,
            rule,
            bounds=starts.bounds,
            limits=starts.limits,
            steps=self.steps,
            spacing_mm=view.spacing_mm,
            intensities=view.pixels,
            progress=progress,
            ended=ends.append,
        ):
            boxes, answered = one.boxes, None
            if boxes is not None:
                answered = Answered(Question(view.axis, one.index, {BOXES: boxes}), one.row)
            found[one.label][one.index] = (Piece.of(one.mask), Decoded(one.iou, None, answered))
        return found, tuple(ends)

    def keep_to(self, found: SliceFindings, tracked: TrackedObject, limit: tuple[int, int]) -> None:
        """Leave the object on the slices that this call may decide.

        What lies behind a slice on which the user found nothing is dropped. Slices that an earlier
        call came to and this one did not are emptied.
        """
        axis, prompted = self.view.axis, tracked.anchors(self.view.axis)
        starts = [z for z in prompted if tracked.anchor(axis, z, self.view.volume.shape)]
        walls = set(prompted) - set(starts)
        for z in list(found):
            ways = (range(min(z, start), max(z, start)) for start in starts)
            if z in walls or all(any(wall in way for wall in walls) for way in ways):
                del found[z]
        origins = starts if self.from_slice is None else [self.from_slice]
        for own, z in tracked.slices:
            ahead = (1 in self.steps and z > origins[0]) or (-1 in self.steps and z < origins[-1])
            is_earlier = own == axis and z not in prompted and z not in found
            if is_earlier and ahead and limit[0] <= z < limit[1]:
                found[z] = (Piece.nothing(), None)
