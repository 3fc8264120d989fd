"""What a session knows of its objects: voxels, prompts, and how to take a change back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.contract import BOXES, MASK_INPUT, POINT_COORDS, POINT_LABELS
from ..core.imaging import FloatArray
from ..core.masks import extent_of
from ..outputs.segmentation import SegmentedObject
from .links import Anchor, ChainEnd
from .logits import Answered

Extent = tuple[tuple[int, int], ...]
"""First index and the one after the last along D, H and W."""
SliceName = tuple[int, int]
"""Axis of (D, H, W), and slice along it."""
_Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a user asked on one slice; nothing of it where the mask was drawn.

    Attributes:
        box: (1, 4) float x0, y0, x1, y1 in the slice's voxels.
        points: (1, P, 2).
        labels: (1, P) 1 inside, 0 outside.
        mask_input: (1, 4G, 4G) logits of an earlier answer.
    """

    box: npt.NDArray[np.float64] | None = None
    points: npt.NDArray[np.float64] | None = None
    labels: npt.NDArray[np.int32] | None = None
    mask_input: npt.NDArray[Any] | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether a mask was given instead of prompts."""
        return self.box is None and self.points is None

    @property
    def is_vague(self) -> bool:
        """Whether it is a single point, which may mean several things."""
        alone = self.box is None and self.mask_input is None
        return alone and self.points is not None and self.points.shape[1] == 1

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As `PromptArrays`, without what is not there."""
        names = (BOXES, POINT_COORDS, POINT_LABELS, MASK_INPUT)
        given = (self.box, self.points, self.labels, self.mask_input)
        return {n: array for n, array in zip(names, given, strict=True) if array is not None}

    @property
    def form(self) -> tuple[object, ...]:
        """Objects whose prompts are of one form can be asked for in one call."""
        return tuple((name, array.shape) for name, array in self.arrays.items())

    def after(self, earlier: Asked | None) -> Asked:
        """These prompts with those given on the slice before: a new box replaces the old one."""
        if earlier is None:
            return self
        box = earlier.box if self.box is None else self.box
        if self.points is None or earlier.points is None:
            given = earlier if self.points is None else self
            return replace(self, box=box, points=given.points, labels=given.labels)
        marks = [one.labels for one in (earlier, self) if one.labels is not None]
        points = np.concatenate([earlier.points, self.points], axis=1)
        return replace(self, box=box, points=points, labels=np.concatenate(marks, axis=1))


def stacked(asked: Sequence[Asked]) -> dict[str, npt.NDArray[Any]]:
    """Prompts of one form as those of N objects."""
    arrays = [one.arrays for one in asked]
    return {name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]}


@dataclass(frozen=True, eq=False)
class Decoded:
    """An object on one slice.

    Attributes:
        iou: the decoder's own estimate of the mask's IoU; 1 for a mask that was drawn.
        asked: the user's prompts; None where a chain came here.
        answered: where its logits are, if the decoder gave them.
    """

    iou: float
    asked: Asked | None = None
    answered: Answered | None = None


class Piece(NamedTuple):
    """A mask on one slice, cut to its extent; `start` is its first row and column."""

    mask: _Bits
    start: tuple[int, int]

    @classmethod
    def nothing(cls) -> Piece:
        """An empty mask."""
        return cls(np.zeros((0, 0), bool), (0, 0))

    @classmethod
    def of(cls, mask: npt.NDArray[np.generic]) -> Piece:
        """The part of an (H, W) mask that is not 0."""
        extent = extent_of(mask)
        if extent is None:
            return cls.nothing()
        (top, bottom), (left, right) = extent
        return cls(mask[top:bottom, left:right] != 0, (top, left))


SliceFindings = dict[int, tuple[Piece, Decoded | None]]
"""Slice along an axis → the object's mask there, and what was decided; None for nothing."""


@dataclass(frozen=True)
class Change:
    """What a call changed.

    Attributes:
        labels: the objects.
        axis: of (D, H, W), along which slices are counted.
        slices: the slices that were decided, in order.
        iou: mean of the decoder's own estimates on them; NaN where it was not asked.
        changed: extent along D, H and W in which voxels differ; None where none do.
        ends: where each chain of a propagation ended, and why.
    """

    labels: tuple[int, ...]
    axis: int = 0
    slices: tuple[int, ...] = ()
    iou: float = float("nan")
    changed: Extent | None = None
    ends: tuple[ChainEnd, ...] = ()


class ObjectMask:
    """One object's voxels among (D, H, W); memory goes with its extent."""

    def __init__(self) -> None:
        self._start: tuple[int, ...] = (0, 0, 0)
        self._bits: _Bits = np.zeros((0, 0, 0), bool)

    @property
    def extent(self) -> Extent | None:
        """Where voxels may be set; None before the first."""
        return _extent(self._start, self._bits.shape) if self._bits.size else None

    def copy(self) -> ObjectMask:
        """One that further writing does not change."""
        other = ObjectMask()
        other._start, other._bits = self._start, self._bits.copy()
        return other

    def read(self, extent: Extent) -> _Bits:
        """A copy of the voxels within an extent."""
        out = np.zeros([end - first for first, end in extent], bool)
        both = [
            (max(first, start), min(end, start + side))
            for (first, end), start, side in zip(extent, self._start, self._bits.shape, strict=True)
        ]
        if all(first < end for first, end in both):
            source = self._bits[_within(both, self._start)]
            out[_within(both, [first for first, _ in extent])] = source
        return out

    def write(self, extent: Extent, values: _Bits) -> None:
        """Replace the voxels within an extent."""
        old = self.extent
        if old is None:
            self._start, self._bits = tuple(e[0] for e in extent), values.copy()
            return
        whole = around([old, extent])
        if whole != old:
            grown = self.read(whole)
            self._start, self._bits = tuple(e[0] for e in whole), grown
        self._bits[_within(extent, self._start)] = values


class Bound(NamedTuple):
    """A 3D box along an axis: its first slice, the one after its last, and its 2D box on them."""

    first: int
    end: int
    box: tuple[float, ...]


@dataclass(eq=False)
class TrackedObject:
    """An object of a session; the mappings are replaced, never written to.

    Attributes:
        about: label, name, colour and code.
        mask: its voxels.
        slices: what was decided on which slice.
        bounds: axis → slices along it that hold the object, where a 3D box says so.
    """

    about: SegmentedObject
    mask: ObjectMask = field(default_factory=ObjectMask)
    slices: Mapping[SliceName, Decoded] = field(default_factory=dict)
    bounds: Mapping[int, Bound] = field(default_factory=dict)

    def anchors(self, axis: int) -> list[int]:
        """Slices along an axis on which the user said what there is."""
        named = self.slices.items()
        return sorted(z for (a, z), one in named if a == axis and one.asked is not None)

    def asked(self, axis: int, index: int) -> Asked | None:
        """What the user asked on a slice."""
        decoded = self.slices.get((axis, index))
        return None if decoded is None else decoded.asked

    def anchor(self, axis: int, index: int, shape: tuple[int, int, int]) -> Anchor | None:
        """A slice that a chain starts from; None where there is nothing on it."""
        mask, decoded = self.slice_mask((axis, index), shape), self.slices[axis, index]
        if not mask.any():
            return None
        bound = self.bounds.get(axis)
        within = None if bound is None else np.array(bound.box, np.float32)
        asked, prompt = decoded.asked, None
        if asked is not None and asked.box is not None and asked.points is None:
            prompt = np.asarray(asked.box[0], np.float32)
        return Anchor(self.about.label, index, mask, decoded.iou, within=within, prompt=prompt)

    def confidence(self, axis: int, shape: tuple[int, int, int]) -> FloatArray:
        """The decoder's own estimates on the slices along an axis; NaN where it was not asked."""
        out = np.full(shape[axis], np.nan, np.float32)
        for (own, index), decoded in self.slices.items():
            if own == axis and not (decoded.asked is not None and decoded.asked.is_drawn):
                out[index] = decoded.iou
        return out

    def decide(self, axis: int, found: Mapping[int, Decoded | None], *, forget: bool) -> None:
        """Note what slices along an axis came to; None for nothing. `forget` all others."""
        slices = {} if forget else dict(self.slices)
        for index, decoded in found.items():
            slices.pop((axis, index), None)
            if decoded is not None:
                slices[axis, index] = decoded
        self.slices = slices
        self.bounds = {} if forget else self.bounds

    def bound(self, axis: int, index: int, bounds: Bound | None) -> None:
        """Note the slices that a 3D box holds; a prompt outside an earlier one makes it void."""
        known = {a: b for a, b in self.bounds.items() if a != axis or b.first <= index < b.end}
        self.bounds = known if bounds is None else {**known, axis: bounds}

    def slice_mask(self, name: SliceName, shape: tuple[int, int, int]) -> _Bits:
        """(H, W) of one slice of a volume of this shape."""
        axis, index = name
        return self.mask.read(slab(shape, axis, index, index + 1)).squeeze(axis)

    def rewrite(self, axis: int, pieces: Mapping[int, Piece], kept: Sequence[SliceName]) -> Undo:
        """Replace the object on slices along an axis, except where slices `kept` cross them."""
        before_slices, before_bounds = self.slices, self.bounds
        extent = self._touched(axis, pieces)
        if extent is None:
            return Undo(self.about.label, None, b"", before_slices, before_bounds)
        old = self.mask.read(extent)
        new = old.copy()
        starts = [first for first, _ in extent]
        across = [a for a in range(3) if a != axis]
        for index, piece in pieces.items():
            if not extent[axis][0] <= index < extent[axis][1]:
                continue  # nothing is set there, before or after
            slab = np.moveaxis(new, axis, 0)[index - starts[axis]]
            slab[:] = False
            (row, column), (height, width) = piece.start, piece.mask.shape
            row, column = row - starts[across[0]], column - starts[across[1]]
            if piece.mask.size:
                slab[row : row + height, column : column + width] = piece.mask
        for other, index in kept:
            if extent[other][0] <= index < extent[other][1]:
                place = index - starts[other]
                np.moveaxis(new, other, 0)[place] = np.moveaxis(old, other, 0)[place]
        new ^= old  # what differs, in the place of what is new: a third array would be the peak
        found = extent_of(new)
        new ^= old
        if found is None:
            return Undo(self.about.label, None, b"", before_slices, before_bounds)
        changed = tuple((s + a, s + b) for s, (a, b) in zip(starts, found, strict=True))
        inner = _within(changed, starts)
        self.mask.write(changed, new[inner])
        packed = np.packbits(old[inner]).tobytes()
        return Undo(self.about.label, changed, packed, before_slices, before_bounds)

    def _touched(self, axis: int, pieces: Mapping[int, Piece]) -> Extent | None:
        """Extent of what is set on some slices, or will be."""
        extents: list[Extent] = []
        for index, piece in pieces.items():
            if piece.mask.size:
                own = list(_extent(piece.start, piece.mask.shape))
                own.insert(axis, (index, index + 1))
                extents.append(tuple(own))
        if self.mask.extent is not None and pieces:
            here = list(self.mask.extent)
            first, end = max(min(pieces), here[axis][0]), min(max(pieces) + 1, here[axis][1])
            if first < end:
                here[axis] = (first, end)
                extents.append(tuple(here))
        return around(extents) if extents else None


@dataclass(frozen=True, eq=False)
class Undo:
    """An object before a change.

    Attributes:
        label: the object.
        changed: where voxels differ; None where none do.
        before: these voxels, eight in a byte.
        slices: see `TrackedObject`.
        bounds: see `TrackedObject`.
        is_new: whether the object did not exist.
    """

    label: int
    changed: Extent | None
    before: bytes
    slices: Mapping[SliceName, Decoded]
    bounds: Mapping[int, Bound]
    is_new: bool = False

    def apply(self, tracked: TrackedObject) -> None:
        """Make the object what it was."""
        tracked.slices, tracked.bounds = self.slices, self.bounds
        if self.changed is not None:
            sides = [end - first for first, end in self.changed]
            bits = np.unpackbits(np.frombuffer(self.before, np.uint8), count=int(np.prod(sides)))
            tracked.mask.write(self.changed, bits.reshape(sides).view(bool))

    def bytes_beside(self, now: Mapping[SliceName, Decoded]) -> int:
        """What keeping this costs, beside what the object still holds."""
        gone = [one for name, one in self.slices.items() if now.get(name) is not one]
        asked = [one.asked for one in gone if one.asked is not None]
        drawn = sum(array.nbytes for one in asked for array in one.arrays.values())
        return len(self.before) + drawn


def slab(
    shape: tuple[int, int, int], axis: int = 0, first: int = 0, end: int | None = None
) -> Extent:
    """The extent of a volume's slices `first` to `end` - 1 along an axis; all by default."""
    sides = [(0, side) for side in shape]
    sides[axis] = (first, shape[axis] if end is None else end)
    return tuple(sides)


def around(extents: Sequence[Extent]) -> Extent:
    """The extent that holds all of these."""
    first = np.array(extents)[..., 0].min(0).tolist()
    end = np.array(extents)[..., 1].max(0).tolist()
    return tuple(zip(first, end, strict=True))


def _extent(start: Sequence[int], sides: Sequence[int]) -> Extent:
    return tuple((s, s + side) for s, side in zip(start, sides, strict=True))


def _within(extent: Sequence[tuple[int, int]], start: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(f - s, e - s) for (f, e), s in zip(extent, start, strict=True))
