"""From ideal to recorded: illumination, noise, blur, artefacts, tone and resolution of an image.

Every function takes planes, (C, H, W) float32 of about 0–1, and most change them in place.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from ..core.imaging import ByteArray, FloatArray
from .fields import ramps, require_scipy, smooth_noise

GREY_STYLE_NOISES = ("white", "coarse", "rician", "poisson", "speckle")
COLOUR_NOISES = ("white", "coarse", "poisson")


def degrade(rng: np.random.Generator, planes: FloatArray, style: str) -> ByteArray:
    """Record an ideal image.

    Args:
        rng: the random state.
        planes: (C, H, W) float32, about 0–1, C = 1 or 3; changed in place.
        style: the palette's name, which sets how likely each artefact is.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    grey = len(planes) == 1
    if rng.random() < {"skin": 0.4}.get(style, 0.03):
        _hairs(rng, planes)
    if rng.random() < {"mucosa": 0.6, "skin": 0.15}.get(style, 0.02):
        _highlights(rng, planes)
    if rng.random() < 0.5:
        field = smooth_noise(rng, planes.shape[1:], rng.uniform(1, 4))
        planes *= np.exp(np.float32(rng.uniform(0.03, 0.3)) * field)
    _tone(rng, planes)
    if grey and rng.random() < 0.08:
        _ultrasound(rng, planes)
    elif rng.random() < 0.8:
        _noise(rng, planes)
    if rng.random() < 0.06:
        _ringing(rng, planes)
    if rng.random() < {"mucosa": 0.6, "skin": 0.35}.get(style, 0.07):
        _vignette(rng, planes)
    if rng.random() < 0.06:
        _border(rng, planes)
    pixels = _to_rgb(planes)
    return _recorded(rng, pixels, lossy=not grey)


def _to_rgb(planes: FloatArray) -> ByteArray:
    planes *= 255
    np.clip(planes, 0, 255, out=planes)
    pixels = planes.astype(np.uint8)
    if len(pixels) == 1:
        return np.repeat(pixels[0][..., None], 3, axis=2)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _tone(rng: np.random.Generator, planes: FloatArray) -> None:
    """Stretch to a random range, gamma, and sometimes the negative."""
    if rng.random() < 0.6:
        low, high = np.percentile(planes[:, ::4, ::4], (rng.uniform(0, 4), rng.uniform(96, 100)))
        planes -= np.float32(low)
        planes *= np.float32(rng.uniform(0.6, 1.05) / max(float(high - low), 0.1))
        planes += np.float32(rng.uniform(0, 0.15) if rng.random() < 0.3 else 0)
    np.clip(planes, 0, 1, out=planes)
    if rng.random() < 0.4:
        np.power(planes, np.float32(np.exp(rng.uniform(-0.6, 0.6))), out=planes)
    if rng.random() < 0.1:
        np.subtract(1, planes, out=planes)
    if len(planes) == 3 and rng.random() < 0.5:
        planes *= rng.uniform(0.8, 1.15, (3, 1, 1)).astype(np.float32)


def _noise(rng: np.random.Generator, planes: FloatArray) -> None:
    kinds = GREY_STYLE_NOISES if len(planes) == 1 else COLOUR_NOISES
    kind = kinds[int(rng.integers(len(kinds)))]
    level = np.float32(np.exp(rng.uniform(np.log(0.006), np.log(0.13))))
    if kind == "coarse":
        cells = max(planes.shape) / rng.uniform(2, 5)
        planes += level * smooth_noise(rng, planes.shape[1:], cells)
        return
    white = rng.standard_normal(planes.shape, dtype=np.float32)
    if kind == "white":
        planes += level * white
    elif kind == "poisson":
        planes += level * np.sqrt(np.maximum(planes, 0)) * white
    elif kind == "rician":
        other = rng.standard_normal(planes.shape, dtype=np.float32)
        np.hypot(planes + level * white, level * other, out=planes)
    else:
        planes *= 1 + 3 * level * white


def _ultrasound(rng: np.random.Generator, planes: FloatArray) -> None:
    """Speckle stretched across the beam, shadows along it, and often a fan-shaped view."""
    ndimage = require_scipy().ndimage
    shape = planes.shape[1:]
    grain = rng.standard_normal(shape, dtype=np.float32)
    ndimage.uniform_filter1d(grain, int(rng.integers(2, 6)), axis=1, output=grain)
    ndimage.uniform_filter1d(grain, 2, axis=0, output=grain)
    grain /= max(float(grain.std()), 1e-6)
    planes *= np.exp(np.float32(rng.uniform(0.2, 0.7)) * grain)
    y, x = ramps(shape)
    planes *= 1 - np.float32(rng.uniform(0, 0.5)) * (y + 1) / 2
    shadow = smooth_noise(rng, (1, shape[1]), rng.uniform(4, 12))
    planes *= 1 - np.float32(rng.uniform(0, 0.6)) * np.clip(shadow, 0, 1) * (y > rng.uniform(-1, 0))
    if rng.random() < 0.6:
        apex, spread = rng.uniform(1.0, 2.0), rng.uniform(0.5, 1.0)
        distance = np.hypot(x, y + np.float32(apex))
        inside = (np.abs(x) < spread * (y + np.float32(apex))) & (distance < apex + 1)
        planes *= inside & (distance > apex - 1)


def _ringing(rng: np.random.Generator, planes: FloatArray) -> None:
    """Cut the high frequencies off (Gibbs), as a small acquisition matrix does."""
    fft = require_scipy().fft
    height, width = planes.shape[1:]
    keep = rng.uniform(0.3, 0.7)
    for plane in planes:
        spectrum = fft.rfft2(plane)
        spectrum[int(height / 2 * keep) : height - int(height / 2 * keep)] = 0
        spectrum[:, int(spectrum.shape[1] * keep) :] = 0
        plane[:] = fft.irfft2(spectrum, (height, width))


def _vignette(rng: np.random.Generator, planes: FloatArray) -> None:
    """Darkness towards the border: gradual, or a hard round or cut-off frame."""
    y, x = ramps(planes.shape[1:])
    x, y = x - np.float32(rng.normal() * 0.08), y - np.float32(rng.normal() * 0.08)
    if rng.random() < 0.5:
        fall = np.float32(rng.uniform(0.2, 0.8))
        planes *= np.clip(1 - fall * (x * x + y * y) / 2, 0, 1)
        return
    power = rng.choice((2.0, 4.0, 8.0))
    reach = np.abs(x) ** np.float32(power) + np.abs(y) ** np.float32(power)
    planes *= reach < np.float32(rng.uniform(0.9, 1.25))


def _border(rng: np.random.Generator, planes: FloatArray) -> None:
    """A plain frame, and a mark or a ruler on it, that belong to no object."""
    height, width = planes.shape[1:]
    value = np.float32(rng.choice((0.0, 0.02, 1.0)))
    top, bottom = (int(v) for v in rng.integers(0, height // 8 + 1, 2))
    left, right = (int(v) for v in rng.integers(0, width // 8 + 1, 2))
    planes[:, :top] = value
    planes[:, height - bottom :] = value
    planes[:, :, :left] = value
    planes[:, :, width - right :] = value
    x, y = int(rng.integers(width)), int(rng.integers(height))
    planes[:, y : y + height // 40 + 1, x : x + width // 12 + 1] = 1 - value
    planes[:, :: max(2, height // 20), max(0, width - 6) :] = 0.9


def _hairs(rng: np.random.Generator, planes: FloatArray) -> None:
    """Thin dark or light curved lines across the image."""
    height, width = planes.shape[1:]
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 25))):
        x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * np.pi)
        bend, step = rng.normal() * 0.12, max(height, width) / 20
        points = [(x, y)]
        for _ in range(int(rng.integers(5, 16))):
            angle += bend
            x, y = x + step * np.cos(angle), y + step * np.sin(angle)
            points.append((x, y))
        draw.line(points, fill=int(rng.integers(120, 256)), width=int(rng.integers(1, 4)))
    cover = np.asarray(image, np.float32) / 255
    shade = np.float32(rng.choice((0.05, 0.2, 0.9)))
    planes += cover * (shade - planes)


def _highlights(rng: np.random.Generator, planes: FloatArray) -> None:
    """Small white reflections of a light."""
    field = smooth_noise(rng, planes.shape[1:], rng.uniform(10, 50))
    wet = smooth_noise(rng, planes.shape[1:], rng.uniform(2, 5)) > 0
    shine = np.clip((field - np.float32(rng.uniform(2, 3))) * 4, 0, 1) * wet
    planes += shine * (1 - planes)


def _recorded(rng: np.random.Generator, pixels: ByteArray, *, lossy: bool) -> ByteArray:
    """Lose resolution, and store as JPEG, now and then."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    if rng.random() < 0.3:
        share = rng.uniform(0.25, 0.8)
        small = (max(24, round(width * share)), max(24, round(height * share)))
        filters = (
            Image.Resampling.NEAREST,
            Image.Resampling.BILINEAR,
            Image.Resampling.BICUBIC,
        )
        image = image.resize(small, Image.Resampling.BOX)
        up = int(rng.choice(3, p=(0.1, 0.5, 0.4)))
        image = image.resize((width, height), filters[up])
    if rng.random() < (0.35 if lossy else 0.08):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(25, 90)))
        image = Image.open(stream)
    return np.array(image)
