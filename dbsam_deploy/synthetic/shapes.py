"""Random scenes for synthetic images: which pixel belongs to which region, and which are objects.

In the manner of SynthSeg's domain randomisation (Billot et al., Med. Image Anal. 2023), but with
label maps that are drawn too: the network is to learn boundaries in general, not anatomy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ..core.imaging import FloatArray
from .fields import IntMap, fractal_noise, ramps, require_scipy, smooth_noise, warp

Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """A drawing of R regions.

    Attributes:
        kind: which scene it is, a key of `SCENES`.
        regions: (H, W) int32 in 0 … R - 1, 0 is the background.
        objects: (R,) int32, the object that each region belongs to; 0 where it is no object.
        parents: (R,) int32, the region on which each was drawn.
    """

    kind: str
    regions: IntMap
    objects: npt.NDArray[np.int32]
    parents: npt.NDArray[np.int32]

    @property
    def labels(self) -> IntMap:
        """(H, W) int32 label map of the objects."""
        return np.asarray(np.take(self.objects, self.regions))


class Canvas:
    """Draws regions one over another; later ones hide earlier ones."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.height, self.width = shape
        self.side = max(shape)
        self._image = Image.new("I", (self.width, self.height))
        self._draw = ImageDraw.Draw(self._image)
        self.objects = [0]
        self.parents = [0]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def at(self, point: Point) -> int:
        """Region at `point` (x, y), the background outside."""
        x, y = int(point[0]), int(point[1])
        inside = 0 <= x < self.width and 0 <= y < self.height
        return int(self._image.getpixel((x, y))) if inside else 0  # type: ignore[arg-type]

    def region(self, parent: int, *, target: bool = True, part_of: int | None = None) -> int:
        """A new region's number: an object of its own, a part of region `part_of`'s, or neither."""
        number = len(self.objects)
        own = number if target else 0
        self.objects.append(own if part_of is None else self.objects[part_of])
        self.parents.append(parent)
        return number

    def polygon(
        self,
        points: npt.NDArray[np.floating],
        *,
        target: bool = True,
        part_of: int | None = None,
    ) -> int:
        """Fill the polygon of (n, 2) x, y points as a new region."""
        parent = self.at((float(points[:, 0].mean()), float(points[:, 1].mean())))
        number = self.region(parent, target=target, part_of=part_of)
        self._draw.polygon([(float(x), float(y)) for x, y in points], fill=number)
        return number

    def mask(self, mask: npt.NDArray[np.bool_], number: int) -> None:
        """Give the pixels of `mask` (H, W) to region `number`."""
        pixels = self.pixels()
        pixels[mask] = number
        self.replace(pixels)

    def pixels(self) -> IntMap:
        """A copy of the drawing, (H, W) int32."""
        return np.array(self._image, np.int32)

    def replace(self, pixels: IntMap) -> None:
        """Go on from another drawing with the same regions."""
        self._image = Image.fromarray(np.ascontiguousarray(pixels, np.int32), "I")
        self._draw = ImageDraw.Draw(self._image)

    def scene(self, kind: str) -> Scene:
        """The finished drawing."""
        objects, parents = (np.array(v, np.int32) for v in (self.objects, self.parents))
        return Scene(kind, self.pixels(), objects, parents)


def outline(
    rng: np.random.Generator,
    centre: Point,
    radius: float,
    *,
    aspect: float = 1.0,
    rough: float = 0.15,
    exponent: float = 2.0,
    angle: float | None = None,
) -> FloatArray:
    """Closed contour: a superellipse whose radius is disturbed by a few random harmonics.

    Args:
        rng: the random state.
        centre: x, y in pixels.
        radius: geometric mean of the half axes in pixels.
        aspect: ratio of the half axes.
        rough: strength of the disturbance relative to the radius.
        exponent: 2 an ellipse, larger boxy, smaller a diamond.
        angle: direction of the first half axis in radians, random by default.

    Returns:
        (n, 2) float32 x, y.
    """
    count = int(np.clip(radius * 1.5, 16, 160))
    theta = np.linspace(0, 2 * np.pi, count, endpoint=False)
    orders = np.arange(2, 9)
    size = rng.standard_normal(len(orders)) * rough / orders**0.8
    waves = np.cos(theta[:, None] * orders + rng.uniform(0, 2 * np.pi, len(orders)))
    reach = np.maximum(radius * (1 + waves @ size), 0.15 * radius)
    cos, sin = np.cos(theta), np.sin(theta)
    x = reach * np.sign(cos) * np.abs(cos) ** (2 / exponent) * np.sqrt(aspect)
    y = reach * np.sign(sin) * np.abs(sin) ** (2 / exponent) / np.sqrt(aspect)
    turn = rng.uniform(0, np.pi) if angle is None else angle
    return np.stack(
        [
            centre[0] + np.cos(turn) * x - np.sin(turn) * y,
            centre[1] + np.sin(turn) * x + np.cos(turn) * y,
        ],
        axis=1,
    ).astype(np.float32)


def any_outline(rng: np.random.Generator, centre: Point, radius: float) -> FloatArray:
    """A contour of a random family: round, lobed, boxy, long, or a polygon with corners."""
    family = rng.integers(5)
    if family == 4:
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        reach = radius * rng.uniform(0.6, 1.3, len(corners))
        return np.stack(
            [centre[0] + reach * np.cos(corners), centre[1] + reach * np.sin(corners)], axis=1
        ).astype(np.float32)
    return outline(
        rng,
        centre,
        radius,
        aspect=float(np.exp(rng.uniform(-1.1, 1.1) * (1.6 if family == 3 else 0.6))),
        rough=float(rng.uniform(0.25, 0.5) if family == 1 else rng.uniform(0, 0.2)),
        exponent=float(rng.uniform(2.5, 6) if family == 2 else rng.uniform(1.6, 2.4)),
    )


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between `low` and `high`, evenly spread in its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def place(rng: np.random.Generator, canvas: Canvas, margin: float = 0.05) -> Point:
    """A random point (x, y) that keeps `margin` of each side away from the border."""
    low, high = margin, 1 - margin
    return (
        float(rng.uniform(low, high) * canvas.width),
        float(rng.uniform(low, high) * canvas.height),
    )


def shapes(rng: np.random.Generator, canvas: Canvas) -> None:
    """Assorted contours of all sizes, overlapping at will; some are distractors or have parts."""
    for _ in range(int(rng.integers(2, 16))):
        centre, radius = place(rng, canvas), log_uniform(rng, 0.02, 0.3) * canvas.side
        number = canvas.polygon(any_outline(rng, centre, radius), target=rng.random() > 0.15)
        if rng.random() < 0.3:
            inner = radius * rng.uniform(0.2, 0.6)
            part_of = number if rng.random() < 0.5 else None
            canvas.polygon(any_outline(rng, centre, inner), part_of=part_of)


def blobs(rng: np.random.Generator, canvas: Canvas) -> None:
    """Connected pieces of thresholded noise."""
    for _ in range(int(rng.integers(1, 4))):
        noise = fractal_noise(rng, canvas.shape, cells=rng.uniform(2, 9), octaves=3, decay=0.4)
        pieces, count = require_scipy().ndimage.label(noise > rng.uniform(0.6, 1.6))
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        pixels = canvas.pixels()
        numbers = np.zeros(count + 1, np.int32)
        for piece in np.argsort(sizes[1:], kind="stable")[::-1][:12] + 1:
            if sizes[piece] >= 24:
                numbers[piece] = canvas.region(0)
        drawn = np.take(numbers, pieces)
        canvas.replace(np.where(drawn > 0, drawn, pixels))


def tissue(rng: np.random.Generator, canvas: Canvas) -> None:
    """Touching regions that fill the picture or a head-like outline: largest of several fields."""
    count = int(rng.integers(3, 9))
    cells = rng.uniform(2, 6)
    best = smooth_noise(rng, canvas.shape, cells)
    index = np.zeros(canvas.shape, np.int32)
    for number in range(1, count):
        field = smooth_noise(rng, canvas.shape, cells)
        index[field > best] = number
        best = np.maximum(best, field)
    numbers = np.array([canvas.region(0, target=rng.random() > 0.25) for _ in range(count)])
    pixels = np.take(numbers.astype(np.int32), index)
    if rng.random() < 0.6:
        centre = (canvas.width * 0.5, canvas.height * 0.5)
        radius = rng.uniform(0.3, 0.46) * min(canvas.shape)
        aspect = rng.uniform(0.8, 1.3) * canvas.width / canvas.height
        canvas.polygon(outline(rng, centre, radius * 1.1, aspect=aspect, rough=0.03, angle=0.0))
        skull = canvas.pixels()
        canvas.polygon(outline(rng, centre, radius, aspect=aspect, rough=0.03, angle=0.0))
        pixels = np.where(canvas.pixels() == len(canvas.objects) - 1, pixels, skull)
    canvas.replace(pixels)


def tiles(rng: np.random.Generator, canvas: Canvas) -> None:
    """A bent board of touching cells, each its own region: a Voronoi pattern or a checker."""
    y, x = ramps(canvas.shape)
    if rng.random() < 0.5:
        columns, rows = int(rng.integers(2, 7)), int(rng.integers(2, 7))
        index = ((y + 1) * 0.5 * rows).astype(np.int32) * columns
        index = index + ((x + 1) * 0.5 * columns).astype(np.int32)
        count = columns * rows
    else:
        count = int(rng.integers(5, 25))
        sites = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
        index = np.zeros(canvas.shape, np.int32)
        best = np.full(canvas.shape, np.inf, np.float32)
        for number, (row, column) in enumerate(sites):
            distance = (y - row) ** 2 + (x - column) ** 2
            nearer = distance < best
            index[nearer] = number
            best[nearer] = distance[nearer]
    numbers = np.array([canvas.region(0, target=rng.random() > 0.2) for _ in range(count)])
    numbers[rng.random(count) < 0.15] = 0
    canvas.replace(warp(rng, np.take(numbers.astype(np.int32), index), 0.03, rng.uniform(2, 8)))


def tube(
    rng: np.random.Generator, canvas: Canvas, start: Point, length: float, width: float
) -> FloatArray:
    """Contour of a curved strip whose width tapers, (n, 2) float32 x, y."""
    blurred = require_scipy().ndimage.gaussian_filter1d
    steps = int(np.clip(length / 4, 8, 80))
    bend = np.cumsum(rng.standard_normal(steps)) * rng.uniform(0.02, 0.25)
    heading = rng.uniform(0, 2 * np.pi) + blurred(bend, 2)
    centre = np.stack([np.cos(heading), np.sin(heading)], axis=1).cumsum(0) * (length / steps)
    centre += np.array(start)
    normal = np.stack([-np.sin(heading), np.cos(heading)], axis=1)
    half = width / 2 * np.linspace(1, rng.uniform(0.3, 1), steps)
    half = half * (1 + 0.15 * blurred(rng.standard_normal(steps), 2))
    left, right = centre + normal * half[:, None], centre - normal * half[:, None]
    return np.concatenate([left, right[::-1]]).astype(np.float32)


def tubes(rng: np.random.Generator, canvas: Canvas) -> None:
    """Thin curved structures, sometimes branching as one object, over a few large shapes."""
    for _ in range(int(rng.integers(0, 3))):
        radius = rng.uniform(0.15, 0.4) * canvas.side
        canvas.polygon(any_outline(rng, place(rng, canvas), radius), target=False)
    for _ in range(int(rng.integers(1, 7))):
        start, width = place(rng, canvas), max(3.0, log_uniform(rng, 0.008, 0.08) * canvas.side)
        length = rng.uniform(0.2, 1.2) * canvas.side
        trunk = tube(rng, canvas, start, length, width)
        number = canvas.polygon(trunk, target=rng.random() > 0.1)
        for _ in range(int(rng.integers(0, 4))):
            root = trunk[rng.integers(len(trunk))]
            branch = tube(rng, canvas, (root[0], root[1]), length * 0.5, width * 0.7)
            canvas.polygon(branch, part_of=number)


def cells(rng: np.random.Generator, canvas: Canvas) -> None:
    """Many small round objects, in clusters and touching; some sit in a cell body of their own."""
    radius = log_uniform(rng, 0.012, 0.07) * canvas.side
    centres = [place(rng, canvas, 0.0) for _ in range(int(rng.integers(2, 8)))]
    spread, elongation = rng.uniform(0.05, 0.35) * canvas.side, rng.uniform(0.05, 0.5)
    bodies = rng.random() < 0.25
    for _ in range(int(np.clip(rng.uniform(0.03, 0.4) * (canvas.side / radius) ** 2 / 4, 4, 90))):
        cx, cy = centres[int(rng.integers(len(centres)))]
        centre = (cx + rng.normal() * spread, cy + rng.normal() * spread)
        size, aspect = radius * rng.uniform(0.6, 1.35), np.exp(rng.normal() * elongation)
        body = None
        if bodies:
            ring = outline(rng, centre, size * rng.uniform(1.4, 2.2), rough=0.2)
            body = canvas.polygon(ring, target=rng.random() < 0.5)
        nucleus = outline(rng, centre, size, aspect=float(aspect), rough=rng.uniform(0, 0.15))
        part_of = body if body is not None and canvas.objects[body] else None
        canvas.polygon(nucleus, target=rng.random() > 0.05, part_of=part_of)
