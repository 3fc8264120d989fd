"""Calibration images: real slices from a folder or file, chosen by a seed, each once, with hashes.

The ranges of a quantised model are only as good as the images they come from. So there is no
default: a path that is missing, holds too few different images or holds noise is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray
from ..files.walking import files_below
from ..images.volumes import PICTURE_SUFFIXES, Volume, read_image
from ..recipe import CALIBRATION_ADVICE, CalibrationPlan

SUFFIXES = (".npz", ".nii", ".nii.gz", *PICTURE_SUFFIXES)
MIN_CORRELATION = 0.2
"""Correlation of neighbouring pixels below which an image is noise; real ones have 0.7 and more."""


@dataclass(frozen=True)
class CalibrationImage:
    """One slice.

    Attributes:
        file: relative to the folder.
        slice: its number in the file.
        sha256: of its RGB pixels.
    """

    file: str
    slice: int
    sha256: str


@dataclass(frozen=True)
class CalibrationSet:
    """What a quantisation sees.

    Attributes:
        folder: where the files lie, whose names are relative to it.
        images: for the ranges.
        held_back: for a sensitivity sweep; from other files, unless there is only one.
    """

    folder: Path
    images: tuple[CalibrationImage, ...]
    held_back: tuple[CalibrationImage, ...]

    def manifest(self) -> dict[str, list[dict[str, Any]]]:
        """For an artefact's manifest: names, slices and hashes, no pixels."""
        return {
            "images": [asdict(image) for image in self.images],
            "held_back": [asdict(image) for image in self.held_back],
        }


def choose_images(path: Path, plan: CalibrationPlan) -> CalibrationSet:
    """Choose slices, spread evenly over the files of a folder; the same ones for the same seed.

    One file is read at a time. Slices of one value and repeated ones are passed over.

    Args:
        path: a folder or one file, see `recipe.CALIBRATION_ADVICE`.
        plan: how many images, and the seed.

    Raises:
        InputError: no such path, too few different images in it, noise, or a damaged file.
        EngineError: a format's extra is not installed.
    """
    folder, files = _find_files(path)
    rng = np.random.default_rng(plan.seed)
    files = [files[i] for i in rng.permutation(len(files))]
    wanted = plan.images + plan.held_back
    aside = max(1, len(files) * plan.held_back // wanted) if len(files) > 1 else 0
    seen: set[str] = set()
    if aside:
        held_back = _pick(folder, files[:aside], plan.held_back, rng, seen)
        while len(held_back) < plan.held_back and aside < len(files) - 1:
            missing = plan.held_back - len(held_back)
            held_back += _pick(folder, files[aside : aside + 1], missing, rng, seen)
            aside += 1
        images = _pick(folder, files[aside:], plan.images, rng, seen)
    else:
        both = _pick(folder, files, wanted, rng, seen)
        images, held_back = both[: plan.images], both[plan.images :]
    if len(images) < plan.images or len(held_back) < plan.held_back:
        raise InputError(
            f"{path}: {len(images) + len(held_back)} different images in {len(files)} files; "
            f"the recipe wants {plan.images} to calibrate and {plan.held_back} held back to judge "
            f"by: {CALIBRATION_ADVICE}"
        )
    return CalibrationSet(folder, tuple(images), tuple(held_back))


def _find_files(path: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the image files at `path`."""
    if path.is_dir():
        files = [item for item in files_below(path) if _is_image(item)]
        if not files:
            raise InputError(f"{path}: no images: {CALIBRATION_ADVICE}")
        return path, files
    if not path.exists():
        raise InputError(f"{path}: no such folder or file: {CALIBRATION_ADVICE}")
    if not _is_image(path):
        raise InputError(f"{path}: unknown kind of file: {CALIBRATION_ADVICE}")
    return path.parent, [path]


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _pick(
    folder: Path, files: Sequence[Path], count: int, rng: np.random.Generator, seen: set[str]
) -> list[CalibrationImage]:
    """Up to `count` slices, an equal share of each file; more of the others where one has too few.

    Args:
        folder: names are relative to it.
        files: in the order in which they are read.
        count: slices wanted.
        rng: chooses slices.
        seen: hashes that are taken; those of the result are added.
    """
    picked: list[CalibrationImage] = []
    share = -(-count // len(files))
    for share_of_file in (share, count):  # the second round only where the first was not enough
        for path in files:
            if len(picked) == count:
                return picked
            taken = sum(image.file == path.relative_to(folder).as_posix() for image in picked)
            limit = min(share_of_file - taken, count - len(picked))
            picked += _slices_of(path, folder, limit, rng, seen)
    return picked


def _slices_of(
    path: Path, folder: Path, limit: int, rng: np.random.Generator, seen: set[str]
) -> list[CalibrationImage]:
    volume = read_image(path, with_boxes=False)
    found: list[CalibrationImage] = []
    for index in rng.permutation(len(volume.pixels)).tolist():
        if len(found) >= limit:
            break
        pixels = volume.slice_rgb(index)
        if pixels.min() == pixels.max():
            continue
        digest = _digest(pixels)
        if digest in seen:
            continue
        name = path.relative_to(folder).as_posix()
        _check_is_no_noise(pixels, f"{name}[{index}]")
        seen.add(digest)
        found.append(CalibrationImage(name, index, digest))
    return found


def _digest(pixels: ByteArray) -> str:
    shape = np.array(pixels.shape, np.int64).tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _check_is_no_noise(pixels: ByteArray, name: str) -> None:
    """Refuse an image whose neighbouring pixels have nothing to do with each other.

    Raises:
        InputError: naming the image.
    """
    grey = pixels.mean(2)
    rows, columns = _correlation(grey[1:], grey[:-1]), _correlation(grey[:, 1:], grey[:, :-1])
    if max(rows, columns) < MIN_CORRELATION:
        raise InputError(
            f"{name} is noise: neighbouring pixels correlate by {max(rows, columns):.2f} (real "
            f"images by 0.7 and more), and ranges measured on noise do not fit images: "
            f"{CALIBRATION_ADVICE}"
        )


def _correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else 1.0


def read_images(
    folder: Path, images: Sequence[CalibrationImage]
) -> Iterator[tuple[CalibrationImage, ByteArray]]:
    """Yield (image, (H, W, 3) uint8 RGB) one after the other; a file is open for all its slices.

    Args:
        folder: of the set.
        images: any of its images.

    Raises:
        InputError: a file that changed since the images were chosen.
    """
    for name, group in groupby(sorted(images, key=lambda i: (i.file, i.slice)), lambda i: i.file):
        volume = read_image(folder / name, with_boxes=False)
        for image in group:
            yield image, _slice(volume, image)


def _slice(volume: Volume, image: CalibrationImage) -> ByteArray:
    if image.slice < len(volume.pixels):
        pixels = volume.slice_rgb(image.slice)
        if _digest(pixels) == image.sha256:
            return pixels
    raise InputError(f"{volume.path}: slice {image.slice} changed while it was in use; start again")
