"""Boxes and target masks for the objects of a training sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..core.masks import mask_box
from ..synthetic.fields import require_scipy
from .samples import LabelMap, Sample, objects_in

PAPER_FRAME, CODED_FRAME = 1024, 256
_ALIKE = 0.1
"""Largest difference of two objects that are one, as a share of the image's range."""


@dataclass(frozen=True)
class Growth:
    """How far each side of a box is moved outwards, at random.

    Attributes:
        px: the largest move.
        frame: length of the image's longer side in which `px` counts.
        whole: draw whole pixels 0 … px - 1, as the official code's `randint(0, px)`, instead of
            real numbers 0 … px.
        tight: how often a box does not grow at all.
        even: how often all four sides move by one amount, else each by its own up to one that is
            drawn for the box. Where both are 0 every side is drawn on its own.
    """

    px: float = 20.0
    frame: int = PAPER_FRAME
    whole: bool = False
    tight: float = 0.0
    even: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.px <= self.frame) or self.frame < 1 or (self.whole and self.px < 1):
            raise InputError(f"box growth of {self.px:g} px in a frame of {self.frame} px")


PAPER_GROWTH = Growth()
"""Uniform 0–20 px on the 1024 scale, as the paper says."""
CODED_GROWTH = Growth(px=20, frame=CODED_FRAME, whole=True)
"""`randint(0, 20)` on the 256 grid, four times as far, as the official code does."""


@dataclass(frozen=True)
class TrainingPrompts:
    """N objects to segment.

    Attributes:
        boxes: (N, 4) float32 x0, y0, x1, y1 in the image frame, inside the image.
        masks: (N, H, W) bool.
    """

    boxes: FloatArray
    masks: npt.NDArray[np.bool_]


def draw_prompts(
    sample: Sample,
    count: int,
    growth: Growth,
    rng: np.random.Generator,
    *,
    split: float = 0.0,
    together: float = 0.0,
) -> TrainingPrompts:
    """Choose up to `count` objects of a sample, of various sizes, with a box each.

    Args:
        sample: with labels.
        count: the largest number of objects.
        growth: see `Growth`.
        rng: decides which objects and how far the boxes reach.
        split: how often a label of several separate pieces stands for one of them. A piece is
            taken only where its box holds no other piece of the label, so that the box says
            which is meant.
        together: how often an object and the one most like it in brightness are one.

    Raises:
        InputError: a sample without labels or without an object of `MIN_OBJECT_PX` pixels.
    """
    if sample.labels is None:
        raise InputError(f"{sample.name} has no labels; expected a labelled source")
    ids = objects_in(sample.labels)
    if count < 1 or len(ids) == 0:
        raise InputError(f"{sample.name}: {len(ids)} objects to choose {count} from")
    masks = [
        _with_its_like(sample, label, ids) if together and rng.random() < together
        else sample.labels == label
        for label in _varied(sample.labels, ids, count, rng)
    ]  # fmt: skip
    masks = [_one_piece(mask, rng) if rng.random() < split else mask for mask in masks]
    boxes = np.stack([_grown(mask, growth, rng) for mask in masks])
    return TrainingPrompts(boxes, np.stack(masks))


def _varied(
    labels: LabelMap, ids: npt.NDArray[np.int64], count: int, rng: np.random.Generator
) -> list[int]:
    """`count` labels: one at random from each of `count` groups of similar size."""
    if len(ids) <= count:
        return [int(label) for label in rng.permutation(ids)]
    sizes = np.array([np.count_nonzero(labels == label) for label in ids])
    order = ids[np.lexsort((rng.random(len(ids)), sizes))]
    return [int(rng.choice(group)) for group in np.array_split(order, count)]


def _with_its_like(sample: Sample, label: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """An object and the other one whose mean is nearest, within a tenth of the image's range."""
    if sample.labels is None or len(ids) < 2:
        return np.asarray(sample.labels == label)
    grey = sample.image.mean(-1)
    means = {int(i): float(grey[sample.labels == i].mean()) for i in ids}
    other = min((i for i in means if i != label), key=lambda i: abs(means[i] - means[label]))
    near = abs(means[other] - means[label]) <= _ALIKE * (float(grey.max()) - float(grey.min()))
    return np.asarray(np.isin(sample.labels, [label, other] if near else [label]))


def _one_piece(mask: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    ndimage = require_scipy().ndimage
    pieces, number = ndimage.label(mask, np.ones((3, 3)))
    alone = []
    for piece, place in enumerate(ndimage.find_objects(pieces), start=1):
        inside = pieces[place]
        own = int((inside == piece).sum())
        if own >= 16 and int((inside > 0).sum()) == own:
            alone.append(piece)
    if number < 2 or not alone:
        return mask
    return np.asarray(pieces == rng.choice(alone))


def _moves(growth: Growth, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """How far each side moves outwards in the growth's frame, (4,)."""
    if growth.whole:
        return rng.integers(0, int(growth.px), 4).astype(np.float64)
    if not growth.tight and not growth.even:
        return rng.uniform(0, growth.px, 4)
    kind, most = rng.random(), rng.uniform(0, growth.px)
    if kind < growth.tight:
        return np.zeros(4)
    return np.full(4, most) if kind < growth.tight + growth.even else rng.uniform(0, most, 4)


def _grown(mask: npt.NDArray[np.bool_], growth: Growth, rng: np.random.Generator) -> FloatArray:
    box = mask_box(mask)
    moves = _moves(growth, rng)
    height, width = mask.shape
    box += moves * (max(height, width) / growth.frame) * (-1, -1, 1, 1)
    return np.clip(box, 0, (width, height, width, height)).astype(np.float32)
