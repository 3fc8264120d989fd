"""Scenes laid out like medical images, and the choice among all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fields import warp
from .shapes import (
    Canvas,
    Point,
    Scene,
    any_outline,
    blobs,
    cells,
    log_uniform,
    outline,
    place,
    shapes,
    tiles,
    tissue,
    tube,
    tubes,
)


def body(rng: np.random.Generator, canvas: Canvas) -> tuple[Point, float, float]:
    """A trunk's or head's outline with a rim (skin, fat); returns centre and half width, height."""
    centre = (
        canvas.width * float(rng.uniform(0.45, 0.55)),
        canvas.height * float(rng.uniform(0.45, 0.55)),
    )
    half = min(canvas.shape) * float(rng.uniform(0.36, 0.52))
    aspect = float(rng.uniform(0.8, 1.25)) * canvas.width / canvas.height
    exponent = float(rng.uniform(2, 3))
    for share in (1.0, rng.uniform(0.84, 0.97)):
        ring = outline(
            rng, centre, half * share, aspect=aspect, rough=0.02, exponent=exponent, angle=0.0
        )
        canvas.polygon(ring, target=False)
    inner = half * 0.85
    return centre, inner * np.sqrt(aspect), inner / np.sqrt(aspect)


def organs(rng: np.random.Generator, canvas: Canvas) -> None:
    """Organs, paired organs, vessels and a spine inside a body outline; lesions inside organs."""
    (cx, cy), half_width, half_height = body(rng, canvas)
    if rng.random() < 0.5:
        _pair(rng, canvas, (cx, cy), half_width, half_height)
    crowded = rng.random() < 0.5
    for _ in range(int(rng.integers(8, 24) if crowded else rng.integers(2, 9))):
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.8))
        centre = (
            cx + reach * np.cos(angle) * half_width,
            cy + reach * np.sin(angle) * half_height,
        )
        radius = log_uniform(rng, 0.08, 0.5) * half_width
        number = canvas.polygon(any_outline(rng, centre, radius), target=rng.random() > 0.15)
        for _ in range(int(rng.integers(0, 3)) if radius > 12 else 0):
            spot = (
                centre[0] + rng.normal() * radius * 0.35,
                centre[1] + rng.normal() * radius * 0.35,
            )
            part_of = number if rng.random() < 0.4 else None
            inner = radius * rng.uniform(0.12, 0.4)
            canvas.polygon(outline(rng, spot, inner, rough=0.25), part_of=part_of)
    if rng.random() < 0.5:
        spine = (cx, cy + half_height * 0.72)
        bone = canvas.polygon(outline(rng, spine, half_width * 0.16, rough=0.3))
        canal = outline(rng, spine, half_width * 0.06, rough=0.05)
        canvas.polygon(canal, part_of=bone if rng.random() < 0.3 else None)


def _pair(
    rng: np.random.Generator, canvas: Canvas, centre: Point, half_width: float, half_height: float
) -> None:
    """Two mirrored organs (lungs, kidneys, ventricles), one label or two."""
    offset = rng.uniform(0.2, 0.55) * half_width
    y = centre[1] + rng.uniform(-0.4, 0.4) * half_height
    radius, aspect = rng.uniform(0.15, 0.9) * offset, float(rng.uniform(0.35, 1.2))
    left = outline(rng, (-offset, 0.0), radius, aspect=aspect, rough=0.2, angle=rng.normal() * 0.3)
    right = left * (-1, 1) * rng.uniform(0.9, 1.1, 2)
    first = canvas.polygon(left + np.array([centre[0], y]))
    part_of = first if rng.random() < 0.3 else None
    second = canvas.polygon(right + np.array([centre[0], y]), part_of=part_of)
    canvas.parents[second] = canvas.parents[first]


def rings(rng: np.random.Generator, canvas: Canvas) -> None:
    """Nested closed walls: a cavity in a muscle, a cord in its canal, beside neighbours."""
    if rng.random() < 0.6:
        body(rng, canvas)
    for _ in range(int(rng.integers(1, 4))):
        centre = place(rng, canvas, 0.25)
        radius = log_uniform(rng, 0.05, 0.25) * canvas.side
        for _ in range(int(rng.integers(1, 3))):
            away = rng.uniform(0, 2 * np.pi)
            reach = radius * rng.uniform(1.0, 2.0)
            beside = (centre[0] + reach * np.cos(away), centre[1] + reach * np.sin(away))
            contour = any_outline(rng, beside, radius * rng.uniform(0.5, 1.2))
            canvas.polygon(contour, target=rng.random() > 0.3)
        aspect, angle = float(rng.uniform(0.7, 1.4)), float(rng.uniform(0, np.pi))
        rough = rng.uniform(0.02, 0.12)
        for _ in range(int(rng.integers(2, 5))):
            contour = outline(rng, centre, radius, aspect=aspect, rough=rough, angle=angle)
            canvas.polygon(contour, target=rng.random() > 0.2)
            radius *= rng.uniform(0.45, 0.88)


def lesion(rng: np.random.Generator, canvas: Canvas) -> None:
    """One large irregular object in a plain field, made of differing parts (skin, mucosa)."""
    centre = place(rng, canvas, 0.35)
    radius = rng.uniform(0.1, 0.36) * min(canvas.shape)
    if rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 5))):  # folds and pigment around it
            fold = rng.uniform(0.1, 0.5) * canvas.side
            canvas.polygon(any_outline(rng, place(rng, canvas), fold), target=False)
    aspect, rough = float(np.exp(rng.normal() * 0.3)), rng.uniform(0.05, 0.3)
    number = canvas.polygon(outline(rng, centre, radius, aspect=aspect, rough=rough))
    before = canvas.pixels()
    for _ in range(int(rng.integers(0, 6))):
        spot = (centre[0] + rng.normal() * radius * 0.5, centre[1] + rng.normal() * radius * 0.5)
        size = radius * rng.uniform(0.15, 0.6)
        canvas.polygon(outline(rng, spot, size, rough=0.35), part_of=number)
    canvas.replace(np.where(before == number, canvas.pixels(), before))


def bones(rng: np.random.Generator, canvas: Canvas) -> None:
    """Long shafts with a marrow of their own and round heads, over soft tissue."""
    for _ in range(int(rng.integers(1, 3))):
        radius = rng.uniform(0.25, 0.5) * canvas.side
        canvas.polygon(any_outline(rng, place(rng, canvas, 0.3), radius), target=False)
    for _ in range(int(rng.integers(1, 5))):
        start, width = place(rng, canvas), rng.uniform(0.05, 0.18) * canvas.side
        length, heading = rng.uniform(0.3, 0.9) * canvas.side, rng.uniform(0, 2 * np.pi)
        along = np.array([np.cos(heading), np.sin(heading)])
        middle = np.array(start) + along * length / 2
        contour = outline(
            rng,
            (middle[0], middle[1]),
            np.sqrt(length * width) / 2,
            aspect=length / width,
            rough=0.03,
            exponent=4,
            angle=heading,
        )
        bone = canvas.polygon(contour)
        head = outline(rng, start, width * rng.uniform(0.6, 1.0), rough=0.12)
        canvas.polygon(head, part_of=bone if rng.random() < 0.6 else None)
        if rng.random() < 0.6:
            marrow = outline(
                rng,
                (middle[0], middle[1]),
                np.sqrt(length * width * 0.4) / 2,
                aspect=length * 0.9 / (width * 0.5),
                rough=0.03,
                angle=heading,
            )
            canvas.polygon(marrow, part_of=bone)
    for _ in range(int(rng.integers(0, 8)) if rng.random() < 0.3 else 0):  # ribs
        rib = tube(rng, canvas, place(rng, canvas), 0.6 * canvas.side, 0.03 * canvas.side)
        canvas.polygon(rib, target=False)


SCENES: dict[str, tuple[Callable[[np.random.Generator, Canvas], None], float]] = {
    "organs": (organs, 0.22),
    "shapes": (shapes, 0.14),
    "rings": (rings, 0.12),
    "tissue": (tissue, 0.11),
    "cells": (cells, 0.12),
    "lesion": (lesion, 0.11),
    "bones": (bones, 0.06),
    "blobs": (blobs, 0.05),
    "tubes": (tubes, 0.04),
    "tiles": (tiles, 0.03),
}
"""Scene → how it is drawn and its share of the images."""


def draw_scene(rng: np.random.Generator, shape: tuple[int, int]) -> Scene:
    """A random scene of (H, W) pixels."""
    names = list(SCENES)
    shares = np.array([SCENES[name][1] for name in names])
    kind = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    canvas = Canvas(shape)
    SCENES[kind][0](rng, canvas)
    if rng.random() < 0.5:
        strength, cell_count = rng.uniform(0.003, 0.03), rng.uniform(2, 10)
        canvas.replace(warp(rng, canvas.pixels(), strength, cell_count))
    return canvas.scene(kind)
