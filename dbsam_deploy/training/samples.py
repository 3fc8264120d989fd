"""What training reads: images with or without label maps, from files or from a mixture of sources.

A source holds no state that changes: `sample(index)` depends on the index alone, so that worker
processes can share it and a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray
from ..datasets.cases import CaseFile, LabelledCase, read_case
from ..files.walking import files_below
from ..images.npz_files import (
    check_label_map,
    open_npy,
    read_image_header,
    read_images,
    read_labels,
    stack_shape,
)
from ..images.volumes import PICTURE_SUFFIXES, Volume, read_image
from .decoded import RecentArrays

LabelMap = npt.NDArray[np.int32]

MIN_OBJECT_PX = 16
"""Smaller objects are never prompted for (as in the evaluation)."""
PAIRED_FOLDERS = {"npy_images": "npy_gts", "imgs": "gts"}
"""MedSAM's training folders: images and, beside them, label maps with the same file stems."""
_IMAGE_SUFFIXES = (".npz", ".npy")
_CACHED_FILES = 4
DECODED_BYTES = 1024 * 1024 * 1024
"""Images and label maps that stay decoded, in each process that reads."""


@dataclass(frozen=True)
class Sample:
    """One image to train on.

    Attributes:
        name: file stem and slice, or the generator's seed and index.
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) int32, 0 is background and every other value one object; None without labels.
    """

    name: str
    image: ByteArray
    labels: LabelMap | None


class Source(Protocol):
    """A finite set of samples, each a function of its index alone."""

    @property
    def name(self) -> str:
        """Short name for reports."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether every sample has labels."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """The sample at `index`, 0 ≤ index < len(self)."""
        ...


class Mixture:
    """Draws from several sources in given proportions.

    Args:
        parts: (source, weight) pairs; a source's share of the draws is its weight over their sum.

    Raises:
        InputError: no part, an empty source, or a weight that is not positive and finite.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]) -> None:
        if not parts:
            raise InputError("a mixture of no source: name at least one kind of training data")
        for source, weight in parts:
            if not (np.isfinite(weight) and weight > 0):
                raise InputError(f"{source.name}: weight {weight:g}; expected a number above 0")
            if len(source) == 0:
                raise InputError(f"{source.name}: holds no sample; give more data or leave it out")
        total = sum(weight for _, weight in parts)
        self.sources = tuple(source for source, _ in parts)
        self.shares = tuple(weight / total for _, weight in parts)

    @property
    def labelled(self) -> bool:
        """Whether every sample has labels."""
        return all(source.labelled for source in self.sources)

    def draw(self, rng: np.random.Generator) -> Sample:
        """One sample; the source and the index come from `rng` alone."""
        source = self.sources[int(rng.choice(len(self.sources), p=self.shares))]
        return source.sample(int(rng.integers(len(source))))


@dataclass(frozen=True)
class Inventory:
    """What was found when a source of labelled slices was indexed.

    Attributes:
        files: files (pairs of files) read.
        slices: slices in them.
        objects: objects of at least `MIN_OBJECT_PX` pixels in the slices that are used.
        left_out: slices without such an object; they are never drawn.
    """

    files: int
    slices: int
    objects: int
    left_out: int


@dataclass(frozen=True)
class _Stack:
    """One file's images (D, H, W[, 3]) and where its label maps (D, H, W) are.

    `key` names the array in an npz; None for a plain npy file. `case` is a pair in NIfTI or DICOM.
    """

    images: Path
    labels: Path
    key: str | None
    shape: tuple[int, ...]
    case: CaseFile | None = None

    @property
    def paired(self) -> bool:
        return self.images != self.labels


class LabelledSlices:
    """Slices with label maps, read from disk when they are asked for.

    Reads MedSAM npz files (`imgs` and `gts`) and its training folders `npy_images/*.npz` (key
    `img`) or `*.npy` with `npy_gts/*.npy`, and `imgs/*.npy` with `gts/*.npy`, and the cases that
    `find_cases` finds. Making the index reads all label maps, one file at a time, and of npz the
    images' headers.

    Args:
        paths: cases, files, or folders that are searched with all their sub-folders.
        name: short name for reports; the first path's by default.

    Raises:
        InputError: nothing found, or a file that is damaged, pickled, without labels, with labels
            of another shape, or without any object.
    """

    labelled = True

    def __init__(self, paths: Path | Sequence[Path | CaseFile], name: str | None = None) -> None:
        _load_case.cache_clear()  # files may have changed since another source read them
        _decoded.clear()
        given = [paths] if isinstance(paths, Path) else list(paths)
        found = [file for path in given for file in _find_stacks(path)]
        if not found:
            raise InputError(
                f"{' '.join(map(str, given)) or 'no path'}: no npz files with imgs and gts, and no "
                "folders npy_images and npy_gts, or imgs and gts; see export/examples/README.md"
            )
        self.name = name or given[0].name
        stacks, counts, notes = [], [], list[str]()
        for path in found:  # each is read once for all three
            stacks.append(_open_stack(path))
            counts.append(_object_counts(stacks[-1]))
            if stacks[-1].case is not None:
                notes += _load_case(stacks[-1].case).notes
        self.stacks, self.notes = tuple(stacks), tuple(dict.fromkeys(notes))
        self._slices = np.array(
            [(f, z) for f, per_slice in enumerate(counts) for z in np.flatnonzero(per_slice)],
            np.int32,
        )
        slices = sum(len(per_slice) for per_slice in counts)
        objects = sum(int(per_slice.sum()) for per_slice in counts)
        self.inventory = Inventory(len(found), slices, objects, slices - len(self._slices))

    def __len__(self) -> int:
        return len(self._slices)

    def describe(self) -> str:
        """One line: files, slices, objects, and what is left out."""
        found = self.inventory
        return (
            f"{self.name}: {found.files} files, {found.slices} slices, {found.objects} objects of "
            f"at least {MIN_OBJECT_PX} px; {found.left_out} slices without one are left out"
        )

    def sample(self, index: int) -> Sample:
        """Slice `index` of those with an object.

        Raises:
            InputError: the file changed or was damaged since it was indexed, NaN or infinity, or
                float images outside 0–1.
        """
        file, z = (int(v) for v in self._slices[index])
        stack = self.stacks[file]
        values, labels = _decoded(stack)
        image = _as_uint8(values[z], stack.images)
        rgb = image.copy() if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        stem = stack.images.stem if stack.case is None else stack.case.name
        return Sample(f"{stem}[{z}]", rgb, labels[z].astype(np.int32))


class Images:
    """Images without labels, for distillation: PNG, JPEG and the `imgs` of npz files.

    Args:
        folder: searched with all its sub-folders.
        name: short name for reports; the folder's by default.

    Raises:
        InputError: no such image, or an npz file that is damaged.
    """

    labelled = False

    def __init__(self, folder: Path, name: str | None = None) -> None:
        suffixes = (*PICTURE_SUFFIXES, ".npz")
        files = [path for path in files_below(folder) if path.suffix.lower() in suffixes]
        if not files:
            raise InputError(
                f"{folder}: no {', '.join(suffixes)} file; expected images to learn on"
            )
        self.name = name or folder.name
        depths = [read_image_header(p)[0][0] if p.suffix == ".npz" else 1 for p in files]
        self.files = tuple(files)
        self._slices = np.array([(f, z) for f, d in enumerate(depths) for z in range(d)], np.int32)

    def __len__(self) -> int:
        return len(self._slices)

    def sample(self, index: int) -> Sample:
        """Image or slice `index`, without labels.

        Raises:
            InputError: a damaged or unusable file.
        """
        file, z = (int(v) for v in self._slices[index])
        volume = _load_volume(self.files[file])
        return Sample(f"{self.files[file].stem}[{z}]", volume.slice_rgb(z).copy(), None)


@lru_cache(maxsize=_CACHED_FILES)
def _load_volume(path: Path) -> Volume:
    return read_image(path, with_boxes=False)


@lru_cache(maxsize=1)  # its arrays are kept as those of a stack
def _load_case(case: CaseFile) -> LabelledCase:
    return read_case(case)


def _find_stacks(path: Path | CaseFile) -> Sequence[Path | CaseFile]:
    """Image files below `path` that have, or should have, labels; a pair is found already."""
    if isinstance(path, CaseFile):
        return [path.path if path.labels is None else path]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files = [file for file in files_below(path) if file.suffix in _IMAGE_SUFFIXES]
    label_folders = set(PAIRED_FOLDERS.values())
    return [
        file
        for file in files
        if _labels_of(file) != file
        or (file.suffix == ".npz" and file.parent.name not in label_folders)
    ]


def _labels_of(images: Path) -> Path:
    """Where the label maps of an image file are: the file itself, or its pair."""
    folder = images.parent
    partner = folder.parent / PAIRED_FOLDERS.get(folder.name, folder.name)
    return partner / f"{images.stem}.npy" if partner != folder and partner.is_dir() else images


def _open_stack(path: Path | CaseFile) -> _Stack:
    if isinstance(path, CaseFile):
        shape = _load_case(path).volume.pixels.shape
        return _Stack(path.path, path.labels or path.path, None, shape, path)
    labels = _labels_of(path)
    if path.suffix == ".npy":
        if labels == path:
            raise InputError(
                f"{path}: no label map; expected it in {path.parent.parent}/npy_gts or gts, with "
                "the images in npy_images or imgs"
            )
        array = open_npy(path)
        key, shape, dtype = (
            None,
            stack_shape(array.shape, "the array", path, is_stack=True),
            array.dtype,
        )
    else:
        key = "imgs" if labels == path else "img"
        shape, dtype = read_image_header(path, key)
    if dtype != np.uint8 and dtype.kind != "f":
        raise InputError(f"{path}: images are {dtype}; expected uint8 (0–255) or float (0–1)")
    if not labels.is_file():
        raise InputError(f"{path}: its label map {labels} is missing")
    return _Stack(path, labels, key, shape)


def _read_labels(stack: _Stack) -> npt.NDArray[Any]:
    shape = stack.shape[:3]
    if stack.case is not None:
        labels = _load_case(stack.case).labels
    elif not stack.paired:
        labels = read_labels(stack.labels, shape)
    else:
        array = open_npy(stack.labels)
        check_label_map(array.shape, array.dtype, shape, stack.labels)
        labels = array.reshape(shape)
    if labels.dtype.itemsize > 1:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > np.iinfo(np.int32).max:
            raise InputError(f"{stack.labels}: labels {low}–{high}; expected 0 and above")
    return labels


def _object_counts(stack: _Stack) -> npt.NDArray[np.int64]:
    """Objects of at least `MIN_OBJECT_PX` pixels in each slice, (D,)."""
    labels = _read_labels(stack)
    counts = np.array([len(objects_in(plane)) for plane in labels])
    if not counts.any():
        found = "no object" if not labels.any() else f"no object of {MIN_OBJECT_PX} pixels or more"
        raise InputError(
            f"{stack.labels}: {found} in its {len(labels)} label maps; leave the file out"
        )
    return counts


def objects_in(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The labels of a map (H, W) that have at least `MIN_OBJECT_PX` pixels, in order, without 0."""
    if labels.max() < 2**16 and labels.min() >= 0:  # counting is much faster than sorting
        sizes = np.bincount(labels.ravel())
        ids = np.flatnonzero(sizes)
        sizes = sizes[ids]
    else:
        ids, sizes = np.unique(labels, return_counts=True)
    return np.asarray(ids[(sizes >= MIN_OBJECT_PX) & (ids != 0)], np.int64)


def _load_stack(stack: _Stack) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images and label maps of one file."""
    if stack.case is not None:
        values = _load_case(stack.case).volume.pixels
    elif stack.key is None:
        values = open_npy(stack.images)
        shape = stack_shape(values.shape, "the array", stack.images, is_stack=True)
        values = values.reshape(shape)
    else:
        values = read_images(stack.images, stack.key)
    if values.shape != stack.shape:
        raise InputError(
            f"{stack.images} changed while it was in use: {values.shape}, but {stack.shape} when "
            "the run began"
        )
    return values, _read_labels(stack)


_decoded = RecentArrays(_load_stack, DECODED_BYTES)


def _as_uint8(plane: npt.NDArray[Any], path: Path) -> ByteArray:
    if plane.dtype == np.uint8:
        return np.asarray(plane)
    low, high = float(plane.min()), float(plane.max())  # NaN where there is one
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"{path}: float images with values {low:g}–{high:g}; expected finite values in 0–1, or "
            "uint8 images"
        )
    return np.rint(plane * 255).astype(np.uint8)
