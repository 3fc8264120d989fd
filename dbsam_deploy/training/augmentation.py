"""Random changes to a training sample: geometry by torch's grid sampling, intensity by MONAI.

MONAI's own geometric transforms were measured first: on a 512×512 RGB image and its labels
`RandAffined` took 33 ms and `Rand2DElasticd` 38 ms on one core, more than everything here together,
because grid and resampling are done once for each. Flips, turns, affine and elastic deformation are
therefore one displacement field and one resampling.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..extras import require
from ..synthetic.fields import smooth_noise
from .samples import LabelMap, Sample, objects_in

_STRENGTHS = (
    "rotation_degrees",
    "smallest_scale",
    "largest_scale",
    "shear",
    "elastic_strength",
    "noise_std",
    "blur_px",
)
"""Fields of `Augmentation` that are not probabilities."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often (0–1) and how strongly each change is made; all zero probabilities: none.

    Attributes:
        flip: mirror along each axis.
        quarter_turn: turn by 90, 180 or 270 degrees.
        affine: rotate, scale and shear.
        rotation_degrees: largest rotation either way.
        smallest_scale: smallest magnification.
        largest_scale: largest magnification.
        shear: largest shear either way.
        elastic: smooth random deformation.
        elastic_strength: its largest standard deviation as a share of the longer side.
        invert: negative.
        gamma: exponent between 0.6 and 1.6 on the image's own range.
        contrast: linear contrast 0.6–1.4 and brightness ±0.15.
        histogram_shift: bend the histogram at random control points.
        bias_field: smooth multiplicative field.
        noise: white Gaussian noise.
        noise_std: its largest standard deviation, for intensities 0–1.
        blur: Gaussian blur.
        blur_px: its largest standard deviation in pixels.
        low_resolution: shrink to 30–80 % and enlarge again.
        colour: each channel of a colour image scaled and shifted on its own.
        grey: colour image → grey.
    """

    flip: float = 0.5
    quarter_turn: float = 0.5
    affine: float = 0.7
    rotation_degrees: float = 45.0
    smallest_scale: float = 0.6
    largest_scale: float = 1.6
    shear: float = 0.15
    elastic: float = 0.2
    elastic_strength: float = 0.015
    invert: float = 0.1
    gamma: float = 0.3
    contrast: float = 0.3
    histogram_shift: float = 0.1
    bias_field: float = 0.15
    noise: float = 0.2
    noise_std: float = 0.08
    blur: float = 0.15
    blur_px: float = 1.5
    low_resolution: float = 0.1
    colour: float = 0.4
    grey: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            high = np.inf if field.name in _STRENGTHS else 1.0
            if not (np.isfinite(value) and 0 <= value <= high):
                raise InputError(f"augmentation {field.name} = {value}; expected 0–{high:g}")
        if not 0 < self.smallest_scale <= self.largest_scale:
            raise InputError(
                f"augmentation scale {self.smallest_scale}–{self.largest_scale}; expected 0 < "
                "smallest_scale ≤ largest_scale"
            )


def augment(sample: Sample, settings: Augmentation, seed: int) -> Sample:
    """The sample changed at random; the same arguments give the same bytes.

    Where a geometric change would move every object out of the image, the image keeps its geometry.

    Args:
        sample: with or without labels.
        settings: probabilities and strengths.
        seed: any non-negative number.

    Returns:
        A sample of the same name; height and width are swapped by some quarter turns.

    Raises:
        EngineError: MONAI is not installed.
    """
    rng = np.random.default_rng(seed)
    image, labels = _turned(sample.image, sample.labels, settings, rng)
    image, labels = _deformed(image, labels, settings, rng)
    return Sample(sample.name, _recoloured(image, settings, rng), labels)


def _turned(
    image: ByteArray, labels: LabelMap | None, settings: Augmentation, rng: np.random.Generator
) -> tuple[ByteArray, LabelMap | None]:
    for axis in (0, 1):
        if rng.random() < settings.flip:
            image = np.flip(image, axis)
            labels = None if labels is None else np.flip(labels, axis)
    if rng.random() < settings.quarter_turn:
        turns = int(rng.integers(1, 4))
        image = np.rot90(image, turns)
        labels = None if labels is None else np.rot90(labels, turns)
    kept = None if labels is None else np.ascontiguousarray(labels)
    return np.ascontiguousarray(image), kept


def _deformed(
    image: ByteArray, labels: LabelMap | None, settings: Augmentation, rng: np.random.Generator
) -> tuple[ByteArray, LabelMap | None]:
    affine, elastic = rng.random() < settings.affine, rng.random() < settings.elastic
    if not (affine or elastic):
        return image, labels
    shape = (image.shape[0], image.shape[1])
    matrix = _affine_matrix(shape, settings, rng) if affine else np.eye(2, 3)
    theta = torch.from_numpy(matrix.astype(np.float32))[None]
    grid = F.affine_grid(theta, [1, 1, *shape], align_corners=False)
    if elastic:
        grid += _displacement(shape, settings.elastic_strength, rng)
    grey = _is_grey(image)
    planes = torch.from_numpy(image[..., :1] if grey else image).permute(2, 0, 1)[None].float()
    moved = F.grid_sample(planes, grid, mode="bilinear", align_corners=False)[0]
    pixels = moved.round_().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = np.repeat(pixels, 3, axis=2) if grey else np.ascontiguousarray(pixels)
    if labels is None:
        return pixels, None
    exact = torch.float32 if labels.max() < 2**24 else torch.float64  # holds the labels exactly
    numbers = torch.from_numpy(labels)[None, None].to(exact)
    moved = F.grid_sample(numbers, grid.to(exact), mode="nearest", align_corners=False)[0, 0]
    changed = moved.numpy().astype(np.int32)
    if len(objects_in(changed)) == 0:
        return image, labels
    return pixels, changed


def _affine_matrix(
    shape: tuple[int, int], settings: Augmentation, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """(2, 3) map from output to input coordinates, -1 … 1 as in torch's `affine_grid`."""
    height, width = shape
    angle = np.deg2rad(rng.uniform(-1, 1) * settings.rotation_degrees)
    low, high = np.log(settings.smallest_scale), np.log(settings.largest_scale)
    scale = np.exp(rng.uniform(low, high))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shears = rng.uniform(-1, 1, 2) * settings.shear
    pixels = turn @ np.array([[1, shears[0]], [shears[1], 1]]) / scale
    aspect = np.array([[1, height / width], [width / height, 1]])
    shift = rng.uniform(-1, 1, 2) * abs(1 - 1 / scale)
    return np.column_stack([pixels * aspect, shift])


def _displacement(
    shape: tuple[int, int], strength: float, rng: np.random.Generator
) -> torch.Tensor:
    """(1, H, W, 2) float32 smooth random moves (x, y) in coordinates -1 … 1."""
    height, width = shape
    cells, longer = rng.uniform(2, 8), max(shape)
    std = 2 * rng.uniform(0.2, 1) * strength
    moves = [smooth_noise(rng, shape, cells) * (std * longer / side) for side in (width, height)]
    return torch.from_numpy(np.stack(moves, axis=-1).astype(np.float32))[None]


def _is_grey(image: ByteArray) -> bool:
    red = image[..., 0]
    return bool((red == image[..., 1]).all() and (red == image[..., 2]).all())


def _recoloured(image: ByteArray, settings: Augmentation, rng: np.random.Generator) -> ByteArray:
    grey = _is_grey(image)
    pixels = image[..., :1] if grey else image
    planes = np.divide(pixels.transpose(2, 0, 1), 255, dtype=np.float32)
    if not grey:
        planes = _other_colours(planes, settings, rng)
    seed = int(rng.integers(2**31))
    values = _intensity(settings, planes, seed)
    if rng.random() < settings.contrast:
        gain, shift = np.float32(rng.uniform(0.6, 1.4)), np.float32(rng.uniform(-0.15, 0.15))
        middle = values.mean()
        values = (values - middle) * gain + (middle + shift)
    if rng.random() < settings.invert:
        values = 1 - values
    out = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    if len(out) == 1:
        return np.repeat(out[0][..., None], 3, axis=2)
    return np.ascontiguousarray(out.transpose(1, 2, 0))


def _other_colours(
    planes: FloatArray, settings: Augmentation, rng: np.random.Generator
) -> FloatArray:
    if rng.random() < settings.grey:
        shares = rng.dirichlet((2, 2, 2)).astype(np.float32)
        return np.asarray(np.tensordot(shares, planes, 1)[None])
    if rng.random() < settings.colour:
        scale, shift = rng.uniform(0.75, 1.25, (3, 1, 1)), rng.uniform(-0.1, 0.1, (3, 1, 1))
        planes = np.clip(planes * scale.astype(np.float32) + shift.astype(np.float32), 0, 1)
        if rng.random() < 0.15:
            planes = planes[rng.permutation(3)]
    return planes


@lru_cache(maxsize=4)
def _monai_chain(settings: Augmentation) -> Any:
    """MONAI's intensity transforms for (C, H, W) tensors of 0–1."""
    transforms = require("monai.transforms", extra="train", what_for="augmentation")
    return transforms.Compose(
        [
            transforms.RandHistogramShift(prob=settings.histogram_shift, num_control_points=(4, 8)),
            transforms.RandAdjustContrast(prob=settings.gamma, gamma=(0.6, 1.6)),
            transforms.RandBiasField(prob=settings.bias_field, degree=3, coeff_range=(0.0, 0.15)),
            transforms.RandGaussianSmooth(
                prob=settings.blur,
                sigma_x=(0.3, max(0.3, settings.blur_px)),
                sigma_y=(0.3, max(0.3, settings.blur_px)),
            ),
            transforms.RandSimulateLowResolution(
                prob=settings.low_resolution, upsample_mode="bilinear", zoom_range=(0.3, 0.8)
            ),
            transforms.RandGaussianNoise(prob=settings.noise, std=settings.noise_std),
        ]
    )


def _intensity(settings: Augmentation, planes: FloatArray, seed: int) -> FloatArray:
    chain = _monai_chain(settings)
    chain.set_random_state(seed=seed)
    with torch.no_grad():
        changed = chain(torch.from_numpy(np.ascontiguousarray(planes)))
    return np.asarray(changed, np.float32)
