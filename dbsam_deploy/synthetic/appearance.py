"""What the regions of a synthetic scene look like: grey values or colours, textures, relief."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.imaging import FloatArray
from .fields import fractal_noise, ramps, require_scipy, smooth_noise, stripes
from .shapes import Scene

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """How a family of images is coloured, in RGB 0–1.

    A region's colour is its parent's plus a step between `step_low` and `step_high`; the step's
    sign is random where `both_ways`. The background lies between `base_low` and `base_high`.
    """

    base_low: Colour
    base_high: Colour
    step_low: Colour
    step_high: Colour
    both_ways: bool


PALETTES = {
    "free": Palette((0, 0, 0), (1, 1, 1), (-0.5, -0.5, -0.5), (0.5, 0.5, 0.5), True),
    "mucosa": Palette(
        (0.5, 0.2, 0.15), (0.9, 0.5, 0.4), (-0.05, 0.02, 0.02), (0.2, 0.3, 0.3), True
    ),
    "skin": Palette(
        (0.6, 0.4, 0.3), (0.95, 0.8, 0.75), (-0.6, -0.6, -0.6), (-0.08, -0.1, -0.1), False
    ),
    "stained": Palette(
        (0.75, 0.5, 0.65), (0.97, 0.9, 0.95), (-0.5, -0.5, -0.35), (-0.12, -0.15, -0.02), False
    ),
    "fluorescent": Palette((0, 0, 0), (0.1, 0.1, 0.15), (0, 0, 0), (0.9, 0.9, 0.9), False),
}
GREY = "grey"

STYLES: dict[str, dict[str, float]] = {
    "cells": {GREY: 0.4, "stained": 0.3, "fluorescent": 0.15, "free": 0.15},
    "lesion": {GREY: 0.25, "skin": 0.35, "mucosa": 0.3, "free": 0.1},
}
OTHER_STYLES = {GREY: 0.78, "free": 0.1, "mucosa": 0.05, "stained": 0.05, "skin": 0.02}
"""Share of each palette by kind of scene."""

ALIKE = {"cells": 0.85, "bones": 0.7, "tubes": 0.6, "blobs": 0.6}
"""How often the objects of a scene share one look; elsewhere `ALIKE_OTHERWISE`."""
ALIKE_OTHERWISE = 0.15
LEAST_STEP = 0.07
"""Least difference between a region and what it lies on, in grey values 0–1."""


def choose_style(rng: np.random.Generator, scene: Scene) -> str:
    """The palette's name, or `GREY`."""
    shares = STYLES.get(scene.kind, OTHER_STYLES)
    return list(shares)[int(rng.choice(len(shares), p=np.array(list(shares.values()))))]


def paint(rng: np.random.Generator, scene: Scene, style: str) -> FloatArray:
    """Colours, textures and relief of a scene.

    Args:
        rng: the random state.
        scene: the drawing.
        style: a key of `PALETTES`, or `GREY`.

    Returns:
        (C, H, W) float32, about 0–1; C is 1 for grey, else 3.
    """
    alike = rng.random() < ALIKE.get(scene.kind, ALIKE_OTHERWISE)
    if style == GREY:
        colours = _greys(rng, scene, alike)[:, None]
    else:
        colours = _colours(rng, scene, PALETTES[style], alike)
    planes = np.take(colours.T, scene.regions, axis=1)
    if rng.random() < 0.25:
        _rims(rng, scene, planes)
    sigma = rng.uniform(0.3, 1.8) if rng.random() < 0.8 else 0.0
    if sigma > 0:  # partial volume: a pixel sees its neighbours too
        for plane in planes:
            require_scipy().ndimage.gaussian_filter(plane, sigma, output=plane, truncate=2.5)
    planes += _direction(rng, len(planes))[:, None, None] * _texture(rng, scene)
    if rng.random() < (0.7 if style == "mucosa" else 0.12):
        planes += np.float32(rng.uniform(0.05, 0.3)) * _relief(rng, scene)
    return planes


def _greys(rng: np.random.Generator, scene: Scene, alike: bool) -> FloatArray:
    count = len(scene.parents)
    values = np.zeros(count, np.float32)
    values[0] = rng.uniform(0, 0.08) if rng.random() < 0.45 else rng.uniform(0, 1)
    if scene.kind in ("tissue", "tiles"):
        # All lie on the background, so that only an even spread keeps neighbours apart.
        values[1:] = (rng.permutation(count - 1) + rng.uniform(0.2, 0.8, count - 1)) / (count - 1)
        return values
    common = rng.uniform(LEAST_STEP, 0.6) * rng.choice((-1.0, 1.0))
    for region in range(1, count):
        step = common * rng.uniform(0.7, 1.3)
        if not alike or not scene.objects[region]:
            step = rng.uniform(LEAST_STEP, 0.6) * rng.choice((-1.0, 1.0))
        values[region] = _stepped(float(values[scene.parents[region]]), step)
    return values


def _stepped(value: float, step: float) -> float:
    """`value` + `step`, or the other way where that leaves 0–1."""
    return value + step if 0 <= value + step <= 1 else float(np.clip(value - step, 0, 1))


def _colours(rng: np.random.Generator, scene: Scene, palette: Palette, alike: bool) -> FloatArray:
    count = len(scene.parents)
    values = np.zeros((count, 3), np.float32)
    values[0] = rng.uniform(palette.base_low, palette.base_high)
    common = _step(rng, palette)
    for region in range(1, count):
        own = not alike or not scene.objects[region]
        step = _step(rng, palette) if own else common * rng.uniform(0.75, 1.25, 3)
        values[region] = np.clip(values[scene.parents[region]] + step, 0, 1)
        if float(np.abs(values[region] - values[scene.parents[region]]).max()) < LEAST_STEP:
            values[region] = np.clip(values[scene.parents[region]] - step, 0, 1)
    return values


def _step(rng: np.random.Generator, palette: Palette) -> npt.NDArray[np.float64]:
    step = rng.uniform(palette.step_low, palette.step_high)
    if palette.both_ways and rng.random() < 0.5:
        step = -step
    largest = float(np.abs(step).max())
    return step * max(1.0, LEAST_STEP / max(largest, 1e-3))


def _direction(rng: np.random.Generator, channels: int) -> FloatArray:
    """How strongly a texture shows in each channel."""
    if channels == 1:
        return np.ones(1, np.float32)
    return rng.uniform(0.6, 1.2, channels).astype(np.float32)


def _texture(rng: np.random.Generator, scene: Scene) -> FloatArray:
    """Two shared patterns whose strength, and a slope that, differs from region to region."""
    shape, count = scene.regions.shape, len(scene.parents)
    strength = float(np.exp(rng.uniform(np.log(0.004), np.log(0.12))))
    cells, octaves = np.exp(rng.uniform(np.log(3), np.log(120))), int(rng.integers(1, 4))
    patterns = [fractal_noise(rng, shape, cells=cells, octaves=octaves, decay=rng.uniform(0.3, 1))]
    if rng.random() < 0.5:
        striped = rng.random() < 0.3
        fine = np.exp(rng.uniform(np.log(20), np.log(200)))
        patterns.append(stripes(rng, shape) if striped else smooth_noise(rng, shape, fine))
    out = np.zeros(shape, np.float32)
    for pattern in patterns:
        shares = (strength * rng.exponential(0.8, count)).astype(np.float32)
        out += np.take(shares, scene.regions) * pattern
    if rng.random() < 0.35:
        y, x = ramps(shape)
        slopes = (rng.standard_normal((2, count)) * rng.uniform(0.03, 0.2)).astype(np.float32)
        out += np.take(slopes[0], scene.regions) * y + np.take(slopes[1], scene.regions) * x
    return out


def _rims(rng: np.random.Generator, scene: Scene, planes: FloatArray) -> None:
    """A bright or dark line along the regions' borders (cortex, wall, capsule)."""
    regions = scene.regions
    rim = np.zeros(regions.shape, bool)
    reach = int(rng.integers(1, 1 + max(2, max(regions.shape) // 128)))
    rim[reach:] |= regions[reach:] != regions[:-reach]
    rim[:, reach:] |= regions[:, reach:] != regions[:, :-reach]
    only = rng.random(len(scene.parents)) < rng.uniform(0.3, 1)
    rim &= np.take(only, regions)
    planes[:, rim] += np.float32(rng.uniform(0.08, 0.5) * rng.choice((-1, 1)))


def _relief(rng: np.random.Generator, scene: Scene) -> FloatArray:
    """Light from one side on objects that bulge, (H, W) float32 of about -1 … 1."""
    ndimage = require_scipy().ndimage
    height, width = scene.regions.shape
    coarse = (scene.labels[::4, ::4] > 0).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, rng.uniform(1.5, 6), truncate=2.5)
    angle = rng.uniform(0, 2 * np.pi)
    lit = np.cos(angle) * ndimage.sobel(coarse, 0) + np.sin(angle) * ndimage.sobel(coarse, 1)
    lit /= max(float(np.abs(lit).max()), 1e-6)
    image = Image.fromarray(lit.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
