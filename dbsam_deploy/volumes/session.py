"""A volume that is prompted again and again: what a viewer, a program or a command works on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self, SupportsIndex, Unpack

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.arrays import as_array
from ..images.volumes import Volume
from ..outputs.segmentation import CodedTerm, Segmentation, SegmentedObject
from ..prediction.predictor import Promptable
from ..prediction.segment import Progress, ignore
from .claims import Claims
from .course import Course, Direction
from .embeddings import SharedPredictor
from .frames import Plane, Space, plane_axis
from .history import UNDO_BYTES, History
from .label_map import UNNAMED, AboutModel, segmentation_of
from .links import ChainEnd
from .logits import DISK_BYTES, RAM_BYTES
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
    slab,
)
from .places import Prompt, checked_index, gathered
from .planes import PlaneView
from .slices import VolumeSlices
from .stop_rules import RULE, ChainRule


class VolumePredictor:
    """Objects on one volume, by prompts on its slices that are carried to the others.

    A slice is encoded once, when it is first needed or ahead of that, and any number of sessions
    share a predictor. Threads may share a session: calls that change one object wait for each
    other, and what is there can be read meanwhile. Prompts on a slice add up: points join those
    given before, a new box replaces the old one. Slices that the user prompted stay as they are
    when objects are carried on. Where objects overlap, the higher label covers the lower.

    Args:
        predictor: a model, in this process or behind a server, or what sessions share of it.
        volume: what is segmented.
        about: the model, for the result.
        rule: how masks are carried from slice to slice, see `ChainRule`.
        encode_ahead: encode slices in a thread, outwards from the last prompted one, while no
            prompt waits.
        undo_bytes: kept to take changes back.
        logits_bytes: of what a segmentation's fractions are made of, in memory and in a scratch
            file; beyond that slices are decoded again for them.
    """

    def __init__(
        self,
        predictor: Promptable | SharedPredictor,
        volume: Volume,
        *,
        about: AboutModel = UNNAMED,
        rule: ChainRule = RULE,
        encode_ahead: bool = True,
        undo_bytes: int = UNDO_BYTES,
        logits_bytes: tuple[int, int] = (RAM_BYTES, DISK_BYTES),
    ) -> None:
        self.volume, self.about, self.rule = volume, about, rule
        self._owns_shared = not isinstance(predictor, SharedPredictor)
        self.shared = (
            predictor if isinstance(predictor, SharedPredictor) else SharedPredictor(predictor)
        )
        self.slices = VolumeSlices(self.shared, volume, logits_bytes)
        self._encode_ahead = encode_ahead
        self._objects: dict[int, TrackedObject] = {}
        self._history = History(undo_bytes)
        self._claims, self._lock = Claims(), threading.RLock()

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
        plane: Plane = "stored",
        space: Space = "voxel",
        add: bool = True,
        **prompt: Unpack[Prompt],
    ) -> Change:
        """Segment an object on one slice; `propagate` carries it to the others.

        Args:
            label: the object, which need not exist.
            plane: on whose slices the object is seen.
            space: of the coordinates, see `frames` and `planes`.
            add: to what was asked on this slice before; else instead of it.
            **prompt: `box`, `points` with `labels`, `mask_input` and `index`, or `box_3d`; see
                `Prompt`.

        Raises:
            InputError: no prompt, one outside the volume or on several slices, a plane or mm where
                the spacing or the place in the patient is unknown.
        """
        return self.prompt_many([(label, prompt)], plane=plane, space=space, add=add)[0]

    def prompt_many(
        self,
        prompts: Sequence[tuple[int, Prompt]],
        *,
        plane: Plane = "stored",
        space: Space = "voxel",
        add: bool = True,
    ) -> tuple[Change, ...]:
        """Segment objects on slices; each slice is asked for all of its objects together.

        Args:
            prompts: label, and what `prompt` takes; an object may be there more than once.
            plane: see `prompt`.
            space: see `prompt`.
            add: see `prompt`.

        Returns:
            One change for each object, in the order in which they are first named.

        Raises:
            InputError: see `prompt`; nothing is changed then.
        """
        with self._claims.held([label for label, _ in prompts]):
            view = self._view(plane)
            with self._lock:
                known = dict(self._objects)
            asked, bounds = gathered(view, space, prompts, known if add else None)
            found: dict[tuple[int, int], tuple[Piece, Decoded]] = {}
            for index in dict.fromkeys(index for _, index in asked):
                here = {label: one for (label, z), one in asked.items() if z == index}
                for label, mask, iou, answered in self.slices.segment(view, index, here):
                    found[label, index] = (Piece.of(mask), Decoded(iou, here[label], answered))
            if self._encode_ahead and asked:
                self.slices.encode_ahead(view, index)
            each = {label: [z for own, z in asked if own == label] for label, _ in asked}
            with self._lock:
                return tuple(
                    self._commit(view.axis, {label: {z: found[label, z] for z in own}}, bounds)
                    for label, own in each.items()
                )

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
        array = as_array("mask", mask)
        array = array if array.dtype == bool else array != 0
        with self._claims.held([label]), self._lock:
            view = self._view(plane)
            if index is None:
                if array.shape != self.volume.shape:
                    raise InputError(f"mask {array.shape}: expected {self.volume.shape}")
                found: SliceFindings = {z: (Piece.of(one), None) for z, one in enumerate(array)}
                return self._commit(0, {label: found}, forget=True)
            index = checked_index(view, index)
            if array.shape != view.size:
                raise InputError(f"mask {array.shape} of a slice: expected {view.size}")
            drawn: SliceFindings = {index: (Piece.of(array), Decoded(1.0, Asked()))}
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
        prompted slices both chains are joined. An exception changes nothing, and other objects can
        be prompted meanwhile.

        Args:
            labels: the objects; by default all with a prompt on this plane.
            plane: along whose slices.
            from_slice: start from this prompted slice alone.
            direction: towards higher slices (`up`), lower ones, or both.
            until: the last slice to go to; then a direction, or a slice to start from, is needed.
            rule: for this call.
            progress: called before each slice with slices done and all that there may be; what it
                raises ends the call, so that this is how to cancel it.

        Raises:
            InputError: nothing to start from, or limits that contradict each other.
        """
        view = self._view(plane)
        course = Course.of(view, from_slice, direction, until)
        with self._lock:
            given = sorted(self._objects) if labels is None else np.atleast_1d(labels).tolist()
        with self._claims.held(given):
            with self._lock:
                chosen = [self._object(label) for label in given]
                starts = course.starts(chosen, are_named=labels is not None)
            found, ends = course.followed(self.slices, starts, rule or self.rule, progress)
            with self._lock:
                for label, slices in found.items():
                    course.keep_to(slices, self._objects[label], starts.limits[label])
                return self._commit(view.axis, found, ends=ends, is_carried=True)

    def undo(self) -> Change:
        """Take the last change back, and return what that changed.

        Raises:
            InputError: nothing is left to take back.
        """
        with self._claims.held(None), self._lock:
            change, records = self._history.pop()
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
        with self._claims.held([label]), self._lock:
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
            return segmentation_of(self.volume, tracked, how, self.slices.logits, self.about)

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
        bounds: Mapping[tuple[int, int], Bound] = MappingProxyType({}),
        *,
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
                    tracked.bound(axis, index, bounds.get((label, index)))
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
        self._history.add(change, records, self._objects)
        return change
