"""Endless labelled images by domain randomisation: a drawn scene, painted and then degraded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import InputError
from ..synthetic.appearance import choose_style, paint
from ..synthetic.degradations import degrade
from ..synthetic.scenes import draw_scene
from .samples import Sample

SIDES = (128, 512)
"""Shortest and longest side of an image in pixels."""
MIN_OBJECT_PX = 16
_ATTEMPTS = 20


@dataclass(frozen=True)
class Synthetic:
    """A source of `count` synthetic images; the same seed and index give the same bytes.

    Between machines with another BLAS or JPEG library single grey values may differ by 1.

    Attributes:
        seed: another seed gives other images.
        count: how many there are; each is made when it is asked for.
    """

    seed: int
    count: int = 1_000_000

    @property
    def name(self) -> str:
        """`synthetic` and the seed."""
        return f"synthetic[{self.seed}]"

    @property
    def labelled(self) -> bool:
        """True: the drawing is the label map."""
        return True

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        """Image `index` with its label map; at least one object has `MIN_OBJECT_PX` pixels.

        Raises:
            InputError: an index outside 0 … count - 1.
        """
        if not 0 <= index < self.count:
            raise InputError(f"{self.name}: index {index}; expected 0–{self.count - 1}")
        rng = np.random.default_rng([self.seed, index])
        for _ in range(_ATTEMPTS):
            scene = draw_scene(rng, _random_shape(rng))
            labels = scene.labels
            if np.bincount(labels.ravel())[1:].max(initial=0) >= MIN_OBJECT_PX:
                style = choose_style(rng, scene)
                image = degrade(rng, paint(rng, scene, style), style)
                return Sample(f"synthetic[{self.seed}:{index}]", image, labels)
        raise RuntimeError(f"{_ATTEMPTS} scenes without an object")


def _random_shape(rng: np.random.Generator) -> tuple[int, int]:
    low, high = SIDES
    longer = int(rng.integers(low, high + 1))
    if rng.random() < 0.5:
        return longer, longer
    shorter = max(low, int(longer * rng.uniform(0.6, 1)))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
