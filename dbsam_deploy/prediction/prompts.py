"""What is asked of a model, checked against the image or volume it is asked of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..core.contract import MAX_PROMPTS
from ..core.errors import InputError
from ..core.imaging import check_boxes, check_points
from ..core.prompts import DecoderPrompts, PromptArrays
from ..images.volumes import Volume


@dataclass(frozen=True, eq=False)
class Prompts:
    """N prompts; see `check_prompts` for what goes together. Coordinates are in the image frame.

    Attributes:
        boxes: (N, 4) x0, y0, x1, y1.
        boxes_3d: (N, 6) x0, y0, z0, x1, y1, z1, covering slices z0 … z1 - 1.
        point_coords: (N, P, 2) x, y.
        point_labels: (N, P) 1 inside, 0 outside, -1 no point.
        mask_input: (N, 4G, 4G) float logits of an earlier answer.
        slice_index: the slice that all but 3D boxes refer to; None for a 2D image.
        multimask: predict three alternatives for each prompt.
        adapt_points: see `Predictor.predict_prompts`.
    """

    boxes: npt.NDArray[Any] | None = None
    boxes_3d: npt.NDArray[Any] | None = None
    point_coords: npt.NDArray[Any] | None = None
    point_labels: npt.NDArray[Any] | None = None
    mask_input: npt.NDArray[Any] | None = None
    slice_index: int | None = None
    multimask: bool = False
    adapt_points: bool = True

    def __len__(self) -> int:
        """N."""
        for array in (self.boxes_3d, self.boxes, self.point_coords):
            if array is not None:
                return len(array)
        return 0

    @property
    def arrays(self) -> PromptArrays:
        """What is asked of one slice."""
        return PromptArrays(
            boxes=self.boxes,
            point_coords=self.point_coords,
            point_labels=self.point_labels,
            mask_input=self.mask_input,
        )

    @property
    def asked(self) -> DecoderPrompts:
        """The same as a predictor takes it."""
        return DecoderPrompts(
            **self.arrays, multimask=self.multimask, adapt_points=self.adapt_points
        )

    @property
    def given(self) -> bool:
        """Whether anything is asked; an empty array of boxes is, and `check_prompts` refuses it."""
        return any(array is not None for array in (self.boxes_3d, *self.arrays.values()))

    @property
    def has_adapted_points(self) -> bool:
        """Whether boxes may be tried for points."""
        return self.point_coords is not None and self.adapt_points

    @property
    def names(self) -> list[str]:
        """Each prompt in words."""
        if self.boxes_3d is not None:
            return ["box3d " + _numbers(box) for box in self.boxes_3d]
        words: list[list[str]] = [[] for _ in range(len(self))]
        if self.boxes is not None:
            for index, box in enumerate(self.boxes):
                words[index].append("box " + _numbers(box))
        for index, points in enumerate(self.points()):
            words[index].append("points " + " ".join(f"{s}({x:g}, {y:g})" for x, y, s in points))
        return [" ".join(parts) for parts in words]

    def points(self) -> list[list[tuple[float, float, str]]]:
        """Of each prompt the points that count: x, y and `+` inside or `-` outside."""
        if self.point_coords is None or self.point_labels is None:
            return []
        return [
            [(float(x), float(y), "+" if label == 1 else "-") for (x, y), label in pairs]
            for pairs in (
                [pair for pair in zip(coords, labels, strict=True) if pair[1] >= 0]
                for coords, labels in zip(self.point_coords, self.point_labels, strict=True)
            )
        ]

    def part(self, start: int, stop: int) -> Prompts:
        """Prompts `start` to `stop - 1` of a slice."""

        def cut(array: Any) -> npt.NDArray[Any] | None:
            return None if array is None else array[start:stop]

        arrays: dict[str, Any] = {name: cut(array) for name, array in self.arrays.items()}
        return replace(self, **arrays)


def _numbers(values: npt.NDArray[Any]) -> str:
    return " ".join(f"{value:g}" for value in values)


def check_prompts(prompts: Prompts, volume: Volume) -> Prompts:
    """Return `prompts` with slice 0 filled in for a 2D image, if they fit `volume`.

    Raises:
        InputError: no prompt, a combination that has no meaning, or a prompt outside the volume.
    """
    flat = prompts.point_coords is not None or prompts.boxes is not None
    if not flat and prompts.boxes_3d is None:
        if prompts.mask_input is not None:
            raise InputError("an earlier mask alone is no prompt: give its box or points with it")
        raise InputError(f"no prompt for {volume.path}: give a box, points or a 3D box")
    if flat and prompts.boxes_3d is not None:
        raise InputError("a 3D box stands alone: drop the box and the points, or the 3D box")
    if prompts.boxes_3d is not None:
        if prompts.multimask or prompts.slice_index is not None or prompts.mask_input is not None:
            raise InputError(
                "multimask, a slice and an earlier mask go with boxes and points, not with 3D boxes"
            )
        _check_boxes_3d(prompts.boxes_3d, volume)
        return prompts
    size = volume.shape[1:]
    if prompts.boxes is not None:
        for start in range(0, max(1, len(prompts.boxes)), MAX_PROMPTS):
            check_boxes(prompts.boxes[start : start + MAX_PROMPTS], size)
    _check_point_sets(prompts, size)
    if prompts.mask_input is not None and len(prompts.mask_input) != len(prompts):
        raise InputError(
            f"{len(prompts.mask_input)} earlier masks for {len(prompts)} prompts: expected one each"
        )
    return replace(prompts, slice_index=_slice_index(prompts.slice_index, volume))


def _check_point_sets(prompts: Prompts, size: tuple[int, int]) -> None:
    coords, labels, boxes = prompts.point_coords, prompts.point_labels, prompts.boxes
    if (coords is None) != (labels is None):
        raise InputError("points and their labels go together: one is missing")
    if coords is None or labels is None:
        return
    if boxes is not None and len(boxes) != len(coords):
        raise InputError(
            f"{len(coords)} point prompts and {len(boxes)} boxes: points combine with one box each"
        )
    for start in range(0, max(1, len(coords)), MAX_PROMPTS):
        part = slice(start, start + MAX_PROMPTS)
        _, used = check_points(coords[part], labels[part], size)
        if boxes is None and (empty := np.flatnonzero((used < 0).all(1))).size:
            raise InputError(
                f"all points of prompt {start + empty[0]} have label -1 (no point) and it has no "
                "box: give it one point with label 1 or 0 at least"
            )


def _slice_index(index: int | None, volume: Volume) -> int:
    depth = volume.shape[0]
    if index is not None and (not isinstance(index, SupportsIndex) or isinstance(index, bool)):
        raise InputError(f"slice {index!r}: expected a whole number, 0–{depth - 1}")
    if index is None and volume.is_volume:
        raise InputError(
            f"{volume.path} has {depth} slices: say which one (--slice, slice_index=), or give a "
            "3D box"
        )
    if index is not None and not 0 <= index < depth:
        raise InputError(f"slice {index}: {volume.path} has slices 0–{depth - 1}")
    return index or 0


def _check_boxes_3d(boxes: npt.NDArray[Any], volume: Volume) -> None:
    depth, height, width = volume.shape
    if not volume.is_volume:
        raise InputError(f"{volume.path} is a 2D image: give a box instead of a 3D box")
    if boxes.ndim != 2 or boxes.shape[1] != 6 or len(boxes) == 0 or boxes.dtype.kind not in "fiu":
        raise InputError(f"3D boxes of shape {boxes.shape}: expected (n, 6) numbers, at least one")
    for index, (z0, z1) in enumerate(boxes[:, [2, 5]].astype(np.float64)):
        whole = np.isfinite([z0, z1]).all() and z0 == int(z0) and z1 == int(z1)
        if not whole or not 0 <= z0 < z1 <= depth:
            raise InputError(
                f"3D box {index} covers z {z0:g} to {z1:g}: expected whole numbers with "
                f"0 <= z0 < z1 <= {depth} (slices z0 to z1 - 1)"
            )
    for start in range(0, len(boxes), MAX_PROMPTS):
        check_boxes(boxes[start : start + MAX_PROMPTS, [0, 1, 3, 4]], (height, width))
