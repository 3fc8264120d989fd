"""Prompts on an image or volume → one label map.

Each prompt has a label, its position in the order given, from 1. Where masks overlap, the later
prompt's label stands. A 3D box puts its 2D box on each of its slices; slices do not influence each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import MAX_PROMPTS
from ..core.errors import InputError
from ..core.imaging import FloatArray, check_boxes, check_points
from ..core.masks import Prediction
from ..images.volumes import Volume, label_dtype
from .predictor import Predictor

_MASK_BYTES_AT_ONCE = 256 * 1024 * 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """What the user asks for; see `check_prompts` for what goes together.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1 in the image frame.
        boxes_3d: (n, 6) x0, y0, z0, x1, y1, z1, covering slices z0 … z1 - 1.
        points: (x, y, label) of one prompt set, label 1 foreground or 0 background.
        slice_index: the slice that boxes and points refer to; None for a 2D image.
        multimask: predict three alternatives for each prompt and keep the best.
    """

    boxes: npt.NDArray[Any] | None = None
    boxes_3d: npt.NDArray[Any] | None = None
    points: tuple[tuple[float, float, float], ...] = ()
    slice_index: int | None = None
    multimask: bool = False


@dataclass(frozen=True)
class Finding:
    """One prompt's result.

    Attributes:
        label: its value in the label map.
        prompt: the prompt in words.
        pixels: pixels (voxels) of its mask, before any later prompt covered some.
        iou: predicted IoU; for a 3D box the mean over its slices.
        alternatives: with multimask, pixels and predicted IoU of all three, in the decoder's order.
    """

    label: int
    prompt: str
    pixels: int
    iou: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """Label map and findings of one volume.

    Attributes:
        labels: (D, H, W) uint8, or uint16 above 255 prompts.
        findings: one for each prompt, in label order.
        slices: indices of the slices that were segmented.
        alternatives: (3, H, W) label maps of the multimask alternatives, else None.
    """

    labels: npt.NDArray[Any]
    findings: tuple[Finding, ...]
    slices: tuple[int, ...]
    alternatives: npt.NDArray[Any] | None = None


def check_prompts(prompts: Prompts, volume: Volume) -> Prompts:
    """Return `prompts` with slice 0 filled in for a 2D image, if they fit `volume`.

    Raises:
        InputError: no prompt, a combination that has no meaning, or a prompt outside the volume.
    """
    flat = bool(prompts.points) or prompts.boxes is not None
    if not flat and prompts.boxes_3d is None:
        raise InputError(f"no prompt for {volume.path}: give --box, --point or --box3d")
    if flat and prompts.boxes_3d is not None:
        raise InputError("a 3D box stands alone: drop --box and --point, or --box3d")
    if prompts.boxes_3d is not None:
        if prompts.multimask or prompts.slice_index is not None:
            raise InputError("--multimask and --slice go with --box and --point, not with 3D boxes")
        _check_boxes_3d(prompts.boxes_3d, volume)
        return prompts
    index = _slice_index(prompts.slice_index, volume)
    if prompts.boxes is not None:
        for start in range(0, max(1, len(prompts.boxes)), MAX_PROMPTS):
            check_boxes(prompts.boxes[start : start + MAX_PROMPTS], volume.shape[1:])
    if prompts.points:
        if prompts.boxes is not None and len(prompts.boxes) != 1:
            raise InputError(f"points combine with one --box, not with {len(prompts.boxes)}")
        coords, labels = _point_arrays(prompts.points)
        if not np.isin(labels, (0, 1)).all():
            raise InputError(
                f"point labels {labels[0].tolist()}: expected 1 (inside) or 0 (outside)"
            )
        check_points(coords, labels, volume.shape[1:])
    return Prompts(prompts.boxes, None, prompts.points, index, prompts.multimask)


def _slice_index(index: int | None, volume: Volume) -> int:
    depth = volume.shape[0]
    if index is None and volume.is_volume:
        raise InputError(
            f"{volume.path} has {depth} slices: say which one with --slice, or use --box3d"
        )
    if index is not None and not 0 <= index < depth:
        raise InputError(f"slice {index}: {volume.path} has slices 0–{depth - 1}")
    return index or 0


def _check_boxes_3d(boxes: npt.NDArray[Any], volume: Volume) -> None:
    depth, height, width = volume.shape
    if not volume.is_volume:
        raise InputError(f"{volume.path} is a 2D image: use --box instead of a 3D box")
    if boxes.ndim != 2 or boxes.shape[1] != 6 or len(boxes) == 0:
        raise InputError(f"3D boxes of shape {boxes.shape}: expected (n, 6), at least one")
    for index, (z0, z1) in enumerate(boxes[:, [2, 5]].astype(np.float64)):
        whole = np.isfinite([z0, z1]).all() and z0 == int(z0) and z1 == int(z1)
        if not whole or not 0 <= z0 < z1 <= depth:
            raise InputError(
                f"3D box {index} covers z {z0:g} to {z1:g}: expected whole numbers with "
                f"0 <= z0 < z1 <= {depth} (slices z0 to z1 - 1)"
            )
    for start in range(0, len(boxes), MAX_PROMPTS):
        check_boxes(boxes[start : start + MAX_PROMPTS, [0, 1, 3, 4]], (height, width))


def _point_arrays(
    points: Sequence[tuple[float, float, float]],
) -> tuple[FloatArray, npt.NDArray[np.float32]]:
    array = np.array(points, np.float32)
    return array[None, :, :2], array[None, :, 2]


def _ignore_progress(done: int, total: int) -> None:
    """Default `Progress`: says nothing."""


def segment(
    predictor: Predictor,
    volume: Volume,
    prompts: Prompts,
    progress: Progress = _ignore_progress,
) -> Segmentation:
    """Segment `volume` with `prompts`.

    Args:
        predictor: model and preprocessing.
        volume: image or volume.
        prompts: see `check_prompts`, which is applied here.
        progress: called with slices done and slices in all.

    Raises:
        InputError: see `check_prompts`; logits that are not finite.
    """
    prompts = check_prompts(prompts, volume)
    if prompts.boxes_3d is not None:
        return _segment_boxes_3d(predictor, volume, prompts.boxes_3d, progress)
    index = prompts.slice_index or 0
    progress(0, 1)
    predictor.set_image(volume.slice_rgb(index))
    result = _segment_slice(predictor, volume, prompts, index)
    progress(1, 1)
    return result


def _segment_slice(
    predictor: Predictor, volume: Volume, prompts: Prompts, index: int
) -> Segmentation:
    names = _names(prompts)
    masks_each = 3 if prompts.multimask else 1
    labels = np.zeros(volume.shape, label_dtype(len(names)))
    maps = np.zeros((masks_each, *volume.shape[1:]), labels.dtype)
    findings = []
    batch = prompts_at_once(volume.shape[1:], masks_each)
    for start in range(0, len(names), batch):
        prediction = _predict(predictor, prompts, slice(start, start + batch))
        for row, (masks, ious) in enumerate(
            zip(prediction.masks, prediction.ious, strict=True)
        ):
            label, best = start + row + 1, int(np.argmax(ious))
            for alternative, mask in enumerate(masks):
                maps[alternative][mask == 1] = label
            labels[index][masks[best] == 1] = label
            counts = tuple((int(m.sum()), float(v)) for m, v in zip(masks, ious, strict=True))
            findings.append(
                Finding(
                    label,
                    names[label - 1],
                    *counts[best],
                    alternatives=counts if prompts.multimask else (),
                )
            )
    return Segmentation(labels, tuple(findings), (index,), maps if prompts.multimask else None)


def _names(prompts: Prompts) -> list[str]:
    if prompts.points:
        text = " ".join(
            f"{'+' if label == 1 else '-'}({x:g}, {y:g})" for x, y, label in prompts.points
        )
        box = "" if prompts.boxes is None else _box_name(prompts.boxes[0]) + " "
        return [f"{box}points {text}"]
    return [] if prompts.boxes is None else [_box_name(box) for box in prompts.boxes]


def _box_name(box: npt.NDArray[Any]) -> str:
    return "box " + " ".join(f"{value:g}" for value in box)


def prompts_at_once(original_size: tuple[int, int], masks_each: int = 1) -> int:
    """Prompts to decode in one call, so that their full-size masks stay within memory."""
    pixels = original_size[0] * original_size[1] * masks_each
    return max(1, min(MAX_PROMPTS, _MASK_BYTES_AT_ONCE // pixels))


def _predict(predictor: Predictor, prompts: Prompts, part: slice) -> Prediction:
    boxes = None if prompts.boxes is None else prompts.boxes[part]
    if prompts.points:
        coords, labels = _point_arrays(prompts.points)
        return predictor.predict_prompts(
            boxes=boxes, point_coords=coords, point_labels=labels, multimask=prompts.multimask
        )
    if boxes is None:
        raise InputError("no prompt: give boxes or points")
    if prompts.multimask:
        return predictor.predict_prompts(boxes=boxes, multimask=True)
    return predictor.predict_boxes(boxes)


def _segment_boxes_3d(
    predictor: Predictor, volume: Volume, boxes: npt.NDArray[Any], progress: Progress
) -> Segmentation:
    labels = np.zeros(volume.shape, label_dtype(len(boxes)))
    pixels = np.zeros(len(boxes), np.int64)
    ious = np.zeros(len(boxes), np.float64)
    batch = prompts_at_once(volume.shape[1:])
    firsts, ends = boxes[:, 2].astype(int), boxes[:, 5].astype(int)
    slices = [z for z in range(len(labels)) if ((firsts <= z) & (z < ends)).any()]
    for done, z in enumerate(slices):
        progress(done, len(slices))
        predictor.set_image(volume.slice_rgb(z))
        here = np.flatnonzero((firsts <= z) & (z < ends))
        for start in range(0, len(here), batch):
            part = here[start : start + batch]
            prediction = predictor.predict_boxes(boxes[part][:, [0, 1, 3, 4]])
            for row, prompt in enumerate(part):
                mask = prediction.masks[row, 0]
                labels[z][mask == 1] = prompt + 1
                pixels[prompt] += int(mask.sum())
                ious[prompt] += float(prediction.ious[row, 0])
    progress(len(slices), len(slices))
    ious /= ends - firsts
    findings = tuple(
        Finding(i + 1, _box_name(box).replace("box", "box3d"), int(pixels[i]), float(ious[i]))
        for i, box in enumerate(boxes)
    )
    return Segmentation(labels, findings, tuple(slices))
