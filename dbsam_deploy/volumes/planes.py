"""Slices of a volume along any of its axes, as a model wants them: RGB, with square pixels.

Where the pixels of a plane are not square (coronal slices of thick axial ones), the coarser side is
enlarged to the finer spacing, and masks come back to the stored voxels. Coordinates of a slice are
those of its two voxel axes, x before y before z, from its first voxel's corner: (x, y) along axis 0
of the pixels, (x, z) along axis 1, (y, z) along axis 2. The first runs along the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.errors import InputError
from ..core.imaging import ByteArray
from ..images.volumes import Volume
from .frames import Plane, plane_axis

_SQUARE = 0.01
"""By how much of it the sides of a pixel may differ and count as equal."""
_LONGEST = 2048
"""Pixels of the longer side that resampling goes up to, unless more are stored."""

Size = tuple[int, int]


@dataclass(frozen=True)
class PlaneView:
    """One volume's slices along one axis.

    Attributes:
        volume: cut here.
        axis: of (D, H, W), along which the slices are counted.
        square: height and width of a slice as the model sees it.
    """

    volume: Volume
    axis: int
    square: Size

    @property
    def depth(self) -> int:
        """Number of slices."""
        return self.volume.shape[self.axis]

    @property
    def size(self) -> Size:
        """Height and width of a slice in voxels."""
        height, width = (side for axis, side in enumerate(self.volume.shape) if axis != self.axis)
        return height, width

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Between slices, rows and columns, where it is known."""
        spacing = self.volume.spacing_mm
        if spacing is None or not all(0 < step < np.inf for step in spacing):
            return None
        height, width = (step for axis, step in enumerate(spacing) if axis != self.axis)
        return spacing[self.axis], height, width

    def pixels(self, index: int) -> ByteArray:
        """Slice `index` as it is stored, (H, W) grey or (H, W, 3) RGB."""
        return self.volume.pixels[(slice(None),) * self.axis + (index,)]

    def image(self, index: int) -> ByteArray:
        """Slice `index` for the model: `square` (H, W, 3) uint8 RGB."""
        pixels = np.ascontiguousarray(self.pixels(index))
        if self.square != self.size:
            height, width = self.square
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized)
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)

    def to_square(self, coords: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Coordinates of a slice, (..., 2) or boxes (..., 4), in the model's image."""
        (height, width), (rows, columns) = self.size, self.square
        scale = np.tile([columns / width, rows / height], coords.shape[-1] // 2)
        return np.asarray(coords * scale, np.float32)

    def to_stored(self, masks: ByteArray) -> ByteArray:
        """Masks (..., *square) as (..., H, W): a voxel is inside if half of it is."""
        if self.square == self.size:
            return masks
        height, width = self.size
        out = np.empty((*masks.shape[:-2], height, width), np.uint8)
        for place in np.ndindex(*masks.shape[:-2]):
            grey = Image.fromarray(masks[place] * np.uint8(255))
            small = grey.resize((width, height), Image.Resampling.BOX)
            out[place] = np.asarray(small) >= 128
        return out


def view(volume: Volume, plane: Plane = "stored") -> PlaneView:
    """The slices of a plane.

    Raises:
        InputError: see `plane_axis`; slices across the stored ones where the spacing is unknown.
    """
    return view_along(volume, plane_axis(volume, plane))


def view_along(volume: Volume, axis: int) -> PlaneView:
    """The slices along an axis of (D, H, W); errors as `view`."""
    as_stored = PlaneView(volume, axis, (1, 1))
    size, spacing = as_stored.size, as_stored.spacing_mm
    if spacing is None:
        if axis == 0:
            return PlaneView(volume, axis, size)
        raise InputError(
            f"{volume.path}: the distance between its voxels is unknown, without which slices "
            "across the stored ones have no shape: prompt the stored slices"
        )
    rows, columns = spacing[1:]
    if abs(rows - columns) <= _SQUARE * min(rows, columns):
        return PlaneView(volume, axis, size)
    extent = np.array(size) * (rows, columns)
    step = max(min(rows, columns), float(extent.max()) / max(_LONGEST, *size))
    height, width = (max(1, round(float(side) / step)) for side in extent)
    return PlaneView(volume, axis, (height, width))
