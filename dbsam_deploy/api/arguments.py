"""What `Model`'s calls take: SAM's names beside our own, and anything that is an array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ..core.contract import MASK_INPUT, POINT_COORDS, POINT_LABELS
from ..core.errors import InputError
from ..images.arrays import as_array
from ..images.volumes import Volume
from ..prediction.prompts import Prompts


class SamNames(TypedDict, total=False):
    """What `segment_anything.SamPredictor.predict` calls the prompts of `Model.predict`."""

    box: Any
    """`boxes`."""
    point_coords: Any
    """`points`."""
    point_labels: Any
    """`labels`."""
    multimask_output: bool | None
    """`multimask`."""


def renamed(sam: Mapping[str, Any], boxes: Any, points: Any, labels: Any) -> tuple[Any, Any, Any]:
    """`boxes`, `points` and `labels`, which may have come under SAM's names.

    Raises:
        TypeError: as Python does, for a keyword that is none of `SamNames`.
        InputError: one of them under both names.
    """
    if unknown := sorted(sam.keys() - SamNames.__annotations__.keys()):
        raise TypeError(f"predict() got an unexpected keyword argument {unknown[0]!r}")
    return (
        _one_of("boxes", boxes, "box", sam.get("box")),
        _one_of("points", points, POINT_COORDS, sam.get(POINT_COORDS)),
        _one_of("labels", labels, POINT_LABELS, sam.get(POINT_LABELS)),
    )


def _one_of(name: str, value: Any, sam_name: str, sam_value: Any) -> Any:
    if value is not None and sam_value is not None:
        raise InputError(f"{name} and {sam_name} are the same: give one of them")
    return sam_value if value is None else value


def prompts_of(boxes: Any, points: Any, labels: Any, mask_input: Any, boxes_3d: Any) -> Prompts:
    """Prompts of arrays, or of what NumPy makes arrays of, with the axes that may be left out."""
    coords = _array("points", points, 3)
    if coords is not None and labels is None:
        labels = np.ones(coords.shape[:2], np.int64)
    return Prompts(
        boxes=_array("boxes", boxes, 2),
        boxes_3d=_array("boxes_3d", boxes_3d, 2),
        point_coords=coords,
        point_labels=_array("labels", labels, 2),
        mask_input=_array(MASK_INPUT, mask_input, 3),
    )


def own_boxes(prompts: Prompts, volume: Volume) -> Prompts:
    """`prompts` with the boxes that the image's own file holds, if there are any."""
    if volume.boxes is None:
        return prompts
    if volume.boxes.shape[1] == 6:
        return replace(prompts, boxes_3d=volume.boxes)
    return replace(prompts, boxes=volume.boxes)


def _array(name: str, value: Any, axes: int) -> npt.NDArray[Any] | None:
    """A copy of `value` as an array of `axes` axes; one more may be missing in front.

    Raises:
        InputError: not numbers of one of these shapes.
    """
    if value is None:
        return None
    array = np.array(as_array(name, value))
    if array.dtype.kind not in "fiu" or array.ndim not in (axes - 1, axes):
        raise InputError(
            f"{name} {array.dtype}{array.shape}: expected numbers of {axes - 1} or {axes} axes"
        )
    return array[None] if array.ndim == axes - 1 else array
