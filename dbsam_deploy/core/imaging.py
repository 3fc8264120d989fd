"""Pre- and post-processing between the image frame and the model frame, in NumPy and Pillow.

Local prediction, the Triton models and the client all run this file (the repository carries a copy
of it), so that a mask is the same bit for bit wherever it is computed. It therefore needs neither
torch nor BLAS: post-processing is element-wise IEEE arithmetic in a fixed order.

Modes, with S the side of the encoder's image for pixels and of the model frame for logits, see
`Geometry` (spec: DB-SAM inference; MedSAM 1.0; LiteMedSAM; SAM-Med2D; SAM 2; MedSAM2):
    sam     longest side to S with Pillow's bilinear filter, (x - mean) / std with SAM's statistics
            on 0–255, zero padding right and bottom; logits → S×S → crop → original size.
    medsam  resize to exactly S×S with scikit-image order 3, min–max to 0–1; logits → original size.
    lite_medsam
            longest side to S by pixel area, as OpenCV's INTER_AREA, min–max to 0–1, zero padding
            right and bottom; logits as in sam.
    sam_med2d
            resize to exactly S×S by the nearest pixel, as OpenCV's INTER_NEAREST, SAM's statistics;
            logits → S×S → original size.
    sam2    resize to exactly S×S, bilinear with antialiasing in float32, as torchvision's Resize of
            a tensor, SAM's statistics; logits → original size.
    medsam2
            as sam2, by Pillow's bicubic filter on whole grey values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .contract import MAX_IMAGE_PIXELS, MAX_POINTS, MAX_PROMPTS, MAX_SIDE_IN_GRAPH, Geometry
from .errors import EngineError, InputError
from .resizing import (
    ByteArray,
    area_resize,
    bilinear_resize,
    filtered_resize,
    nearest_pixels,
    spline_resize,
)
from .scaling import unit_range, z_score
from .upscaling import FloatArray, Upscale, resample, sign_mask, value_at

Mode = Literal["sam", "medsam", "lite_medsam", "sam_med2d", "sam2", "medsam2"]
MODES: tuple[Mode, ...] = get_args(Mode)
_STRAIGHT = ("medsam", "sam2", "medsam2")
"""Modes whose logits go from the mask grid to the original size in one step."""
_SQUEEZED = ("sam_med2d", *_STRAIGHT)
"""Modes that fill the model frame, whatever the image's aspect."""
UNIT_RANGE = ("medsam", "lite_medsam")
"""Modes that bring pixels to 0–1 by their least and largest value; others take SAM's statistics."""

Arrays = dict[str, npt.NDArray[Any]]
"""Arrays by the names of the contract's tensors."""

NOTHING = "there is nothing to segment"

_RARE = ("high_res", "frame_size", "pixels_in_graph")
_ROUNDING_PX = 1e-3
"""A coordinate that went to the model frame and back may be this far off."""


@dataclass(frozen=True)
class Preprocessing(Geometry):
    """How images enter the model: its sizes and the `mode`."""

    mode: Mode = "sam"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise InputError(f"preprocessing mode {self.mode!r}: expected one of {MODES}")
        if self.pixels_in_graph and self.mode == "sam2" and 2 * self.image_size > MAX_SIDE_IN_GRAPH:
            raise InputError(
                f"images resized in the graph to {self.image_size} pixels in mode sam2: at most "
                f"{MAX_SIDE_IN_GRAPH // 2} are possible; take --imaging host"
            )

    def record(self) -> dict[str, Any]:
        """For a manifest; without what only some exports have, as before there were any."""
        return {key: value for key, value in asdict(self).items() if key not in _RARE or value}

    @property
    def on_host(self) -> Preprocessing:
        """The same model with images resized and masks made here, not in graphs."""
        return replace(self, pixels_in_graph=False)

    def content_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of `original_size` (H, W) fills in the model frame."""
        return self._fitted(original_size, self.frame_side)

    def pixel_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """The same in the image that the encoder takes."""
        return self._fitted(original_size, self.image_size)

    def _fitted(self, original_size: tuple[int, int], side: int) -> tuple[int, int]:
        height, width = original_size
        if self.mode in _SQUEEZED:
            return side, side
        scale = side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def check_image(image: npt.NDArray[Any]) -> ByteArray:
    """Return `image` if it can be segmented.

    Args:
        image: (H, W, 3) uint8 RGB.

    Raises:
        InputError: another dtype or shape, an empty side, or more than `MAX_IMAGE_PIXELS` pixels.
    """
    if image.dtype != np.uint8:
        raise InputError(f"image dtype {image.dtype}: expected uint8 (0–255); rescale it")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image shape {image.shape}: expected (height, width, 3), none of them 0")
    if image.shape[0] * image.shape[1] > MAX_IMAGE_PIXELS:
        raise InputError(
            f"image of {image.shape[0]}×{image.shape[1]} pixels: at most {MAX_IMAGE_PIXELS} pixels "
            "are accepted; crop or downsample it"
        )
    return image


def is_constant(pixels: npt.NDArray[Any]) -> bool:
    """Whether all pixels are the same, on which a model draws a mask all the same.

    Args:
        pixels: (N,) grey or (N, C) colour, N ≥ 1.
    """
    some = pixels[:: max(1, len(pixels) // 64)]  # nearly always enough to tell
    return all(bool((part == part[0]).all()) for part in (some, pixels))


def all_values_are(pixels: npt.NDArray[Any]) -> str:
    """What is wrong with constant `pixels`, see `is_constant`."""
    values = sorted(set(pixels[0].tolist())) if pixels.ndim == 2 else [pixels[0].item()]
    values = values if len(values) == 1 else pixels[0].tolist()
    return f"all values are {' '.join(f'{value:g}' for value in values)}; {NOTHING}"


def check_contrast(image: ByteArray) -> ByteArray:
    """Return `image` ((H, W, 3) uint8 RGB) if its pixels differ.

    Raises:
        InputError: it is one colour everywhere.
    """
    pixels = image.reshape(-1, 3)
    if is_constant(pixels):
        raise InputError(f"image: {all_values_are(pixels)}")
    return image


def check_boxes(boxes: npt.NDArray[Any], original_size: tuple[int, int]) -> FloatArray:
    """Return `boxes` as float32 if each is a box inside the image.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in the image frame, 1 ≤ N ≤ `MAX_PROMPTS`.
        original_size: height and width of the image.

    Raises:
        InputError: wrong shape, none or too many, not finite, empty, or outside the image.
    """
    boxes = np.asarray(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise InputError(f"boxes {boxes.dtype}{boxes.shape}: expected numbers of shape (N, 4)")
    _check_count(len(boxes), "boxes")
    values = np.asarray(boxes, np.float32)
    height, width = original_size
    for index, box in enumerate(values):
        x0, y0, x1, y1 = (float(v) for v in box)
        text = f"box {index} ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not np.isfinite(box).all() or x0 >= x1 or y0 >= y1:
            raise InputError(f"{text}: expected finite x0 < x1 and y0 < y1")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            raise InputError(
                f"{text} reaches outside the image: expected x in 0–{width}, y in 0–{height}"
            )
    return values


def check_points(
    point_coords: npt.NDArray[Any],
    point_labels: npt.NDArray[Any],
    original_size: tuple[int, int],
) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """Return points as (N, P, 2) float32 and labels as (N, P) int32 if they are usable prompts.

    Args:
        point_coords: (N, P, 2) x, y in the image frame.
        point_labels: (N, P) 1 foreground, 0 background, -1 no point (coordinates ignored).
        original_size: height and width of the image.

    Raises:
        InputError: shapes differ, an unknown label, or a point outside the image.
    """
    point_coords, point_labels = np.asarray(point_coords), np.asarray(point_labels)
    if point_coords.ndim != 3 or point_coords.shape[2] != 2 or point_coords.dtype.kind not in "fiu":
        raise InputError(f"point_coords of shape {point_coords.shape}: expected (N, P, 2) numbers")
    if point_labels.shape != point_coords.shape[:2]:
        raise InputError(
            f"point_labels of shape {point_labels.shape}: expected {point_coords.shape[:2]}, "
            "one label a point"
        )
    _check_count(len(point_coords), "point prompts")
    # The box's two corners, or the closing "not a point", are added to these.
    if not 1 <= point_coords.shape[1] <= MAX_POINTS - 2:
        raise InputError(f"{point_coords.shape[1]} points in a prompt: expected 1–{MAX_POINTS - 2}")
    if not np.isin(point_labels, (-1, 0, 1)).all():
        raise InputError(f"point labels {np.unique(point_labels)}: expected only -1, 0 and 1")
    height, width = original_size
    coords = np.asarray(point_coords, np.float32)
    labels = np.asarray(point_labels, np.int32)
    used = coords[labels >= 0]
    inside = (used >= 0) & (used <= np.array([width, height], np.float32))
    if not inside.all():  # NaN compares false, so it ends here too
        raise InputError(
            f"a point lies outside the image of {width}×{height} pixels (width×height)"
        )
    return np.where(labels[..., None] >= 0, coords, np.float32(0)), labels


def _check_count(count: int, what: str) -> None:
    if not 1 <= count <= MAX_PROMPTS:
        raise InputError(f"{count} {what}: expected 1–{MAX_PROMPTS} in one request")


def preprocess(image: npt.NDArray[Any], how: Preprocessing) -> FloatArray:
    """Image frame → the image that the encoder takes.

    Args:
        image: (H, W, 3) uint8 RGB.
        how: mode and size.

    Returns:
        (1, 3, S, S) float32, S = `how.image_size`: 0–1 (medsam, lite_medsam) or z-scored; zero
        where there is no image.

    Raises:
        InputError: see `check_image`.
        EngineError: medsam mode without scikit-image.
    """
    pixels = resize_image(image, how)
    height, width = pixels.shape[:2]
    out = np.zeros((1, 3, how.image_size, how.image_size), np.float32)
    scale = unit_range if how.mode in UNIT_RANGE else z_score
    scale(pixels, out[0, :, :height, :width])
    return out


def resize_image(image: npt.NDArray[Any], how: Preprocessing) -> npt.NDArray[Any]:
    """Image frame → the pixels that it fills in the encoder's image.

    Args:
        image: (H, W, 3) uint8 RGB.
        how: mode and size.

    Returns:
        (h, w, 3), see `Preprocessing.pixel_size`, 0–255: uint8, but float32 in mode sam2.

    Raises:
        InputError, EngineError: see `preprocess`.
    """
    image = check_image(image)
    height, width = how.pixel_size((image.shape[0], image.shape[1]))
    if how.mode == "medsam":
        return spline_resize(image, how.image_size)
    if how.mode == "lite_medsam":
        return area_resize(image, (height, width))
    if how.mode == "sam_med2d":
        rows, columns = (nearest_pixels(n, how.image_size) for n in image.shape[:2])
        return image[rows][:, columns]
    if how.mode == "sam2":
        return bilinear_resize(image, how.image_size)
    return filtered_resize(image, (height, width), cubic=how.mode == "medsam2")


def to_model_frame(
    points_xy: npt.NDArray[Any], original_size: tuple[int, int], how: Preprocessing
) -> FloatArray:
    """Image-frame coordinates (..., 2) as x, y, or boxes (..., 4), → model frame, float32.

    SAM's `ResizeLongestSide.apply_coords` without its truncation of integer input.
    """
    height, width = how.content_size(original_size)
    scale = np.array([width / original_size[1], height / original_size[0]], np.float64)
    repeat = points_xy.shape[-1] // 2
    return (points_xy.astype(np.float64) * np.tile(scale, repeat)).astype(np.float32)


def to_image_frame(
    points_xy: npt.NDArray[Any], original_size: tuple[int, int], how: Preprocessing
) -> FloatArray:
    """Model-frame coordinates (..., 2) or (..., 4) → image frame, float32; see `to_model_frame`.

    What lies a rounding error outside the image is put onto its border.
    """
    height, width = how.content_size(original_size)
    borders = np.array([original_size[1], original_size[0]], np.float64)
    repeat = points_xy.shape[-1] // 2
    scale, last = np.tile(borders / (width, height), repeat), np.tile(borders, repeat)
    found = points_xy.astype(np.float64) * scale
    near = np.abs(found - np.clip(found, 0, last)) < _ROUNDING_PX
    return np.where(near, np.clip(found, 0, last), found).astype(np.float32)


def check_finite(logits: npt.NDArray[Any]) -> None:
    """Refuse logits that no mask can be made of.

    Raises:
        EngineError: NaN or infinity.
    """
    if not np.isfinite(logits).all():
        raise EngineError(
            "the model returned NaN or infinity: its precision is too low for this image, or "
            "its file is damaged; export again and compare with --precision fp32"
        )


def check_mask_side(logits: npt.NDArray[Any], how: Preprocessing) -> int:
    """Side 4G of logits (..., 4G, 4G).

    Raises:
        InputError: not square logits of the mask grid.
    """
    side = how.mask_side
    if logits.shape[-2:] != (side, side):
        raise InputError(f"low_res_masks {logits.shape}: expected (..., {side}, {side})")
    return side


def postprocess(
    low_res_masks: npt.NDArray[Any],
    original_size: tuple[int, int],
    how: Preprocessing,
    out: ByteArray | None = None,
) -> ByteArray:
    """Low-resolution logits → masks in the image frame (SAM's `postprocess_masks`, then > 0).

    Args:
        low_res_masks: (..., 4G, 4G) logits.
        original_size: height and width of the image.
        how: the preprocessing that made the model frame.
        out: (..., H, W) uint8 array to fill; a new one by default.

    Returns:
        (..., H, W) uint8, 1 inside the mask.

    Raises:
        InputError: not square logits of the mask grid.
        EngineError: logits that are not finite.
    """
    check_mask_side(low_res_masks, how)
    lead = low_res_masks.shape[:-2]
    masks = np.empty((*lead, *original_size), np.uint8) if out is None else out
    stages = mask_stages(original_size, how)
    for index in np.ndindex(*lead):
        logits = np.asarray(low_res_masks[index], np.float32)
        check_finite(logits)
        sign_mask(logits, stages, masks[index])
    return masks


def upscale_logits(
    logits: FloatArray, original_size: tuple[int, int], how: Preprocessing
) -> FloatArray:
    """One (4G, 4G) logit map → (H, W) logits in the image frame, bilinear as in the original."""
    return resample(logits, mask_stages(original_size, how))


def logit_at(
    logits: FloatArray, original_size: tuple[int, int], how: Preprocessing, row: int, column: int
) -> float:
    """One pixel of `upscale_logits`: above 0 where `postprocess` has it in the mask."""
    return value_at(logits, mask_stages(original_size, how), row, column)


def mask_stages(original_size: tuple[int, int], how: Preprocessing) -> tuple[Upscale, ...]:
    """How logits get from the mask grid to the image frame."""
    to_image = Upscale(original_size, original_size)
    if how.mode in _STRAIGHT:
        return (to_image,)
    whole = (how.frame_side, how.frame_side)
    return Upscale(whole, how.content_size(original_size)), to_image
