"""Real images with masks, as prompts and truth for comparisons (MedSAM npz: `imgs`, `gts`)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..core.masks import mask_box
from ..files.walking import files_below
from ..images.npz_files import has_labels, read_image_header, read_images, read_labels
from ..recipe import Parity
from ..resources import resource_dir


@dataclass(frozen=True)
class Case:
    """One image (slice) with N objects.

    Attributes:
        name: file stem and slice.
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) float32 x0, y0, x1, y1 in the image frame, grown by the jitter.
        truth: (N, H, W) bool, one mask an object.
    """

    name: str
    image: ByteArray
    boxes: FloatArray
    truth: npt.NDArray[np.bool_]


def bundled_examples() -> Path:
    """Folder of the CC0 example images that ship with the project."""
    return resource_dir("export") / "examples"


def fewer_or_more(parity: Parity, images: int | None) -> Parity:
    """A comparison with as many images as a user asks for, None for those of the recipe.

    Raises:
        InputError: none at all.
    """
    if images is None:
        return parity
    if images < 1:
        raise InputError(f"--data-images {images}: expected at least 1")
    return replace(parity, images=images)


def load_cases(folder: Path, parity: Parity) -> list[Case]:
    """Read `parity.images` slices, spread evenly over the files of `folder`; all if it has fewer.

    Where a file has too few slices with objects, the others give more. The choice and the jitter
    depend on the files alone, so that runs can be compared.

    Args:
        folder: searched for `*.npz` with `imgs` and `gts`, sub-folders included.
        parity: how many images and objects, and the jitter.

    Raises:
        InputError: no such folder, no npz in it, a damaged one, or no object large enough.
    """
    files = [path for path in files_below(folder) if path.suffix == ".npz"]
    if not files:
        raise InputError(
            f"{folder}: no .npz files with imgs and gts; see export/examples/README.md"
        )
    cases = [
        case for path, found in _choose(files, parity) for case in _cases_of(path, found, parity)
    ]
    if not cases:
        raise InputError(
            f"{folder}: no object of at least {parity.min_object_px} pixels in {len(files)} files"
        )
    return cases


def read_case(path: Path, index: int, image: ByteArray, parity: Parity) -> Case | None:
    """The case of one slice that was read already; None without labels or large enough objects.

    Args:
        path: npz file.
        index: of the slice.
        image: (H, W, 3) uint8 RGB.
        parity: see `load_cases`.

    Raises:
        InputError: a damaged file, or labels of another shape.
    """
    if not has_labels(path):
        return None
    labels = read_labels(path, (read_image_header(path)[0])[:3])[index]
    if not _objects(labels, parity):
        return None
    rng = np.random.default_rng(zlib.crc32(f"{path.name}[{index}]".encode()))
    return _case(f"{path.stem}[{index}]", image, labels, parity, rng)


def _choose(files: list[Path], parity: Parity) -> Iterator[tuple[Path, list[int]]]:
    """Files with the indices of their chosen slices; only files that may have to give are read."""
    filled: dict[int, list[int]] = {}
    while True:
        # Until it is read, a file may have as many as are wanted.
        room = [len(filled[i]) if i in filled else parity.images for i in range(len(files))]
        counts = even_shares(parity.images, room)
        new = next((i for i, count in enumerate(counts) if count and i not in filled), None)
        if new is None:
            break
        filled[new] = _filled_slices(files[new], parity)
    for i, count in enumerate(counts):
        if count:
            yield files[i], [filled[i][k * len(filled[i]) // count] for k in range(count)]


def even_shares(wanted: int, room: Sequence[int]) -> list[int]:
    """How many each gives so that `wanted` come together: equal shares as far as there is room.

    >>> even_shares(7, [9, 1, 9]), even_shares(2, [9, 9, 9]), even_shares(9, [1, 2, 0])
    ([3, 1, 3], [1, 1, 0], [1, 2, 0])
    """
    shares = [0] * len(room)
    for _ in range(min(wanted, sum(room))):
        _, poorest = min((share, i) for i, share in enumerate(shares) if share < room[i])
        shares[poorest] += 1
    return shares


def _filled_slices(path: Path, parity: Parity) -> list[int]:
    labels = read_labels(path, read_image_header(path)[0][:3])
    return [i for i in range(len(labels)) if _objects(labels[i], parity)]


def _cases_of(path: Path, chosen: list[int], parity: Parity) -> list[Case]:
    images = read_images(path)
    labels = read_labels(path, images.shape[:3])
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    return [_case(f"{path.stem}[{i}]", images[i], labels[i], parity, rng) for i in chosen]


def _objects(labels: npt.NDArray[Any], parity: Parity) -> list[int]:
    ids, sizes = np.unique(labels, return_counts=True)
    return [int(i) for i, n in zip(ids, sizes, strict=True) if i and n >= parity.min_object_px]


def _case(
    name: str,
    image: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    parity: Parity,
    rng: np.random.Generator,
) -> Case:
    if image.dtype != np.uint8:
        raise InputError(f"{name}: imgs are {image.dtype}, expected uint8 (0–255)")
    ids = _objects(labels, parity)
    ids = sorted(rng.permutation(ids)[: parity.boxes_per_image].tolist())
    truth = np.stack([labels == i for i in ids])
    rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    jitter = parity.box_jitter_px * max(labels.shape) / 1024
    boxes = np.stack([_grown_box(mask, jitter, rng) for mask in truth])
    return Case(name, np.ascontiguousarray(rgb), boxes, truth)


def _grown_box(mask: npt.NDArray[np.bool_], jitter: float, rng: np.random.Generator) -> FloatArray:
    """Box around the mask's pixels, each side grown by uniform 0–`jitter` px, kept in the image."""
    box = mask_box(mask)
    box += rng.uniform(0, jitter, 4) * (-1, -1, 1, 1)
    height, width = mask.shape
    return np.clip(box, 0, (width, height, width, height)).astype(np.float32)


def deepest_point(mask: npt.NDArray[np.bool_]) -> FloatArray:
    """(2,) x, y of the middle of a pixel that is as far from the mask's border as any is.

    Args:
        mask: (H, W), not empty.
    """
    x0, y0, x1, y1 = mask_box(mask).astype(int)
    left = np.pad(mask[y0:y1, x0:x1], 1)
    while left.any():
        last, inner = left, left.copy()
        inner[1:] &= left[:-1]
        inner[:-1] &= left[1:]
        inner[:, 1:] &= left[:, :-1]
        inner[:, :-1] &= left[:, 1:]
        left = inner
    rows, columns = np.nonzero(last)
    middle = len(rows) // 2
    return np.array([columns[middle] - 1 + x0 + 0.5, rows[middle] - 1 + y0 + 0.5], np.float32)
