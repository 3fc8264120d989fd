"""A DICOM series, or one DICOM file, as slices with their place in the patient."""

from __future__ import annotations

from pathlib import Path

from .dicom_files import find_dicom, read_header, reading_dicom
from .dicom_frames import DicomSlice, frames_of
from .dicom_geometry import arrange
from .dicom_pixels import check_pixels, read_pixels
from .dicom_series import choose_series
from .scans import Scan, check_shape


def read_dicom(path: Path, *, series: str | None = None, own_window: bool = False) -> Scan:
    """Read a DICOM series: a folder, with or without folders in it, or one file.

    Slices are sorted by their position along the slice normal; values are rescaled slice by slice
    (HU for CT). See `dicom_series` for what of a folder is read, `dicom_geometry` for stacks that
    form no grid, and `dicom_pixels` for colours and compression.

    Args:
        path: the folder or file.
        series: a SeriesInstanceUID or SeriesNumber, where a folder holds several series.
        own_window: put values through the window that the files name, to 0–255.

    Raises:
        InputError: no DICOM; several series, and none or an unknown one named; a file that cannot
            be read; slices that differ in size, direction or pixel spacing, are missing or stored
            twice; unknown, damaged or too many pixels.
        MissingError: pydicom or a decoder is not installed.
    """
    with reading_dicom(path):
        files, notes = choose_series(path, find_dicom(path), series)
        stack = arrange([frame for file in files for frame in frames_of(file)], path)
        check_pixels(stack.frames, path)
        pixels = read_pixels(stack.frames, own_window=own_window)
        is_ct = is_in_hu(stack.frames[0])
    return Scan(
        pixels.values,
        padding=pixels.padding,
        is_inverted=pixels.is_inverted,
        is_ct=is_ct,
        own_window=pixels.window,
        spacing_mm=stack.spacing_mm,
        geometry=stack.geometry,
        files=tuple(dict.fromkeys(frame.file.path for frame in stack.frames)),
        unplaced=stack.unplaced,
        notes=(*notes, *stack.notes),
    )


def slices_again(
    files: tuple[Path, ...], path: Path, shape: tuple[int, int, int], more: tuple[str, ...] = ()
) -> tuple[DicomSlice, ...]:
    """The slices of a series that was read before, in the same order, by their headers alone.

    Args:
        files: `Scan.files`.
        path: what the user named, for messages.
        shape: D, H, W that it had.
        more: see `read_header`.

    Raises:
        InputError: a file is gone, or the series has another shape by now.
    """
    with reading_dicom(path):
        headers = [read_header(file, more) for file in files]
        slices = arrange([frame for file in headers for frame in frames_of(file)], path).frames
        now = (len(slices), int(slices[0].file.header.Rows), int(slices[0].file.header.Columns))
    check_shape(now, shape, path)
    return slices


def is_in_hu(frame: DicomSlice) -> bool:
    """Whether the rescaled values of a slice are HU."""
    source = frame.values
    rescaled = "RescaleIntercept" in source or "ModalityLUTSequence" in source
    unit = str(source.get("RescaleType") or "HU").upper()
    return bool(frame.file.header.get("Modality") == "CT" and rescaled and unit == "HU")
