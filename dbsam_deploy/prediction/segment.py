"""Prompts on an image or volume → one result.

Each prompt has a label, its position in the order given, from 1. Where masks overlap, the later
prompt's label stands. A 3D box puts its 2D box on each of its slices; slices do not influence each
other. A slice of such a box that holds one value only has an empty mask; a single image or slice of
one value is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import MAX_PROMPTS
from ..core.errors import InputError
from ..core.imaging import NOTHING, is_constant
from ..core.masks import Prediction
from ..core.prompt_adapter import MAX_SEARCHES
from ..core.prompts import check_mask_pixels
from ..images.volumes import Volume, label_dtype
from .predictor import Promptable, prediction_of
from .prompts import Prompts, check_prompts
from .results import Result

_MASK_BYTES_AT_ONCE = 256 * 1024 * 1024

Progress = Callable[[int, int], None]


def ignore(*_: object) -> None:
    """Default of what is told about a run, such as `Progress`: says nothing."""


def segment(
    predictor: Promptable,
    volume: Volume,
    prompts: Prompts,
    progress: Progress = ignore,
    *,
    keep_masks: bool = False,
) -> Result:
    """Segment `volume` with `prompts`.

    Args:
        predictor: a model, in this process or behind a server.
        volume: image or volume.
        prompts: see `check_prompts`, which is applied here.
        progress: called with slices done and slices in all.
        keep_masks: keep each prompt's own masks and logits, not the label map alone; for prompts
            of one slice.

    Raises:
        InputError: see `check_prompts`; more masks to keep than `MAX_MASK_PIXELS`; logits that are
            not finite.
    """
    prompts = check_prompts(prompts, volume)
    if prompts.boxes_3d is not None:
        return _segment_boxes_3d(predictor, volume, prompts, prompts.boxes_3d, progress)
    if keep_masks:
        check_mask_pixels(len(prompts) * _masks_each(prompts), volume.shape[1:])
    progress(0, 1)
    predictor.set_image(volume.slice_rgb(prompts.slice_index or 0))
    result = _segment_slice(predictor, volume, prompts, keep_masks)
    progress(1, 1)
    return result


def _masks_each(prompts: Prompts) -> int:
    return 3 if prompts.multimask else 1


def _segment_slice(
    predictor: Promptable, volume: Volume, prompts: Prompts, keep_masks: bool
) -> Result:
    index, count, size = prompts.slice_index or 0, len(prompts), volume.shape[1:]
    labels = np.zeros(volume.shape, label_dtype(count))
    maps = np.zeros((_masks_each(prompts), *size), labels.dtype)
    batch = prompts_at_once(size, len(maps), prompts.has_adapted_points)
    found = _Found()
    for start in range(0, count, batch):
        part = prediction_of(predictor, **prompts.part(start, start + batch).asked)
        _label(part, start + 1, labels[index], maps)
        found.ious.append(part.ious)
        found.pixels.append(part.masks.sum((2, 3), dtype=np.int64))
        if keep_masks:
            found.masks.append(part.masks)
        if keep_masks and part.logits is not None:
            found.logits.append(part.logits)
        del part  # before the next ones are decoded
    return Result(
        volume,
        prompts,
        labels,
        ious=_joined(found.ious),
        pixels=_joined(found.pixels),
        slices=(index,),
        logits=_joined(found.logits) if found.logits else None,
        alternatives=maps if prompts.multimask else None,
        own_masks=_joined(found.masks) if keep_masks else None,
    )


@dataclass(frozen=True)
class _Found:
    """What is collected of prompts that are decoded one batch after the other, see `Result`."""

    masks: list[npt.NDArray[Any]] = field(default_factory=list)
    ious: list[npt.NDArray[Any]] = field(default_factory=list)
    logits: list[npt.NDArray[Any]] = field(default_factory=list)
    pixels: list[npt.NDArray[Any]] = field(default_factory=list)


def _label(part: Prediction, first: int, labels: npt.NDArray[Any], maps: npt.NDArray[Any]) -> None:
    """Put labels from `first` on where masks are: the best in `labels`, each in its own map."""
    for row, masks in enumerate(part.masks):
        for alternative, mask in enumerate(masks):
            maps[alternative][mask == 1] = first + row
        labels[masks[int(np.argmax(part.ious[row]))] == 1] = first + row


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays end to end: a single one as it is, several each let go of once it is copied."""
    if len(parts) == 1:
        return parts[0]
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def prompts_at_once(
    original_size: tuple[int, int], masks_each: int = 1, has_points: bool = False
) -> int:
    """Prompts to decode in one call, so that their full-size masks stay within memory.

    Of prompts with points, for each of which boxes may be tried, a server takes fewer.
    """
    pixels = original_size[0] * original_size[1] * masks_each
    most = MAX_SEARCHES if has_points else MAX_PROMPTS
    return max(1, min(most, _MASK_BYTES_AT_ONCE // pixels))


def _segment_boxes_3d(
    predictor: Promptable,
    volume: Volume,
    prompts: Prompts,
    boxes: npt.NDArray[Any],
    progress: Progress,
) -> Result:
    labels = np.zeros(volume.shape, label_dtype(len(boxes)))
    pixels = np.zeros((len(boxes), 1), np.int64)
    ious = np.zeros((len(boxes), 1), np.float64)
    batch = prompts_at_once(volume.shape[1:])
    firsts, ends = boxes[:, 2].astype(int), boxes[:, 5].astype(int)
    slices = [z for z in range(len(labels)) if ((firsts <= z) & (z < ends)).any()]
    blank = [z for z in slices if is_constant(volume.slice_rgb(z).reshape(-1, 3))]
    if len(blank) == len(slices):
        raise InputError(f"{volume.path}: each slice of the 3D boxes holds one value; {NOTHING}")
    for done, z in enumerate(slices):
        progress(done, len(slices))
        if z in blank:
            continue
        predictor.set_image(volume.slice_rgb(z))
        here = np.flatnonzero((firsts <= z) & (z < ends))
        for start in range(0, len(here), batch):
            part = here[start : start + batch]
            prediction = predictor.predict_boxes(boxes[part][:, [0, 1, 3, 4]])
            for row, prompt in enumerate(part):
                labels[z][prediction.masks[row, 0] == 1] = prompt + 1
            pixels[part] += prediction.masks.sum((2, 3), dtype=np.int64)
            ious[part] += prediction.ious
    progress(len(slices), len(slices))
    ious /= (ends - firsts)[:, None]
    return Result(
        volume,
        prompts,
        labels,
        ious=ious.astype(np.float32),
        pixels=pixels,
        slices=tuple(slices),
        blank_slices=tuple(blank),
    )
