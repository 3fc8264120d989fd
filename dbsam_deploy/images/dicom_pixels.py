"""Pixels of DICOM files: padding, and stored values → values with a meaning.

The order is the standard's: stored value → modality LUT or rescale → window or VOI LUT → inversion
for MONOCHROME1. Padding is told by the stored value. The last two steps are only prepared here;
`intensity` does them for every format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..extras import require
from .dicom_decoding import check_decodable, decode
from .dicom_frames import DicomSlice
from .scans import check_voxels

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"


@dataclass(frozen=True)
class Pixels:
    """Slices as numbers.

    Attributes:
        values: (D, H, W) rescaled, uint8 where nothing is rescaled and else float32; or
            (1, H, W, 3) uint8 RGB.
        padding: (D, H, W) bool, pixels that hold no measurement; None where there are none.
        is_inverted: whether the lowest value is shown white.
        window: in words, the file's own window that `values` went through (0–255 is then black to
            white); empty where they did not.
    """

    values: npt.NDArray[Any]
    padding: npt.NDArray[np.bool_] | None
    is_inverted: bool
    window: str = ""


def check_pixels(frames: Sequence[DicomSlice], path: Path) -> None:
    """Refuse, from headers alone, what cannot be read or is too large.

    Args:
        frames: of one series, alike in size and kind.
        path: what the user named.

    Raises:
        InputError: no voxel or too many, an unknown kind of pixels, several colour images, or files
            that are shorter than their pixels.
        MissingError: no decoder for the way in which they are compressed.
    """
    header = frames[0].file.header
    check_voxels((len(frames), int(header.Rows), int(header.Columns)), path)
    kind, samples = str(header.PhotometricInterpretation), int(header.SamplesPerPixel)
    expected = {**dict.fromkeys(GREY, 1), PALETTE: 1, **dict.fromkeys(COLOUR, 3)}.get(kind)
    if expected != samples:
        raise InputError(
            f"{path}: pixels are {kind} with {samples} samples; expected grey (MONOCHROME1, "
            f"MONOCHROME2) or colour ({', '.join(COLOUR)}, {PALETTE}); export it as PNG"
        )
    if kind not in GREY and len(frames) > 1:
        raise InputError(f"{path}: {len(frames)} images in colour; name one of them")
    bits = int(header.get("BitsAllocated", 0))
    if bits not in (8, 16, 32) or (bits > 8 and kind in COLOUR):
        raise InputError(f"{path}: {bits} bits for a value of kind {kind}; expected 8 or 16")
    for file in {id(frame.file): frame.file for frame in frames}.values():
        check_decodable(file)


def read_pixels(frames: Sequence[DicomSlice], *, own_window: bool) -> Pixels:
    """Decode and rescale slices.

    Args:
        frames: checked by `check_pixels`, in the order wanted.
        own_window: put the values through the window or VOI LUT of their files.

    Raises:
        InputError: damaged pixels, a modality LUT or rescale that is none, or no window in a file.
    """
    header = frames[0].file.header
    kind = str(header.PhotometricInterpretation)
    if kind not in GREY:
        if own_window:
            raise InputError(f"{frames[0].file.path} is in colour: a window is for grey images")
        return Pixels(_colour(frames[0], kind)[None], None, is_inverted=False)
    shape = (len(frames), int(header.Rows), int(header.Columns))
    values: npt.NDArray[Any] | None = None
    padding: npt.NDArray[np.bool_] | None = None
    windows = []
    for place, stored in _decoded(frames):
        frame = frames[place]
        pad = _padding(stored, frame)
        plane = _rescaled(stored, frame)
        if own_window:
            plane, text = _windowed(plane, frame)
            windows.append(text)
        if values is None:
            values = np.empty(shape, plane.dtype)
        elif plane.dtype != values.dtype:
            values, plane = values.astype(np.float32), plane.astype(np.float32)
        values[place] = plane
        if pad is not None and pad.any():
            padding = np.zeros(shape, bool) if padding is None else padding
            padding[place] = pad
    if values is None:
        raise InputError(f"{frames[0].file.path} holds no pixels")
    return Pixels(values, padding, kind == "MONOCHROME1", _described(windows))


def measured(frames: Sequence[DicomSlice]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(place in `frames`, (H, W) rescaled values, NaN in padding), one file after the other.

    Args:
        frames: grey, as `read_pixels` took them.

    Raises:
        InputError: damaged pixels.
    """
    for place, stored in _decoded(frames):
        values = _rescaled(stored, frames[place]).astype(np.float32)
        padding = _padding(stored, frames[place])
        if padding is not None:
            values[padding] = np.nan
        yield place, values


def _decoded(frames: Sequence[DicomSlice]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(place in `frames`, (H, W) stored values), one file after the other."""
    by_file: dict[Path, dict[int, int]] = {}
    for place, frame in enumerate(frames):
        by_file.setdefault(frame.file.path, {})[frame.index] = place
    files = {frame.file.path: frame.file for frame in frames}
    for path, places in by_file.items():
        for index, plane in enumerate(decode(files[path])):
            if index in places:
                yield places[index], plane


def _padding(stored: npt.NDArray[Any], frame: DicomSlice) -> npt.NDArray[np.bool_] | None:
    header = frame.file.header
    first = header.get("PixelPaddingValue")
    if first is None or stored.dtype.kind not in "ui":
        return None
    last = header.get("PixelPaddingRangeLimit")
    ends = [_as_stored(end, stored.dtype) for end in (first, first if last is None else last)]
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _as_stored(value: Any, dtype: np.dtype[Any]) -> int:
    """A value whose sign the file may have written otherwise than that of its pixels."""
    bits = dtype.itemsize * 8
    wrapped = int(value) & ((1 << bits) - 1)
    return wrapped - (1 << bits) if dtype.kind == "i" and wrapped >> (bits - 1) else wrapped


def _rescaled(stored: npt.NDArray[Any], frame: DicomSlice) -> npt.NDArray[Any]:
    """(H, W) values with a meaning, HU for CT: the modality LUT, else slope and intercept."""
    processing = require("pydicom.pixels.processing", extra="dicom", what_for="DICOM")
    source = frame.values
    if source.get("ModalityLUTSequence"):
        return np.asarray(processing.apply_modality_lut(stored, source), np.float32)
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise InputError(
            f"{frame.file.path}: values are rescaled by slope {slope:g} and intercept "
            f"{intercept:g}; expected finite numbers and a slope that is not 0"
        )
    if (slope, intercept) == (1.0, 0.0):
        return stored if stored.dtype == np.uint8 else stored.astype(np.float32)
    return np.asarray(processing.apply_rescale(stored, _rescale_of(slope, intercept)), np.float32)


def _rescale_of(slope: float, intercept: float) -> Any:
    dataset = require("pydicom", extra="dicom", what_for="DICOM").Dataset()
    dataset.RescaleSlope, dataset.RescaleIntercept = repr(slope), repr(intercept)
    return dataset


def _windowed(values: npt.NDArray[Any], frame: DicomSlice) -> tuple[npt.NDArray[Any], str]:
    """Values through the file's own VOI LUT or window, 0–255, and which in words."""
    pydicom = require("pydicom", extra="dicom", what_for="DICOM")
    processing = require("pydicom.pixels.processing", extra="dicom", what_for="DICOM")
    source = frame.shown
    if source.get("VOILUTSequence"):
        whole = np.rint(values).astype(np.int64)
        shown = processing.apply_voi(whole, source)
        bits = int(source.VOILUTSequence[0].LUTDescriptor[2])
        return shown.astype(np.float32) * np.float32(255 / (2**bits - 1)), "the file's own VOI LUT"
    level, width = _one(source.get("WindowCenter")), _one(source.get("WindowWidth"))
    function = str(source.get("VOILUTFunction") or "LINEAR").upper()
    least = 1 if function == "LINEAR" else 0
    if level is None or width is None:
        raise InputError(f"{frame.file.path} has no window of its own: give level and width")
    if not np.isfinite([level, width]).all() or not width > least:
        raise InputError(
            f"{frame.file.path}: its own window is level {level:g} width {width:g}; expected a "
            f"width above {least}: give level and width"
        )
    plan = pydicom.Dataset()  # 0–255, whatever the range of the stored values
    plan.PhotometricInterpretation, plan.PixelRepresentation, plan.BitsStored = GREY[1], 0, 8
    plan.WindowCenter, plan.WindowWidth, plan.VOILUTFunction = repr(level), repr(width), function
    shown = processing.apply_windowing(values, plan)
    text = f"the file's own window level {level:g} width {width:g}"
    return shown.astype(np.float32), text if function == "LINEAR" else f"{text} ({function})"


def _one(value: Any) -> float | None:
    """The first of one or several views."""
    if value is None or isinstance(value, str):
        return None
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if len(value) else None


def _described(windows: list[str]) -> str:
    kinds = list(dict.fromkeys(windows))
    if len(kinds) > 1:
        return f"{kinds[0]} and {len(kinds) - 1} others, each slice its own"
    return kinds[0] if kinds else ""


def _colour(frame: DicomSlice, kind: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB of one image."""
    _, stored = next(_decoded([frame]))
    if kind == PALETTE:
        processing = require("pydicom.pixels.processing", extra="dicom", what_for="DICOM")
        stored = processing.apply_color_lut(stored, frame.file.header)[..., :3]
        if stored.dtype == np.uint16:
            stored = (stored >> 8).astype(np.uint8)
    if stored.dtype != np.uint8 or stored.shape[2:] != (3,):
        raise InputError(f"{frame.file.path}: colours of type {stored.dtype}; expected 8 bits each")
    return np.ascontiguousarray(stored)
