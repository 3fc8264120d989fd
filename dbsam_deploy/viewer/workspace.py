"""What one viewer works on: an image, the one object on it, what was marked, one step back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.masks import extent_of, mask_box
from ..images.intensity import Window
from ..images.volumes import Volume
from ..volumes.embeddings import SharedPredictor
from ..volumes.objects import Change, Extent, SliceName, around, slab
from ..volumes.planes import PlaneView
from ..volumes.session import VolumePredictor
from ..volumes.stop_rules import ChainRule, MaskArray
from .carrying import PLANES, carry
from .images import as_viewer_volume
from .marks import BoxMark, BrushMark, Mark, PointMark, SeedMark, VolumeShape
from .memory import Memory
from .slice_work import SliceFound, SliceWork, Wish

LABEL = 1
UNDO_BYTES = 256 * 1024 * 1024
"""More than any one mark changes: a step back is whole."""
_THICK = 1.5
"""Times the other spacings: the axis along which a volume was acquired."""


@dataclass(frozen=True)
class WorkRules:
    """How a server answers, the same for all viewers.

    Attributes:
        window: level and width for every image; None to tell by its values.
        reach: most slices to each side of a prompted one; None for the whole volume.
        deadline_s: after so long an answer goes no further.
        rule: how objects are carried.
    """

    window: Window | None = None
    reach: int | None = None
    deadline_s: float = 9.0
    rule: ChainRule = field(default_factory=ChainRule)


@dataclass(frozen=True, eq=False)
class Redrawn:
    """What a viewer draws anew.

    Attributes:
        has_run: whether the model, or a step back, had something to do.
        extent: where; None where nothing differs.
        mask: the object there.
        is_late: time ran out before the object was followed to its ends; the next mark goes on.
    """

    has_run: bool
    extent: Extent | None = None
    mask: npt.NDArray[np.bool_] | None = None
    is_late: bool = False


class Workspace:
    """The state of one lease; used by one thread at a time.

    Args:
        shared: the model.
        rules: see `WorkRules`.
    """

    def __init__(self, shared: SharedPredictor, rules: WorkRules) -> None:
        self._shared, self._rules = shared, rules
        self.has_buffer, self.goes_through = False, True
        self._session: VolumePredictor | None = None
        self._memory, self._steps = Memory(), list[Change]()
        self._undo: tuple[Memory, int] | None = None
        self._send_all = self._is_late = False

    def close(self) -> None:
        """Drop the image, and encode nothing ahead for it."""
        if self._session is not None:
            self._session.close()
        self._session, self.has_buffer = None, False

    @property
    def shape(self) -> VolumeShape:
        """Of the image.

        Raises:
            InputError: there is none.
        """
        return self._work().volume.shape

    def set_image(self, values: npt.NDArray[Any], spacing: Any) -> None:
        """Begin anew with an image; errors as `as_viewer_volume`."""
        volume = as_viewer_volume(values, spacing, self._rules.window)
        self.close()
        self._begin(volume)

    def set_buffer(self) -> None:
        """The viewer's buffer is empty: the next answer has all of the object."""
        self.has_buffer = self._send_all = True

    def reset(self) -> None:
        """Forget the object; legal before any image."""
        if self._session is not None:
            self._session.close()
            self._begin(self._session.volume, self._memory.last)

    def add(self, mark: Mark | None, *, runs: bool) -> Redrawn:
        """Take a mark, and answer it with those that waited, or let it wait.

        Args:
            mark: None for one that lies outside the image, or holds nothing.
            runs: answer now.
        """
        self._work()
        if not self.has_buffer:
            raise InputError("no target buffer: set one after the image")
        if mark is None:
            return self.predict() if runs and self._memory.queued else Redrawn(runs)
        before = self._memory
        now = replace(before, queued=(*before.queued, mark))
        if not runs:
            self._memory, self._undo = now, (before, 0)
            return Redrawn(False)
        changes = self._run(now)
        self._undo = (before, len(changes))
        return self._answer(changes)

    def predict(self) -> Redrawn:
        """Answer the marks that wait."""
        self._work()
        if not self._memory.queued:
            return Redrawn(False)
        changes = self._run(self._memory)
        if self._undo is not None:
            self._undo = (self._undo[0], self._undo[1] + len(changes))
        return self._answer(changes)

    def seed(self, mark: SeedMark, *, runs: bool) -> Redrawn:
        """Begin the object with a mask; with `runs` the model draws each of its slices anew."""
        session = self._work()
        before, mask = self._memory, mark.voxels
        filled = [frozenset(np.flatnonzero(mask.any(_others(a))).tolist()) for a in range(3)]
        if runs and mask.any():
            with self._alone():
                mask = self._refined(mask, filled[self._acquired()])
        changes = [session.set_mask(LABEL, mask)]
        decided = {axis: filled[axis] for axis in range(3)}
        self._memory, self._undo = Memory(decided=decided, last=before.last), (before, 1)
        if not runs:
            return Redrawn(False)
        # The viewer has drawn the seed itself: what it has of it is drawn anew, too.
        return self._answer([*changes, Change((LABEL,), changed=extent_of(mark.voxels))])

    def undo(self) -> Redrawn:
        """Take the last mark back, exactly."""
        if self._session is None or self._undo is None:
            return Redrawn(False)
        (self._memory, steps), self._undo = self._undo, None
        return self._answer([self._session.undo() for _ in range(steps)])

    def _work(self) -> VolumePredictor:
        if self._session is None:
            raise InputError("no image: set one first")
        return self._session

    def _begin(self, volume: Volume, last: SliceName | None = None) -> None:
        self._session = VolumePredictor(
            self._shared,
            volume,
            rule=self._rules.rule,
            encode_ahead=False,  # here, once an answer is complete
            undo_bytes=UNDO_BYTES,
            logits_bytes=(0, 0),  # no viewer is sent fractions
        )
        self._memory, self._undo, self._send_all = Memory(last=last), None, False
        self._encode_ahead()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing is encoded ahead between the slices of an answer."""
        self._work().slices.stop_ahead()
        try:
            yield
        finally:
            self._encode_ahead()

    def _encode_ahead(self) -> None:
        """Encode while nothing is asked, outwards from the slice that was decided last."""
        slices, axis = self._work().slices, self._acquired()
        axis, index = self._memory.last or (axis, self.shape[axis] // 2)
        slices.encode_ahead(slices.along(axis), index)

    def _run(self, memory: Memory) -> list[Change]:
        """Answer queued marks; a failure leaves everything as it was."""
        deadline = time.monotonic() + self._rules.deadline_s
        self._steps, self._is_late = [], False
        with self._alone():
            try:
                for mark in memory.queued:
                    memory = self._apply(mark, replace(memory, queued=()), deadline)
            except BaseException:
                for _ in self._steps:
                    self._work().undo()
                raise
            self._memory = memory
        return self._steps

    def _apply(self, mark: Mark, memory: Memory, deadline: float) -> Memory:
        if isinstance(mark, BoxMark) and not self._flat_axes(mark.sides):
            return self._solid_box(mark, memory, deadline)
        if isinstance(mark, PointMark):
            axis = self._acquired()
            if memory.flat is not None and mark.place[memory.flat[0]] == memory.flat[1]:
                axis = memory.flat[0]
            marked = [mark.place[axis]]
        else:
            flat = self._flat_axes(mark.sides)
            if not flat and isinstance(mark, BrushMark):  # sent as large as the image
                flat = self._flat_axes(extent_of(mark.voxels) or mark.sides)
            axis = self._acquired() if self._acquired() in flat or not flat else flat[0]
            marked = list(range(*mark.sides[axis]))
            if isinstance(mark, BrushMark):
                marked = [marked[z] for z in np.flatnonzero(mark.voxels.any(_others(axis)))]
        for index in marked:
            memory = self._on_slice(mark, axis, index, memory, deadline)
        for index in {marked[0], marked[-1]}:
            if self.goes_through and self._slice_mask(axis, index).any():
                self._carry(axis, index, memory, deadline)
        return memory

    def _on_slice(
        self, mark: Mark, axis: int, index: int, memory: Memory, deadline: float
    ) -> Memory:
        """Decide one slice; of a mark on many, the last ones without the model if it is late."""
        session = self._work()
        view, before = session.slices.along(axis), self._slice_mask(axis, index)
        wish = memory.wishes.get((axis, index), Wish())
        if isinstance(mark, BrushMark) and time.monotonic() > deadline:
            self._is_late = True
            area = _area(mark, view, index)
            found = SliceFound(before | area if mark.is_inside else before & ~area, None)
        else:
            found, wish = _decided(SliceWork(session.slices, view, index, before), mark, view, wish)
        self._steps.append(session.set_mask(LABEL, found.mask, index=index, plane=PLANES[axis]))
        return replace(
            memory,
            wishes={**memory.wishes, (axis, index): wish},
            flat=memory.flat if isinstance(mark, PointMark) else (axis, index),
            sure=memory.sure if found.iou is None else found.iou,
        ).with_decided(axis, index)

    def _solid_box(self, mark: BoxMark, memory: Memory, deadline: float) -> Memory:
        session = self._work()
        axis = self._acquired()
        if not mark.is_inside:
            return self._emptied(mark, memory)
        corners = [edge[side] for side in (0, 1) for edge in reversed(mark.sides)]
        change = session.prompt(LABEL, box_3d=corners, plane=PLANES[axis], add=False)
        self._steps.append(change)
        index = change.slices[0]
        memory = replace(memory, sure=change.iou).with_decided(axis, index)
        if self._slice_mask(axis, index).any():
            self._carry(axis, index, memory, deadline)
        return memory

    def _emptied(self, mark: BoxMark, memory: Memory) -> Memory:
        """Take a 3D box out of the object, slice by slice."""
        session = self._work()
        axis = self._acquired()
        rows, columns = (slice(*side) for a, side in enumerate(mark.sides) if a != axis)
        for index in range(*mark.sides[axis]):
            mask = self._slice_mask(axis, index)
            if mask[rows, columns].any():
                mask[rows, columns] = False
                self._steps.append(session.set_mask(LABEL, mask, index=index, plane=PLANES[axis]))
                memory = memory.with_decided(axis, index)
        return memory

    def _carry(self, axis: int, index: int, memory: Memory, deadline: float) -> None:
        session = self._work()
        rule = self._rules.rule.relative_to(1.0 if memory.sure is None else memory.sure)
        rule = replace(rule, reach=self._rules.reach)
        walls = memory.decided[axis] - {index}
        for change in carry(session, LABEL, axis, index, walls, rule, deadline, self._cut):
            self._steps.append(change)

    def _cut(self) -> None:
        self._is_late = True

    def _refined(self, mask: MaskArray, filled: frozenset[int]) -> MaskArray:
        """Slices of a mask drawn anew by the model, as many as an answer may have."""
        slices, axis, out = self._work().slices, self._acquired(), mask.copy()
        view, reach = slices.along(axis), self._rules.reach
        most = None if reach is None else 2 * reach + 1
        middle = sorted(filled)[len(filled) // 2]
        deadline = time.monotonic() + self._rules.deadline_s
        for index in sorted(filled, key=lambda z: abs(z - middle))[:most]:
            if time.monotonic() > deadline:
                self._is_late = True
                break
            before = np.take(mask, index, axis)
            found = SliceWork(slices, view, index, before).box(mask_box(before))
            if found.mask.any():
                np.moveaxis(out, axis, 0)[index] = found.mask
        return out

    def _answer(self, changes: list[Change]) -> Redrawn:
        extents = [change.changed for change in changes if change.changed is not None]
        if self._send_all:
            whole = extent_of(self._read(slab(self.shape)))
            extents += [] if whole is None else [whole]
        self._send_all, is_late = False, self._is_late
        self._is_late = False
        if not extents:
            return Redrawn(True, is_late=is_late)
        extent = around(extents)
        return Redrawn(True, extent, self._read(extent), is_late)

    def _read(self, extent: Extent) -> MaskArray:
        session = self._work()
        if not session.objects:
            return np.zeros([end - first for first, end in extent], bool)
        return session.mask(LABEL, extent)

    def _slice_mask(self, axis: int, index: int) -> MaskArray:
        return self._read(slab(self.shape, axis, index, index + 1)).squeeze(axis)

    def _acquired(self) -> int:
        """The axis of the slices that a click is on: where they are thick, else the first."""
        volume = self._work().volume
        spacing = volume.spacing_mm or (1.0, 1.0, 1.0)
        axis = int(np.argmax(spacing))
        rest = max(step for a, step in enumerate(spacing) if a != axis)
        return axis if volume.is_volume and spacing[axis] > _THICK * rest else 0

    def _flat_axes(self, sides: Extent) -> list[int]:
        flat = [axis for axis, (first, end) in enumerate(sides) if end - first == 1]
        return flat if self.shape[0] > 1 else [0]


def _decided(work: SliceWork, mark: Mark, view: PlaneView, wish: Wish) -> tuple[SliceFound, Wish]:
    """A slice's mask after a mark, and what the user has then said of it."""
    rows, columns = (axis for axis in range(3) if axis != view.axis)
    if isinstance(mark, PointMark):
        wish = wish.with_clicks((mark.place[rows], mark.place[columns], mark.is_inside))
        found = work.clicks(wish)
        return found, replace(wish, box=None) if mark.is_inside else wish
    if isinstance(mark, BoxMark) and mark.is_inside:
        (y0, y1), (x0, x1) = mark.sides[rows], mark.sides[columns]
        wish = Wish((float(x0), float(y0), float(x1), float(y1)))
        return work.box((x0, y0, x1, y1)), wish
    area = _area(mark, view, work.index)
    wish = replace(wish, box=None)
    if isinstance(mark, BoxMark):
        return work.area(area, False, is_box=True), wish
    if mark.brush == "lasso":
        return work.area(area, mark.is_inside, is_box=False), wish
    return work.stroke(area, mark.is_inside, wish), wish


def _area(mark: BoxMark | BrushMark, view: PlaneView, index: int) -> MaskArray:
    """What is marked on a slice, (H, W)."""
    (y0, y1), (x0, x1) = (side for axis, side in enumerate(mark.sides) if axis != view.axis)
    area = np.zeros(view.size, bool)
    area[y0:y1, x0:x1] = True
    if isinstance(mark, BrushMark):
        first = mark.sides[view.axis][0]
        area[y0:y1, x0:x1] = np.take(mark.voxels, index - first, view.axis)
    return area


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)
