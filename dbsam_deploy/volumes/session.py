"""A volume that is prompted again and again: what a viewer, a program or a command works on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.arrays import as_array
from ..images.volumes import Volume
from ..outputs.segmentation import CodedTerm, Segmentation, SegmentedObject
from ..prediction.predictor import Promptable
from ..prediction.segment import Progress, ignore
from .chain import propagate
from .course import Course, Direction, Starts
from .embeddings import SharedPredictor
from .frames import Plane, Space, plane_axis
from .label_map import segmentation_of
from .links import ChainEnd
from .objects import (
    Asked,
    Bound,
    Change,
    Decoded,
    Extent,
    Piece,
    SliceFindings,
    TrackedObject,
    Undo,
    around,
    half,
    slab,
)
from .places import checked_index, placed, placed_3d
from .planes import PlaneView
from .slices import PlaneDecoder, VolumeSlices
from .stop_rules import RULE, ChainRule

UNDO_BYTES = 64 * 1024 * 1024
"""What a session keeps to take changes back; the oldest goes first."""
_Step = tuple[Change, tuple[Undo, ...], int]


class VolumePredictor:
    """Objects on one volume, by prompts on its slices that are carried to the others.

    A slice is encoded once, when it is first needed or ahead of that, and any number of sessions
    share a predictor. Threads may share a session: its calls wait for each other. Prompts on a
    slice add up: points join those given before, a new box replaces the old one. Slices that the
    user prompted stay as they are when objects are carried on. Where objects overlap, the higher
    label covers the lower.

    Args:
        predictor: a model, in this process or behind a server, or what sessions share of it.
        volume: what is segmented.
        model: name of the model, in words.
        note: what the user must know of it.
        rule: how masks are carried from slice to slice, see `ChainRule`.
        encode_ahead: encode slices in a thread, outwards from the last prompted one, while no
            prompt waits.
        undo_bytes: kept to take changes back.
    """

    def __init__(
        self,
        predictor: Promptable | SharedPredictor,
        volume: Volume,
        *,
        model: str = "",
        note: str = "",
        rule: ChainRule = RULE,
        encode_ahead: bool = True,
        undo_bytes: int = UNDO_BYTES,
    ) -> None:
        self.volume, self.model, self.note, self.rule = volume, model, note, rule
        self._owns_shared = not isinstance(predictor, SharedPredictor)
        self.shared = (
            predictor if isinstance(predictor, SharedPredictor) else SharedPredictor(predictor)
        )
        self.slices = VolumeSlices(self.shared, volume)
        self._encode_ahead, self._undo_bytes = encode_ahead, undo_bytes
        self._objects: dict[int, TrackedObject] = {}
        self._history: deque[_Step] = deque()
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is done ahead; drop embeddings that no other session shares."""
        self.slices.stop_ahead()
        if self._owns_shared:
            self.shared.close()

    @property
    def objects(self) -> tuple[SegmentedObject, ...]:
        """The objects, in the order of their labels."""
        with self._lock:
            return tuple(self._objects[label].about for label in sorted(self._objects))

    def add_object(
        self,
        name: str = "",
        *,
        label: int | None = None,
        colour: tuple[int, int, int] | None = None,
        code: CodedTerm | None = None,
    ) -> int:
        """Name an object, or one that is there anew, and return its label.

        Args:
            name: by default "object" and the label.
            label: its value in the label map, from 1; by default the next that is free.
            colour: red, green, blue, 0–255.
            code: what it is in a coding scheme.

        Raises:
            InputError: a label that no label map holds.
        """
        with self._lock:
            label = max(self._objects, default=0) + 1 if label is None else label
            is_whole = isinstance(label, SupportsIndex) and not isinstance(label, bool)
            if not is_whole or not 1 <= label <= np.iinfo(np.uint16).max:
                raise InputError(f"label {label!r}: expected a whole number from 1 to 65535")
            label = int(label)
            about = SegmentedObject(label, name or f"object {label}", colour, code)
            if label in self._objects:
                self._objects[label].about = about
            else:
                self._objects[label] = TrackedObject(about)
            return label

    def prompt(
        self,
        label: int = 1,
        *,
        box: Any = None,
        points: Any = None,
        labels: Any = None,
        mask_input: Any = None,
        box_3d: Any = None,
        index: int | None = None,
        plane: Plane = "stored",
        space: Space = "voxel",
        add: bool = True,
    ) -> Change:
        """Segment an object on one slice; `propagate` carries it to the others.

        In voxels a place is two numbers, see `planes`, or three, see `frames`; in mm it is three.

        Args:
            label: the object, which need not exist.
            box: x0, y0, x1, y1 on the slice; in mm two opposite corners, six numbers.
            points: (P, 2) on the slice or (P, 3).
            labels: (P,) 1 inside, 0 outside; by default all are inside.
            mask_input: (4G, 4G) logits of an earlier answer, in addition.
            box_3d: x0, y0, z0, x1, y1, z1 instead, slices z0 … z1 - 1, or two opposite corners in
                mm. Its middle slice is segmented, and the object lies within its slices.
            index: slice of the plane, where the coordinates do not say it.
            plane: on whose slices the object is seen.
            space: of the coordinates.
            add: to what was asked on this slice before; else instead of it.

        Raises:
            InputError: no prompt, one outside the volume or on several slices, a plane or mm where
                the spacing or the place in the patient is unknown.
        """
        with self._lock:
            view, bounds = self._view(plane), None
            if box_3d is None:
                index, asked = placed(view, box, points, labels, index, space)
            elif any(given is not None for given in (box, points, labels, index, mask_input)):
                raise InputError("a 3D box stands alone: drop the other prompts, or it")
            else:
                index, asked, bounds = placed_3d(view, box_3d, space)
            if add and bounds is None and label in self._objects:
                asked = asked.after(self._objects[label].asked(view.axis, index))
            mask, iou, logits = self.slices.segment(view, index, asked, mask_input)
            if self._encode_ahead:
                self.slices.encode_ahead(view, index)
            found = (Piece.of(mask), Decoded(iou, half(logits), asked))
            return self._commit(view.axis, {label: {index: found}}, bounds=bounds)

    def set_mask(
        self, label: int, mask: Any, *, index: int | None = None, plane: Plane = "stored"
    ) -> Change:
        """Take a mask that was drawn or computed elsewhere.

        Args:
            label: the object, which need not exist.
            mask: (H, W) of a slice, which then counts as prompted, or all (D, H, W) of the object,
                whose prompts are forgotten.
            index: slice of the plane, for (H, W).
            plane: of the slice.

        Raises:
            InputError: another shape.
        """
        array = as_array("mask", mask) != 0
        with self._lock:
            view = self._view(plane)
            if index is None:
                if array.shape != self.volume.shape:
                    raise InputError(f"mask {array.shape}: expected {self.volume.shape}")
                found: SliceFindings = {z: (Piece.of(one), None) for z, one in enumerate(array)}
                return self._commit(0, {label: found}, forget=True)
            index = checked_index(view, index)
            if array.shape != view.size:
                raise InputError(f"mask {array.shape} of a slice: expected {view.size}")
            drawn: SliceFindings = {index: (Piece.of(array), Decoded(1.0, None, Asked()))}
            return self._commit(view.axis, {label: drawn})

    def propagate(
        self,
        labels: int | Sequence[int] | None = None,
        *,
        plane: Plane = "stored",
        from_slice: int | None = None,
        direction: Direction = "both",
        until: int | None = None,
        rule: ChainRule | None = None,
        progress: Progress = ignore,
    ) -> Change:
        """Carry objects from their prompted slices to the others, all in one pass.

        What an earlier call carried to slices that this one may reach is replaced. Between two
        prompted slices both chains are joined. An exception changes nothing.

        Args:
            labels: the objects; by default all with a prompt on this plane.
            plane: along whose slices.
            from_slice: start from this prompted slice alone.
            direction: towards higher slices (`up`), lower ones, or both.
            until: the last slice to go to; then a direction, or a slice to start from, is needed.
            rule: for this call.
            progress: called with slices done and slices that there still may be; what it raises
                ends the call.

        Raises:
            InputError: nothing to start from, or limits that contradict each other.
        """
        with self._lock:
            view = self._view(plane)
            course = Course.of(view, from_slice, direction, until)
            given = sorted(self._objects) if labels is None else np.atleast_1d(labels).tolist()
            chosen = [self._object(label) for label in given]
            starts = course.starts(chosen, are_named=labels is not None)
            found, ends = self._carried(course, starts, rule or self.rule, progress)
            for label, slices in found.items():
                course.keep_to(slices, self._objects[label], starts.limits[label])
            return self._commit(view.axis, found, ends=ends, is_carried=True)

    def _carried(
        self, course: Course, starts: Starts, rule: ChainRule, progress: Progress
    ) -> tuple[dict[int, SliceFindings], tuple[ChainEnd, ...]]:
        """What chains find, by object and slice; nothing is written yet."""
        view, ends = course.view, list[ChainEnd]()
        found: dict[int, SliceFindings] = {label: {} for label in starts.limits}
        for one in propagate(
            PlaneDecoder(self.slices, view),
            starts.anchors,
            view.depth,
            rule,
            bounds=starts.bounds,
            limits=starts.limits,
            steps=course.steps,
            spacing_mm=view.spacing_mm,
            intensities=view.pixels,
            progress=progress,
            ended=ends.append,
        ):
            decoded = Decoded(one.iou, half(one.logits))
            found[one.label][one.index] = (Piece.of(one.mask), decoded)
        return found, tuple(ends)

    def undo(self) -> Change:
        """Take the last change back, and return what that changed.

        Raises:
            InputError: nothing is left to take back.
        """
        with self._lock:
            if not self._history:
                raise InputError("nothing to undo: no change is kept")
            change, records, _ = self._history.pop()
            for record in reversed(records):
                if record.is_new:
                    del self._objects[record.label]
                else:
                    record.apply(self._objects[record.label])
            return replace(change, iou=float("nan"), ends=())

    def clear(self, label: int) -> Change:
        """Forget an object's prompts and voxels; it keeps its name.

        Raises:
            InputError: no such object.
        """
        with self._lock:
            extent = self._object(label).mask.extent
            slices = range(0) if extent is None else range(*extent[0])
            empty: SliceFindings = {z: (Piece.nothing(), None) for z in slices}
            return self._commit(0, {label: empty}, forget=True)

    def mask(self, label: int, extent: Extent | None = None) -> npt.NDArray[np.bool_]:
        """An object's voxels, whatever covers them.

        Args:
            label: the object.
            extent: along D, H and W; by default the whole volume.

        Raises:
            InputError: no such object.
        """
        with self._lock:
            return self._object(label).mask.read(extent or slab(self.volume.shape))

    def confidence(self, label: int, plane: Plane = "stored") -> npt.NDArray[np.float32]:
        """The decoder's own estimate of the mask's IoU on each slice; NaN where it was not asked.

        Raises:
            InputError: no such object, or a plane that the volume does not have.
        """
        with self._lock:
            return self._object(label).confidence(self._view(plane).axis, self.volume.shape)

    def segmentation(self) -> Segmentation:
        """All objects as they are now; what follows does not change it.

        Raises:
            InputError: there is no object.
        """
        with self._lock:
            if not self._objects:
                raise InputError(f"{self.volume.path}: no object yet: prompt one")
            tracked = [self._objects[label] for label in sorted(self._objects)]
            how = getattr(self.shared.predictor, "preprocessing", None)
            return segmentation_of(self.volume, tracked, how, self.model, self.note)

    def _view(self, plane: Plane) -> PlaneView:
        return self.slices.along(plane_axis(self.volume, plane))

    def _object(self, label: int) -> TrackedObject:
        if label not in self._objects:
            raise InputError(f"object {label}: no such object; there are {sorted(self._objects)}")
        return self._objects[label]

    def _commit(
        self,
        axis: int,
        found: Mapping[int, SliceFindings],
        *,
        bounds: Bound | None = None,
        ends: tuple[ChainEnd, ...] = (),
        is_carried: bool = False,
        forget: bool = False,
    ) -> Change:
        """Write masks of slices into objects, with a record that takes it back."""
        records: list[Undo] = []
        for label, slices in found.items():
            is_new = label not in self._objects
            if is_new:
                self.add_object(label=label)
            tracked = self._objects[label]
            others = [name for name, one in tracked.slices.items() if one.asked and name[0] != axis]
            pieces = {z: piece for z, (piece, _) in slices.items()}
            record = tracked.rewrite(axis, pieces, others if is_carried else ())
            tracked.decide(axis, {z: decoded for z, (_, decoded) in slices.items()}, forget=forget)
            if not is_carried:
                for index in slices:
                    tracked.bound(axis, index, bounds)
            records.append(replace(record, is_new=is_new))
        changed = [record.changed for record in records if record.changed is not None]
        ious = [one.iou for slices in found.values() for _, one in slices.values() if one]
        change = Change(
            tuple(map(int, found)),
            axis,
            tuple(sorted({z for slices in found.values() for z in slices})),
            float(np.mean(ious)) if ious else float("nan"),
            around(changed) if changed else None,
            ends,
        )
        self._remember(change, tuple(records))
        return change

    def _remember(self, change: Change, records: tuple[Undo, ...]) -> None:
        cost = sum(one.bytes_beside(self._objects[one.label].slices) for one in records)
        self._history.append((change, records, cost))
        while len(self._history) > 1 and sum(c for _, _, c in self._history) > self._undo_bytes:
            self._history.popleft()
