"""What a viewer's user marks, read from the network: in voxels, inside the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from .packed import PackedHeader

VolumeShape = tuple[int, int, int]
Sides = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and the one after the last, along D, H and W."""
Brush = Literal["scribble", "lasso"]


@dataclass(frozen=True)
class PointMark:
    """A click: the voxel, and whether the object has it."""

    place: VolumeShape
    is_inside: bool


@dataclass(frozen=True)
class BoxMark:
    """A box, flat along one axis or not."""

    sides: Sides
    is_inside: bool


@dataclass(frozen=True, eq=False)
class BrushMark:
    """Voxels that were painted, or enclosed by a lasso, within `sides`."""

    brush: Brush
    voxels: npt.NDArray[np.bool_]
    sides: Sides
    is_inside: bool


@dataclass(frozen=True, eq=False)
class SeedMark:
    """A whole mask to begin with."""

    voxels: npt.NDArray[np.bool_]


Mark = PointMark | BoxMark | BrushMark


def flag(fields: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """A field that is true or false.

    Raises:
        InputError: it is neither, or missing without a default.
    """
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {_shown(value)}: expected true or false")
    return value


def read_point(fields: Mapping[str, Any], shape: VolumeShape) -> PointMark | None:
    """A click; None where it lies outside the image.

    Raises:
        InputError: a field of another form.
    """
    is_inside = flag(fields, "include_interaction")
    place = [round(value) for value in _numbers(fields.get("coordinates"), "coordinates", 3)]
    if not all(0 <= at < side for at, side in zip(place, shape, strict=True)):
        return None
    return PointMark((place[0], place[1], place[2]), is_inside)


def read_box(fields: Mapping[str, Any], shape: VolumeShape) -> BoxMark | None:
    """A box, rounded and cut to the image; None where it lies outside.

    Raises:
        InputError: a field of another form, or a box without an extent.
    """
    is_inside, sides = flag(fields, "include_interaction"), list[tuple[int, int]]()
    corners = fields.get("bbox_coords")
    if not isinstance(corners, list) or len(corners) != 3:
        raise InputError(f"bbox_coords is {_shown(corners)}: expected three pairs")
    is_outside = False
    for pair, size in zip(corners, shape, strict=True):
        low, high = _numbers(pair, "a pair of bbox_coords", 2)
        if low >= high:
            raise InputError(f"bbox_coords from {low:g} to {high:g}: expected the lower end first")
        first = round(low)
        end = max(round(high), first + 1)
        is_outside |= end <= 0 or first >= size
        sides.append((max(first, 0), min(end, size)))
    return None if is_outside else BoxMark((sides[0], sides[1], sides[2]), is_inside)


def mask_place(fields: Mapping[str, Any], header: PackedHeader, shape: VolumeShape) -> Sides:
    """Where the mask that follows lies, before it is unpacked.

    Raises:
        InputError: a mask of another size than its box or, without one, than the image, or of no
            whole numbers.
    """
    corners, sides = fields.get("interaction_bbox"), [(0, side) for side in shape]
    if corners is not None:
        if not isinstance(corners, list) or len(corners) != 3:
            raise InputError(f"interaction_bbox is {_shown(corners)}: expected three pairs")
        for axis, pair in enumerate(corners):
            low, high = _numbers(pair, "a pair of interaction_bbox", 2)
            if not (low == int(low) and high == int(high) and 0 <= low < high <= shape[axis]):
                raise InputError(
                    f"interaction_bbox from {low:g} to {high:g}: expected whole numbers within "
                    f"0–{shape[axis]}"
                )
            sides[axis] = (int(low), int(high))
    expected = tuple(end - first for first, end in sides)
    if header.shape != expected or header.dtype.kind not in "biu":
        raise InputError(
            f"a mask {header.dtype.name}{header.shape}: expected whole numbers or bool {expected}"
        )
    return sides[0], sides[1], sides[2]


def read_buffer(fields: Mapping[str, Any], shape: VolumeShape) -> None:
    """Check the buffer that the viewer fills with masks.

    Raises:
        InputError: another shape than the image's, or of no whole numbers.
    """
    sides = _numbers(fields.get("shape"), "shape", 3)
    if tuple(sides) != shape:
        raise InputError(f"a target buffer {tuple(sides)} for an image {shape}: expected the same")
    name = fields.get("dtype")
    try:
        kind = np.dtype(name).kind if isinstance(name, str) else ""
    except (TypeError, ValueError, SyntaxError):
        kind = ""
    if not kind or kind not in "biu":
        raise InputError(f"a target buffer of {_shown(name)}: expected whole numbers or bool")


def _numbers(value: Any, name: str, count: int) -> list[float]:
    if isinstance(value, list) and len(value) == count:
        numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == count and all(abs(v) < 1e15 and math.isfinite(v) for v in numbers):
            return [float(v) for v in numbers]
    raise InputError(f"{name} is {_shown(value)}: expected {count} numbers")


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
