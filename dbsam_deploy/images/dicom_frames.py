"""One slice of a DICOM image: a whole file, or one frame of an enhanced multi-frame file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from .dicom_files import DicomFile

FLOAT = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DicomSlice:
    """One slice as its file describes it.

    Attributes:
        file: where its pixels are.
        index: which frame of the file, from 0.
        position: (3,) mm, centre of the first pixel in the patient (left, posterior, superior), and
            as written, since that tells how it was rounded; None where the file has none.
        orientation: (6,) directions of a row and of a column; None where the file has none.
        pixel_spacing: (row, column) mm; None where the file has none.
        thickness: mm; 0 where the file has none.
        gap: SpacingBetweenSlices in mm; 0 where the file has none.
        number: its number in the series; None where the file has none.
        values: data set that says what stored values mean (rescale, modality LUT).
        shown: data set that says how they are shown (window, VOI LUT).
    """

    file: DicomFile
    index: int
    position: FLOAT | None
    orientation: FLOAT | None
    pixel_spacing: FLOAT | None
    thickness: float
    gap: float
    number: int | None
    values: Any
    shown: Any
    decimals: tuple[int, int] = (6, 6)


def frames_of(file: DicomFile) -> list[DicomSlice]:
    """The slices of one file, in the order in which it stores them.

    Raises:
        InputError: several frames without functional groups that place them, or damaged numbers.
    """
    header = file.header
    count = int(header.get("NumberOfFrames", 1) or 1)
    shared = _first(header.get("SharedFunctionalGroupsSequence"))
    each = header.get("PerFrameFunctionalGroupsSequence")
    if each is None and shared is None:
        if count > 1:
            raise InputError(
                f"{file.path}: {count} frames without a place of their own (a film or an older "
                "multi-frame kind); convert it to NIfTI first (dcm2niix)"
            )
        return [_frame(file, 0, (header,))]
    groups = list(each or [])
    if groups and len(groups) != count:
        raise InputError(
            f"{file.path}: {count} frames, but {len(groups)} descriptions of frames; the file is "
            "damaged"
        )
    groups = groups or [None] * count
    return [_frame(file, i, (own, shared, header)) for i, own in enumerate(groups)]


def _frame(file: DicomFile, index: int, sources: tuple[Any, ...]) -> DicomSlice:
    """A frame from its own functional groups, the shared ones, and the file's top level."""
    place = _macro(sources, "PlanePositionSequence", "ImagePositionPatient")
    plane = _macro(sources, "PlaneOrientationSequence", "ImageOrientationPatient")
    measures = _macro(sources, "PixelMeasuresSequence", "PixelSpacing")
    number = file.header.get("InstanceNumber")
    own = len(sources) > 1
    return DicomSlice(
        file,
        index,
        position=_numbers(file, place, "ImagePositionPatient", 3),
        orientation=_numbers(file, plane, "ImageOrientationPatient", 6),
        pixel_spacing=_numbers(file, measures, "PixelSpacing", 2),
        thickness=_number(file, measures, "SliceThickness"),
        gap=_number(file, measures, "SpacingBetweenSlices"),
        number=None if number is None or own else int(number),
        values=_macro(sources, "PixelValueTransformationSequence", "RescaleSlope"),
        shown=_macro(sources, "FrameVOILUTSequence", "WindowCenter"),
        decimals=(
            _decimals(place.get("ImagePositionPatient")),
            _decimals(plane.get("ImageOrientationPatient")),
        ),
    )


def _first(sequence: Any) -> Any:
    return sequence[0] if sequence else None


def _macro(sources: tuple[Any, ...], sequence: str, keyword: str) -> Any:
    """The item of a functional group that holds `keyword`, or else the top level."""
    for source in sources[:-1]:
        item = None if source is None else _first(source.get(sequence))
        if item is not None and (keyword in item or len(item)):
            return item
    return sources[-1]


def _numbers(file: DicomFile, source: Any, name: str, count: int) -> FLOAT | None:
    value = source.get(name)
    if value is None:
        return None
    numbers = np.array(value, np.float64).reshape(-1)
    if len(numbers) == 0:
        return None
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise InputError(f"{file.path}: {name} is {value}; expected {count} finite numbers")
    return numbers


def _number(file: DicomFile, source: Any, name: str) -> float:
    value = source.get(name)
    number = 0.0 if value is None else float(value)
    if not np.isfinite(number):
        raise InputError(f"{file.path}: {name} is {value}; expected a finite number")
    return abs(number)


def _decimals(values: Any) -> int:
    """Most digits behind the point among decimal strings: what they were rounded to."""
    digits = [0]
    for value in values if values is not None and not isinstance(values, float) else ():
        text = str(getattr(value, "original_string", None) or repr(float(value))).strip().lower()
        mantissa, _, exponent = text.partition("e")
        behind = mantissa.partition(".")[2].rstrip("0")
        digits.append(len(behind) - int(exponent or 0))
    return max(digits)
