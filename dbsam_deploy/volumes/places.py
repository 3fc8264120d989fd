"""What a user points at, in voxels or millimetres → one slice of a plane and prompts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, TypedDict

import numpy as np
import numpy.typing as npt

from ..core.contract import MASK_INPUT
from ..core.errors import InputError
from ..core.imaging import check_boxes, check_points
from ..images.arrays import as_array
from .frames import Space, to_voxels
from .objects import Asked, Bound, TrackedObject
from .planes import PlaneView


class Prompt(TypedDict, total=False):
    """What is asked of one object on one slice; in voxels two numbers are a place, or three.

    Attributes:
        box: x0, y0, x1, y1 on the slice; in mm two opposite corners, six numbers.
        points: (P, 2) on the slice or (P, 3).
        labels: (P,) 1 inside, 0 outside; by default all are inside.
        mask_input: (4G, 4G) logits of an earlier answer, in addition.
        box_3d: x0, y0, z0, x1, y1, z1 instead, slices z0 … z1 - 1, or two opposite corners in mm.
            Its middle slice is segmented, and the object lies within its slices.
        index: slice of the plane, where the coordinates do not say it.
    """

    box: Any
    points: Any
    labels: Any
    mask_input: Any
    box_3d: Any
    index: int | None


def gathered(
    view: PlaneView,
    space: Space,
    prompts: Sequence[tuple[int, Prompt]],
    known: Mapping[int, TrackedObject] | None,
) -> tuple[dict[tuple[int, int], Asked], dict[tuple[int, int], Bound]]:
    """Label and slice → all that is asked there, and what a 3D box says beside.

    Args:
        view: the plane.
        space: of the coordinates.
        prompts: label and prompt; errors are those of `prompted`.
        known: label → object, to whose prompts on a slice these are added; None to replace them.
    """
    asked: dict[tuple[int, int], Asked] = {}
    bounds: dict[tuple[int, int], Bound] = {}
    for label, prompt in prompts:
        index, one, bound = prompted(view, space, prompt)
        if bound is not None:
            bounds[label, index] = bound
        elif known is not None:
            before = known[label].asked(view.axis, index) if label in known else None
            one = one.after(asked.get((label, index), before))
        asked[label, index] = one
    return asked, bounds


def prompted(view: PlaneView, space: Space, prompt: Prompt) -> tuple[int, Asked, Bound | None]:
    """The slice that a prompt is on, the prompt in its voxels, and what a 3D box says beside.

    Raises:
        InputError: see `placed` and `placed_3d`; a 3D box with something else.
    """
    given = {name: value for name, value in prompt.items() if value is not None}
    box_3d = given.pop("box_3d", None)
    if box_3d is not None:
        if given:
            raise InputError("a 3D box stands alone: drop the other prompts, or it")
        return placed_3d(view, box_3d, space)
    box, points, labels = (given.pop(name, None) for name in ("box", "points", "labels"))
    earlier, said = given.pop(MASK_INPUT, None), prompt.get("index")
    if unknown := given.keys() - {"index"}:
        expected = ", ".join(Prompt.__annotations__)
        raise InputError(f"prompt {min(unknown)!r}: expected {expected}")
    index, asked = placed(view, box, points, labels, said, space)
    if earlier is not None:
        logits = as_array(MASK_INPUT, earlier)
        asked = replace(asked, mask_input=logits[None] if logits.ndim == 2 else logits)
    return index, asked, None


def placed(
    view: PlaneView, box: Any, points: Any, labels: Any, index: int | None, space: Space
) -> tuple[int, Asked]:
    """The slice that prompts are on, and the prompts in its voxels.

    Args:
        view: the plane.
        box: (4,) on the slice, or in mm two opposite corners, (6,).
        points: (P, 2) on the slice or (P, 3).
        labels: (P,) 1 inside, 0 outside; None for all inside.
        index: slice of the plane, where the coordinates do not say it.
        space: of the coordinates.

    Raises:
        InputError: nothing asked, or something outside the volume, on several slices, or of another
            shape.
    """
    if box is None and points is None:
        raise InputError("no prompt: give a box, points or a 3D box")
    if points is None and labels is not None:
        raise InputError("labels go with points: give them, or drop the labels")
    said: list[npt.NDArray[np.float64]] = []
    corners = None if box is None else _numbers("box", box, 4 if space == "voxel" else 6)
    if corners is not None and space != "voxel":
        places = to_voxels(corners.reshape(2, 3), view.volume, space)
        said.append(places)
        flat = _in_plane(view, places)
        corners = np.concatenate([flat.min(0), flat.max(0)])
    coords = None if points is None else _points(points, space)
    if coords is not None and coords.shape[1] == 3:
        places = to_voxels(coords, view.volume, space)
        said.append(places)
        coords = _in_plane(view, places)
    found = _slice_of(view, np.concatenate(said), index) if said else checked_index(view, index)
    boxes = None if corners is None else check_boxes(corners[None], view.size).astype(np.float64)
    if coords is None:
        return found, Asked(boxes)
    marks = np.ones(len(coords), np.int32) if labels is None else as_array("labels", labels)
    kept, marks = check_points(coords[None], marks[None], view.size)
    return found, Asked(boxes, kept.astype(np.float64), marks)


def placed_3d(view: PlaneView, box: Any, space: Space) -> tuple[int, Asked, Bound]:
    """The middle slice of a 3D box with its 2D box, and what the box says of its slices.

    Raises:
        InputError: not six numbers, an empty box, or one that reaches outside the volume.
    """
    places = to_voxels(_numbers("3D box", box, 6).reshape(2, 3), view.volume, space)
    if space != "voxel":
        places = np.stack([places.min(0), places.max(0)])
    along = places[:, 2 - view.axis]
    first, end = int(np.floor(along[0])), int(np.ceil(along[1]))
    if not 0 <= first < end <= view.depth:
        raise InputError(
            f"3D box from {along[0]:g} to {along[1]:g} across its slices: expected the first below "
            f"the last, within 0–{view.depth}"
        )
    corners = check_boxes(_in_plane(view, places).reshape(1, 4), view.size)
    bound = Bound(first, end, tuple(corners[0].tolist()))
    return (first + end - 1) // 2, Asked(corners.astype(np.float64)), bound


def _numbers(name: str, value: Any, count: int) -> npt.NDArray[np.float64]:
    array = as_array(name, value)
    if array.shape == (1, count):
        array = array[0]
    if array.shape != (count,) or array.dtype.kind not in "fiu":
        raise InputError(f"{name} {array.dtype}{array.shape}: expected {count} numbers")
    return array.astype(np.float64)


def _points(value: Any, space: Space) -> npt.NDArray[np.float64]:
    array = as_array("points", value)
    array = array[None] if array.ndim == 1 else array
    axes = (2, 3) if space == "voxel" else (3,)
    if array.ndim != 2 or array.shape[1] not in axes or array.dtype.kind not in "fiu":
        wanted = " or ".join(f"(P, {count})" for count in axes)
        raise InputError(f"points {array.dtype}{array.shape}: expected {wanted} numbers")
    return array.astype(np.float64)


def _in_plane(view: PlaneView, places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(M, 2) along columns and rows of the slices, of (M, 3) voxel coordinates x, y, z."""
    rows, columns = (axis for axis in range(3) if axis != view.axis)
    return places[:, [2 - columns, 2 - rows]]


def _slice_of(view: PlaneView, places: npt.NDArray[np.float64], index: int | None) -> int:
    """The one slice that all places are on."""
    along = places[:, 2 - view.axis]
    if not ((along >= 0) & (along <= view.depth)).all():
        raise InputError(
            f"a place is {along.min():g} to {along.max():g} slices from the first one's edge: "
            f"expected 0–{view.depth}, it lies outside the volume"
        )
    slices = np.unique(np.minimum(np.floor(along), view.depth - 1)).astype(int).tolist()
    if len(slices) > 1:
        raise InputError(
            f"places on slices {', '.join(map(str, slices))} of the plane: expected one slice a "
            "prompt, or a 3D box"
        )
    if index is not None and index != slices[0]:
        raise InputError(f"slice {index}, but the coordinates lie on slice {slices[0]}")
    return int(slices[0])


def checked_index(view: PlaneView, index: Any) -> int:
    """A slice of the plane; None is that of a single image.

    Raises:
        InputError: no whole number, or no such slice.
    """
    if index is None and view.depth == 1:
        return 0
    if not isinstance(index, SupportsIndex) or isinstance(index, bool):
        raise InputError(f"slice {index!r}: expected a whole number, 0–{view.depth - 1}")
    if not 0 <= int(index) < view.depth:
        raise InputError(f"slice {index}: {view.volume.path} has 0–{view.depth - 1} on this plane")
    return int(index)
