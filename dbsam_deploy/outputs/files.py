"""Which files a segmentation is written to, and their contents: one writer for each format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from ..extras import require
from ..files.atomic import write_files, writing_to
from ..files.publication import replacing, tidy
from ..files.user_paths import user_path
from ..images.scans import require_nibabel
from ..images.volumes import Volume, label_map_bytes, label_npz_bytes, no_grid, png_bytes
from . import dicom_seg, rtstruct
from .dicom_sources import find_sources
from .object_statistics import csv_bytes, json_bytes, mean_confidence
from .segmentation import Segmentation

FRACTIONS = "dicom-seg-fractional"
"""The format that needs probabilities."""
ENDINGS = {
    "nifti": "_mask.nii.gz",
    "npz": "_mask.npz",
    "png": "_mask.png",
    "dicom-seg": "_seg.dcm",
    FRACTIONS: "_fractional_seg.dcm",
    "rtstruct": "_rtstruct.dcm",
    "csv": "_statistics.csv",
    "json": "_statistics.json",
}
"""Format → ending of its file. A volume's PNG files lie in a folder, `_mask`."""

OVERLAY = "overlay"


def own_formats(image: Volume) -> tuple[str, ...]:
    """What is written where no format is asked for: that of the input."""
    if image.geometry is not None or image.unplaced:
        return ("nifti",)
    return ("npz",) if image.is_volume else ("png", "npz")


def planned(
    image: Volume,
    formats: Sequence[str],
    folder: str | Path,
    stem: str | None = None,
    *,
    overlay: bool = False,
) -> dict[str, Path]:
    """Where a segmentation of `image` will be written, checked before any work.

    Args:
        image: what will be segmented.
        formats: of `ENDINGS`; without any `own_formats`.
        folder: made when it is written.
        stem: start of the names; by default the name of the image.
        overlay: whether the caller draws a picture, too, `overlay`; `write` leaves it to him.

    Returns:
        Format → path, a folder for the PNG files of a volume.

    Raises:
        InputError: an unknown format, one that cannot hold this image, or a file that was read as
            input.
        MissingError: a package that the format needs is not installed.
    """
    folder = user_path(folder)
    start = _stem(image) if stem is None else stem
    paths = {}
    for name in dict.fromkeys(formats or own_formats(image)):
        if name not in ENDINGS:
            raise InputError(f"format {name!r}: expected one of {', '.join(ENDINGS)}")
        _check_holds(name, image)
        ending = ENDINGS[name].removesuffix(".png" if image.is_volume else "")
        paths[name] = folder / f"{start}{ending}"
    if overlay:
        paths[OVERLAY] = folder / f"{start}_overlay.png"
    for path in paths.values():
        if os.path.exists(path) and any(path.samefile(source) for source in image.files):
            raise InputError(f"{path} is the input itself: choose another --output folder")
    return paths


def _stem(image: Volume) -> str:
    stem = image.path.resolve().name
    if image.path.is_dir():
        return stem  # what follows a dot is no suffix: `1.2.840.7`
    for suffix in (".nii.gz", ".nii", image.path.suffix):
        stem = stem.removesuffix(suffix)
    return stem


def _check_holds(name: str, image: Volume) -> None:
    if name == "nifti":
        if image.geometry is None:
            raise InputError(f"{image.path}: {no_grid(image)}, which NIfTI needs: use --format npz")
        require_nibabel()
    elif name.startswith("dicom-seg"):
        dicom_seg.check_writable(image)
    elif name == "rtstruct":
        require("contourpy", extra="dicom", what_for=rtstruct.WHAT)
        find_sources(image, rtstruct.WHAT)


def write(segmentation: Segmentation, paths: Mapping[str, Path]) -> tuple[Path, ...]:
    """Write a segmentation in every format, each file whole or not at all, none before all are.

    Args:
        segmentation: what is written.
        paths: format → path, see `planned`.

    Returns:
        What was written, in the order of `paths`.

    Raises:
        InputError: a format that cannot hold this segmentation, or a folder that cannot be written.
        MissingError: a package that a format needs is not installed.
    """
    slices = paths.get("png") if segmentation.image.is_volume else None
    contents = {
        path: _CONTENTS[name](segmentation)
        for name, path in paths.items()
        if path != slices and name != OVERLAY
    }
    if slices is None:
        write_files(contents)
    else:
        _check_replaceable(slices)
        with _slices_beside(segmentation, slices):
            write_files(contents)
    return tuple(path for name, path in paths.items() if name != OVERLAY)


def _png(segmentation: Segmentation) -> bytes:
    return png_bytes(segmentation.labels[0])


def _nifti(segmentation: Segmentation) -> bytes:
    return label_map_bytes(segmentation.labels, segmentation.image)


def _npz(segmentation: Segmentation) -> bytes:
    """Beside the label map: `confidence` (N, D), and `label_ids` with their `label_names`."""
    more = {}
    if segmentation.alternatives is not None:
        more["alternatives"] = segmentation.alternatives
    return label_npz_bytes(
        segmentation.labels,
        segmentation.image,
        mean_confidence(segmentation),
        confidence=segmentation.confidence,
        label_ids=np.array([one.label for one in segmentation.objects], np.int64),
        label_names=np.array([one.name for one in segmentation.objects], np.str_),
        **more,
    )


_CONTENTS: dict[str, Callable[[Segmentation], bytes]] = {
    "nifti": _nifti,
    "npz": _npz,
    "png": _png,
    "dicom-seg": dicom_seg.binary_bytes,
    FRACTIONS: dicom_seg.fractional_bytes,
    "rtstruct": rtstruct.rtstruct_bytes,
    "csv": csv_bytes,
    "json": json_bytes,
}


def content_of(segmentation: Segmentation, format_name: str) -> bytes:
    """A segmentation as one file of a format, `png` for an image of one slice.

    Raises:
        InputError: a format that cannot hold this segmentation.
        MissingError: a package that the format needs is not installed.
    """
    return _CONTENTS[format_name](segmentation)


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder with anything else than pictures, since it is replaced as a whole."""
    if not os.path.lexists(folder):
        return
    with writing_to(folder):
        others = [entry.name for entry in folder.iterdir() if entry.suffix != ".png"]
    if others:
        raise InputError(
            f"{folder} holds {others[0]!r}, and would be replaced by the slices as PNG: move it"
        )


@contextmanager
def _slices_beside(segmentation: Segmentation, folder: Path) -> Iterator[None]:
    """One PNG a slice, `000.png` and so on; the folder is replaced as a whole after the block."""
    with writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        with replacing(folder) as fresh:
            for index, plane in enumerate(segmentation.labels):
                (fresh / f"{index:03d}.png").write_bytes(png_bytes(plane))
            yield
