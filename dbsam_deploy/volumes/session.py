"""A volume that is prompted again and again: what a viewer, a program or a command works on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray, is_constant, upscale_logits
from ..core.masks import Prediction
from ..images.volumes import Volume, label_dtype
from ..outputs.segmentation import CodedTerm, Fractions, SegmentedObject, Segmentation
from ..prediction.predictor import Promptable
from ..prediction.segment import Progress, prompts_at_once
from .chain import Anchor, ChainEnd, ChainRule, propagate
from .embeddings import Ahead, ImageKey, SharedPredictor, image_key
from .frames import Plane, Space, plane_axis
from .objects import Asked, Change, Decoded, Extent, Piece, TrackedObject, Undo, around, half
from .places import placed, placed_3d
from .planes import PlaneView, view_along

UNDO_BYTES = 64 * 1024 * 1024
"""What a session keeps to take changes back; the oldest goes first."""
Direction = Literal["both", "up", "down"]


def _silent(done: int, total: int) -> None:
    """Default `Progress`: says nothing."""


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
        rule: ChainRule = ChainRule(),  # noqa: B008 - frozen
        encode_ahead: bool = True,
        undo_bytes: int = UNDO_BYTES,
    ) -> None:
        self.volume, self.model, self.note, self.rule = volume, model, note, rule
        self._owns_shared = not isinstance(predictor, SharedPredictor)
        self.shared = (
            predictor if isinstance(predictor, SharedPredictor) else SharedPredictor(predictor)
        )
        self._encode_ahead, self._undo_bytes = encode_ahead, undo_bytes
        self._objects: dict[int, TrackedObject] = {}
        self._history: deque[tuple[Change, tuple[Undo, ...], int]] = deque()
        self._keys: dict[tuple[int, int], ImageKey | None] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is done ahead; drop embeddings that no other session shares."""
        self.shared.stop_ahead(self)
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
            if not isinstance(label, int) or not 1 <= label <= np.iinfo(np.uint16).max:
                raise InputError(f"label {label!r}: expected a whole number from 1 to 65535")
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

        In voxels a place on a slice is two numbers, see `planes`, or three, see `frames`; in
        millimetres it is three, which say the slice, too.

        Args:
            label: the object, which need not exist.
            box: x0, y0, x1, y1 on the slice; in mm two opposite corners, six numbers.
            points: (P, 2) on the slice or (P, 3).
            labels: (P,) 1 inside, 0 outside; by default all are inside.
            mask_input: (4G, 4G) logits of an earlier answer, in addition.
            box_3d: x0, y0, z0, x1, y1, z1 instead, slices z0 … z1 - 1, or two opposite corners in
                mm, with sides along the voxel axes. Its middle slice is segmented, and the object
                lies within its slices.
            index: slice of the plane, where the coordinates do not say it.
            plane: on whose slices the object is seen.
            space: of the coordinates.
            add: to what was asked on this slice before; else instead of it.

        Raises:
            InputError: no prompt, one outside the volume or on several slices, a plane or mm of a
                volume whose spacing or place in the patient is unknown.
        """
        with self._lock:
            view = self._view(plane)
            bounds: dict[int, tuple[int, int]] = {}
            if box_3d is not None:
                if any(given is not None for given in (box, points, labels, index, mask_input)):
                    raise InputError("a 3D box stands alone: drop the other prompts, or it")
                index, asked, ends = placed_3d(view, box_3d, space)
                bounds, add = {view.axis: ends}, False
            else:
                index, asked = placed(view, box, points, labels, index, space)
            tracked = self._objects.get(label)
            before = None if tracked is None else tracked.slices.get((view.axis, index))
            if add and before is not None:
                asked = asked.after(before.asked)
            mask, iou, logits = self._segment(view, index, asked, mask_input)
            self._ahead_of(view, index)
            found = {index: (Piece.of(mask), Decoded(iou, half(logits), asked))}
            return self._commit(view.axis, {label: found}, {label: bounds})

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
        array = np.asarray(mask) != 0
        with self._lock:
            view = self._view(plane)
            if index is None:
                if array.shape != self.volume.shape:
                    raise InputError(f"mask {array.shape}: expected {self.volume.shape}")
                found = {z: (Piece.of(one), None) for z, one in enumerate(array)}
                return self._commit(0, {label: found}, forget=True)
            if array.shape != view.size or not 0 <= index < view.depth:
                raise InputError(
                    f"mask {array.shape} on slice {index}: expected {view.size} on one of "
                    f"0–{view.depth - 1}"
                )
            drawn = {index: (Piece.of(array), Decoded(1.0, None, Asked()))}
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
        progress: Progress = _silent,
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
            progress: called with slices done and slices that there still may be.

        Raises:
            InputError: nothing to start from, or limits that contradict each other.
        """
        with self._lock:
            view = self._view(plane)
            start = _Start(view, from_slice, direction, until)
            chosen = self._chosen(labels, view)
            anchors: list[Anchor] = []
            limits: dict[int, tuple[int, int]] = {}
            for label in chosen:
                own = self._anchors(label, view, from_slice)
                anchors += own
                limits[label] = start.limits([a.index for a in own], self._walls(label, view, own))
            ends: list[ChainEnd] = []
            known = {
                label: bounds
                for label in chosen
                if (bounds := self._objects[label].bounds.get(view.axis)) is not None
            }
            found: dict[int, dict[int, tuple[Piece, Decoded | None]]] = {l: {} for l in chosen}
            for one in propagate(
                _PlaneDecoder(self, view),
                anchors,
                view.depth,
                rule or self.rule,
                bounds=known,
                limits=limits,
                spacing_mm=view.spacing_mm,
                intensities=view.pixels,
                progress=progress,
                ended=ends.append,
            ):
                decoded = Decoded(one.iou, half(one.logits))
                found[one.label][one.index] = (Piece.of(one.mask), decoded)
            for label, pieces in found.items():
                self._leave_prompted(label, view.axis, pieces, limits[label])
            return self._commit(view.axis, found, ends=tuple(ends))
