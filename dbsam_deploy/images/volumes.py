"""Reads a picture, MedSAM npz, NIfTI file or DICOM series as RGB slices, and writes masks back.

Coordinates: every format becomes slices of H×W pixels, (D, H, W) in memory; a box is
(x0, y0, x1, y1) with x along W and y along H, and slice k is `pixels[k]`. A 2D image has D = 1. For
NIfTI, x and y are the stored array's first and second axis (see `scans`). A picture is
turned upright as its EXIF orientation says: boxes and masks are in what every viewer shows.

A 3D box is (x0, y0, z0, x1, y1, z1) and covers the slices z0 … z1 - 1. The `boxes` of a 3D npz in
MedSAM's challenge format name their last slice instead; they are converted when read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..core.contract import IOU_PREDICTIONS, MAX_IMAGE_PIXELS
from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from ..files.user_paths import user_path
from .dicom import read_dicom
from .dicom_files import looks_like_dicom
from .intensity import Intensity, Window, to_uint8
from .nifti import read_nifti
from .npz_files import read_npz
from .quiet import without_stderr
from .scans import Provenance, Scan, nifti_bytes

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
OWN_WINDOW = "file"
"""As a window: the one that a DICOM file names itself."""
SOFT_TISSUE = (40.0, 400.0)
"""Level and width in HU of the CVPR 2024 challenge for CT."""
SOFT_TISSUE_TEXT = (
    "soft-tissue window level 40 width 400 HU (the CVPR 2024 challenge's), as no window was given"
)

PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_ORIENTATION, _PHOTOMETRIC = 0x0112, 262

# Pillow logs some faults of a file, which without a handler would be printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Volume(Provenance):
    """One image or volume, ready to segment.

    Attributes:
        path: the file or folder it was read from.
        kind: `picture`, `npz`, `nifti` or `dicom`.
        pixels: (D, H, W) grey or (D, H, W, 3) RGB uint8.
        intensity: how the stored values became 0–255.
        boxes: the file's own prompts, (n, 4) for an image or (n, 6) half-open for a volume.
        member: which volume of a 4D NIfTI file it is, where one was named.
    """

    path: Path
    kind: str
    pixels: ByteArray
    intensity: Intensity
    boxes: FloatArray | None = None
    member: int | None = None

    @property
    def is_volume(self) -> bool:
        """Whether there is more than one slice."""
        return len(self.pixels) > 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W."""
        depth, height, width = self.pixels.shape[:3]
        return depth, height, width

    def slice_rgb(self, index: int) -> ByteArray:
        """Slice `index` as (H, W, 3) uint8 RGB."""
        pixels = self.pixels[index]
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def read_image(
    path: str | Path,
    *,
    window: Window | str | None = None,
    with_boxes: bool = True,
    series: str | int | None = None,
    volume: int | None = None,
) -> Volume:
    """Read any supported image.

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP, `.npz`, `.nii`, `.nii.gz`, one DICOM file, or a
            folder with DICOM files.
        window: (level, width) that maps stored values to 0–255, for example (40, 400) for soft
            tissue in CT, or "file" for the window that a DICOM file names itself. Without it uint8
            data are taken as they are, CT in DICOM by the soft-tissue window, and other values are
            clipped to the 0.5–99.5 percentiles, see `to_uint8`.
        with_boxes: read the prompts stored in an npz.
        series: SeriesInstanceUID or SeriesNumber, for a folder with several DICOM series.
        volume: which volume of a 4D NIfTI file, from 0.

    Raises:
        InputError: no such file; an unknown, damaged or too large one; values that are not finite;
            a DICOM folder with gaps or several series, see `dicom.read_dicom`.
        EngineError: the format's extra, or a decoder, is not installed.
    """
    path = user_path(path, "the image")
    _check_is_there(path)
    name = path.name.lower()
    if volume is not None:
        _check_is_nifti(path, volume)
    known = (*PICTURE_SUFFIXES, ".npz", ".nii", ".nii.gz")
    is_dicom = name.endswith((".dcm", ".dicom")) or (
        not name.endswith(known) and looks_like_dicom(path)
    )
    if path.is_dir() or is_dicom:
        return _read_dicom(path, window, series)
    window = _without_dicom_options(path, window, series)
    if name.endswith(PICTURE_SUFFIXES):
        return _read_picture(path, window)
    if name.endswith(".npz"):
        return _from_npz(path, window, with_boxes)
    if name.endswith((".nii", ".nii.gz")):
        return replace(
            from_scan(path, "nifti", read_nifti(path, volume=volume), window), member=volume
        )
    raise InputError(
        f"{path}: unknown kind of file; expected {', '.join(PICTURE_SUFFIXES)}, .npz, .nii, "
        ".nii.gz, DICOM or a folder with a DICOM series"
    )


def _check_is_there(path: Path) -> None:
    if not os.path.exists(path):  # unlike Path.exists, False for an impossible name
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        regular_size(path)


def _check_is_nifti(path: Path, volume: int) -> None:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"volume {volume}: {path} is no NIfTI, which alone holds several")


def _without_dicom_options(
    path: Path, window: Window | str | None, series: str | int | None
) -> Window | None:
    if isinstance(window, str):
        raise InputError(f"window {window!r}: {path} is no DICOM; expected (level, width)")
    if series is not None:
        raise InputError(f"series {series!r}: {path} is no DICOM, which alone has series")
    return window


def _read_dicom(path: Path, window: Window | str | None, series: str | int | None) -> Volume:
    if isinstance(window, str) and window != OWN_WINDOW:
        raise InputError(f'window {window!r}: expected (level, width) or "{OWN_WINDOW}"')
    own = window == OWN_WINDOW
    scan = read_dicom(path, series=None if series is None else str(series), own_window=own)
    text = ""
    if isinstance(window, str):
        window, text = (127.5, 255.0), scan.own_window
    elif window is None and scan.is_ct:
        window, text = SOFT_TISSUE, SOFT_TISSUE_TEXT
    return from_scan(path, "dicom", scan, window, text)


def from_scan(
    path: Path, kind: str, scan: Scan, window: Window | None, window_text: str = ""
) -> Volume:
    """A scan that was read, as slices; `window` and errors as `to_uint8`."""
    pixels, intensity = to_uint8(
        scan.values,
        window,
        path,
        excluded=scan.padding,
        is_inverted=scan.is_inverted,
        window_text=window_text,
    )
    return Volume(path, kind, pixels, intensity, **Provenance.of(scan))


def _read_picture(path: Path, window: Window | None) -> Volume:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags that nothing here reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _check_sums(path)
            with path.open("rb") as file, Image.open(file, formats=PICTURE_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError
                turned = _turned(image)  # Pillow turns a TIFF itself, and forgets the tag
                load_pixels(image)
                values, notes = picture_values(image, path)
                notes = notes if turned == notes[: len(turned)] else (*turned, *notes)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{path}: more than {MAX_IMAGE_PIXELS} pixels; crop or downsample it"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise InputError(
            f"{path} is not a readable PNG, JPEG, TIFF, BMP or WebP: {reason_of(error)}"
        ) from error
    pixels, intensity = to_uint8(values[None], window, path, notes=notes)
    return Volume(path, "picture", pixels, intensity, files=(path,))


def _turned(image: Image.Image) -> tuple[str, ...]:
    """What turns an open picture upright, in words.

    Raises:
        InputError: several pages or frames, or white stored as 0 in more than 8 bits.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera adds small copies of the one picture
        raise InputError(
            f"a {image.format} of {frames} pages or frames: expected one; save the one that is "
            "meant as a file of its own, or all of them as (D, H, W) in an npz"
        )
    if image.format == "TIFF":
        _check_strips(image)
    if image.format == "TIFF" and image.mode not in ("1", "L"):
        tags = getattr(image, "tag_v2", {})
        if tags.get(_PHOTOMETRIC) == 0:
            raise InputError("a TIFF with more than 8 bits in which 0 is white: invert it first")
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        return (f"turned upright as its EXIF orientation {orientation} says",)
    return ()


def _check_strips(image: Image.Image) -> None:
    """Refuse a TIFF whose strips or tiles are fewer than its size needs: Pillow leaves the rest 0.

    Raises:
        InputError: they do not cover it.
    """
    tiles = [tile[1] for tile in getattr(image, "tile", ())]
    pixels = getattr(image, "_tile_size", image.size)  # as stored, before it is turned
    covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in tiles)
    if tiles and covered < pixels[0] * pixels[1]:
        raise InputError(
            f"a TIFF of {pixels[0]}×{pixels[1]} pixels, of which its strips hold {covered}: the "
            "file is damaged"
        )


def _check_sums(path: Path) -> None:
    """Compare the checksums of a PNG, which Pillow does not do for the pixels it decodes."""
    with path.open("rb") as file, Image.open(file, formats=PICTURE_FORMATS) as image:
        if image.format == "PNG":
            image.verify()


def load_pixels(image: Image.Image) -> None:
    """Decode an open picture.

    Pillow 13 maps the file of a grey TIFF into memory, and where the picture is to be turned by 90
    degrees it takes the width for the height: other pixels, without a word. It maps only what it
    opened by name.
    """
    name = getattr(image, "filename", "")
    if image.format == "TIFF" and name:
        image.filename = ""  # type: ignore[attr-defined]
    try:
        with without_stderr() if image.format == "TIFF" else contextlib.nullcontext():
            image.load()  # libtiff prints
    finally:
        if name:
            image.filename = name  # type: ignore[attr-defined]


def picture_values(
    image: Image.Image, path: Path | None = None
) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """(H, W) or (H, W, 3) values of an open picture, and remarks on what was converted.

    Args:
        image: a loaded picture.
        path: its file, if it has one.
    """
    notes = _turned(image)
    kind, image = image.format, ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image), notes
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")), (
            "transparency over black",
        )
    if kind == "PNG" and path is not None:
        with path.open("rb") as stream:
            bit_depth = stream.read(26)[24]
        # Pillow keeps 16 bits of a grey PNG (mode I;16) but only the high byte of a colour one.
        notes = (*notes, "high byte of 16-bit colour") if bit_depth == 16 else notes
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")), notes


def _from_npz(path: Path, window: Window | None, with_boxes: bool) -> Volume:
    content = read_npz(path, with_boxes=with_boxes)
    pixels, intensity = to_uint8(content.values, window, path)
    return Volume(
        path, "npz", pixels, intensity, content.boxes, spacing_mm=content.spacing_mm, files=(path,)
    )


def label_dtype(count: int) -> type[np.uint8] | type[np.uint16]:
    """Smallest type for labels 0…count.

    Raises:
        InputError: more than 65535 prompts.
    """
    if count > np.iinfo(np.uint16).max:
        raise InputError(f"{count} prompts: a label map holds at most 65535")
    return np.uint8 if count <= np.iinfo(np.uint8).max else np.uint16


def png_bytes(labels: npt.NDArray[Any]) -> bytes:
    """(H, W) uint8 or uint16 labels, or (H, W, 3) uint8 RGB, as the content of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, format="PNG")
    return stream.getvalue()


def npz_bytes(**arrays: Any) -> bytes:
    """Arrays as the content of a compressed `.npz` file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def label_npz_bytes(labels: Any, volume: Volume, ious: FloatArray, **more: Any) -> bytes:
    """(D, H, W) labels as the content of an `.npz` file: `segs`, (H, W) of an image, `spacing`.

    Args:
        labels: what `volume` was segmented into.
        volume: the image.
        ious: (N,) float32, predicted IoU of each object.
        more: further arrays.
    """
    arrays = {"segs": labels if volume.is_volume else labels[0], IOU_PREDICTIONS: ious, **more}
    if volume.spacing_mm is not None:
        arrays["spacing"] = np.array(volume.spacing_mm, np.float64)
    return npz_bytes(**arrays)


def no_grid(volume: Volume) -> str:
    """Why a volume without geometry has none, in words."""
    if volume.unplaced:
        return f"its slices {volume.unplaced} and form no straight grid"
    return "it has no position in space"


def label_map_bytes(labels: npt.NDArray[Any], volume: Volume, *, compressed: bool = True) -> bytes:
    """(D, H, W) labels as `.nii.gz` or `.nii` content with the geometry of `volume`.

    Raises:
        InputError: `volume` has no geometry.
        EngineError: nibabel is not installed.
    """
    if volume.geometry is None:
        raise InputError(
            f"{volume.path}: {no_grid(volume)}, which NIfTI needs: save it as .npz (--format npz)"
        )
    return nifti_bytes(labels, volume.geometry, compressed=compressed)
