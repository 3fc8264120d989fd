"""Which files at a path are DICOM, and their headers, read within bounds.

A file of a series that cannot be read is refused by its name, never passed over: a volume with a
slice less looks like any other. What is plainly no DICOM (a licence, a thumbnail) is named instead.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import InputError
from ..extras import require
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from .dicom_inflating import inflated, is_deflated
from .scans import MAX_VOLUME_BYTES

MAX_FILES = 20_000
"""Most files that are looked at below a folder."""
MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Most bytes of one header; real ones have kilobytes, with thousands of frames a few megabytes."""
MAX_HEADER_ITEMS = 200_000
"""Most items of sequences in one header; each becomes an object of a kilobyte and more."""
MAX_HEADER_READS = 1_000_000
"""Most reads of one header, about three for each element."""

DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
_DIRECTORY = "1.2.840.10008.1.3.10"
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
"""How a data set without a preamble starts: group 2 or 8, in either byte order."""

HEADER_TAGS = (
    *("SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber"),
    "InstanceNumber",
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"),
    *("SpacingBetweenSlices", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "PixelSpacing"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "RescaleIntercept"),
    *("RescaleSlope", "RescaleType", "VOILUTFunction", "ModalityLUTSequence", "VOILUTSequence"),
    *("RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    *("SegmentedBluePaletteColorLookupTableData", "PaletteColorLookupTableUID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("SegmentSequence", "SegmentationType", "MaximumFractionalValue", "ReferencedSeriesSequence"),
)


@dataclass(frozen=True)
class DicomFile:
    """One DICOM file, without its pixels.

    Attributes:
        path: the file.
        header: pydicom data set of the elements that reading an image or segmentation needs.
        transfer_syntax: UID of the encoding of its pixels.
        pixel_bytes: bytes from its pixel data's element to the file's end; 0 without pixel data.
        is_deflated: whether all this lies deflated in the file.
    """

    path: Path
    header: Any
    transfer_syntax: str
    pixel_bytes: int
    is_deflated: bool = False

    def source(self) -> Path | BinaryIO:
        """What pydicom reads the pixels from."""
        if not self.is_deflated:
            return self.path
        return io.BytesIO(inflated(self.path, MAX_VOLUME_BYTES)[0])

    @property
    def kind(self) -> str:
        """What its SOP class is called, such as `CT Image Storage`."""
        uid = self.header.get("SOPClassUID", "")
        return str(getattr(uid, "name", uid)) or "DICOM of no class"

    @property
    def is_image(self) -> bool:
        """Whether it is an image, and no report, plan, segmentation or dose."""
        uid = str(self.header.get("SOPClassUID", ""))
        return "Image" in self.kind or self.kind in (uid, "DICOM of no class")


@dataclass(frozen=True)
class DicomFolder:
    """What lies at a path.

    Attributes:
        images: files with pixels.
        no_images: DICOM files that are none, such as reports.
        others: files that are no DICOM at all.
    """

    images: tuple[DicomFile, ...]
    no_images: tuple[DicomFile, ...] = ()
    others: tuple[Path, ...] = ()


@contextmanager
def reading_dicom(path: Path) -> Iterator[Any]:
    """pydicom, with its warnings muted and its errors turned into one `InputError`.

    Raises:
        InputError: anything that pydicom or a decoder raises.
        MissingError: pydicom is not installed.
    """
    pydicom = require("pydicom", extra="dicom", what_for="DICOM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield pydicom
        except InputError:
            raise
        except (
            *DAMAGED,
            pydicom.errors.InvalidDicomError,
            pydicom.errors.BytesLengthException,
        ) as error:
            raise InputError(f"{path} is not readable DICOM: {reason_of(error)}") from error


def looks_like_dicom(path: Path) -> bool:
    """Whether a regular file has DICOM's preamble, or starts as a data set without one does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or start[:2] in _FIRST_GROUPS


def read_header(path: Path, more: tuple[str, ...] = ()) -> DicomFile:
    """The header of one DICOM file, also of one without preamble.

    Args:
        path: the file.
        more: keywords of elements that are kept beside `HEADER_TAGS`.

    Raises:
        InputError: no DICOM, damaged, or a header beyond the limits.
        MissingError: pydicom is not installed.
    """
    with reading_dicom(path) as pydicom, path.open("rb") as file:
        size = regular_size(path)
        if size == 0:
            raise InputError(f"{path} is empty; expected a DICOM file: fetch it again")
        if not looks_like_dicom(path):
            raise InputError(f"{path} is not DICOM: it has no DICM mark and starts as no data set")
        stream: BinaryIO = file
        deflated = is_deflated(path)
        if deflated:
            content, size = inflated(path, MAX_HEADER_BYTES)
            stream = io.BytesIO(content)
        header = pydicom.dcmread(
            _Bounded(stream, path),
            stop_before_pixels=True,
            force=True,
            defer_size=MAX_HEADER_BYTES,
            specific_tags=[*HEADER_TAGS, *more],
        )
        if "SOPClassUID" not in header and "Rows" not in header:
            raise InputError(f"{path} is not readable DICOM: it ends before it says what it is")
        left = size - stream.tell()
        return DicomFile(path, header, _transfer_syntax(header), left, deflated)


def find_dicom(path: Path) -> DicomFolder:
    """All DICOM files below a folder, or one file.

    Raises:
        InputError: nothing there, too many files, or one of a series that cannot be read.
        MissingError: pydicom is not installed.
    """
    if not path.is_dir():
        file = read_header(path)
        _check_has_pixels(file)
        return DicomFolder((file,))
    found, others = [], []
    for item in _files_below(path):
        if item.name.upper() == "DICOMDIR" or not looks_like_dicom(item):
            others.append(item)
            continue
        try:
            found.append(read_header(item))
        except InputError:
            if has_mark(item):
                raise
            others.append(item)
    _check_others(others, [file.path for file in found])
    directories = [file.path for file in found if file.header.get("SOPClassUID") == _DIRECTORY]
    files = [file for file in found if file.path not in directories]
    for file in files:
        if file.is_image:
            _check_has_pixels(file)
    if not files:
        raise InputError(f"{path}: no DICOM file in this folder")
    return DicomFolder(
        tuple(file for file in files if file.is_image),
        tuple(file for file in files if not file.is_image),
        tuple(sorted([*others, *directories])),
    )


class _Bounded:
    """A file that refuses to give more of itself than a header has."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._bytes = self._reads = self._items = 0
        self.seek, self.tell, self.name = stream.seek, stream.tell, str(path)
        self.close = stream.close

    def read(self, count: int = -1) -> bytes:
        """Like a file's."""
        if count < 0:  # pydicom asks for all the rest only to inflate it, to any size
            raise InputError(f"{self._path}: deflated in an unknown way: convert it with dcmconv")
        content = self._stream.read(min(count, MAX_HEADER_BYTES + 1))
        self._bytes += len(content)
        self._reads += 1
        self._items += sum(content.count(tag) for tag in _ITEM_TAGS)
        if (
            self._bytes > MAX_HEADER_BYTES
            or self._reads > MAX_HEADER_READS
            or self._items > MAX_HEADER_ITEMS
        ):
            raise InputError(
                f"{self._path}: its DICOM header has more than {MAX_HEADER_BYTES >> 20} MiB, "
                f"{MAX_HEADER_ITEMS} items or a million reads; it is damaged or made to do harm"
            )
        return content


def _transfer_syntax(header: Any) -> str:
    """The UID that the file names, or else the plain one that its header turned out to have."""
    named = header.file_meta.get("TransferSyntaxUID")
    if named:
        return str(named)
    implicit, little = header.original_encoding
    if implicit:
        return "1.2.840.10008.1.2"
    return "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"


def _files_below(folder: Path) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder, onerror=_cannot_look):
        links = [name for name in folders if Path(root, name).is_symlink()]  # not followed
        folders.sort()
        files += [Path(root, name) for name in sorted([*names, *links])]
        if len(files) > MAX_FILES:
            raise InputError(
                f"{folder}: more than {MAX_FILES} files below it; name the folder of one series"
            )
    return files


def _cannot_look(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be looked into: {error.strerror}") from error


def has_mark(path: Path) -> bool:
    """Whether a file has DICOM's preamble."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _check_has_pixels(file: DicomFile) -> None:
    if file.header.get("SOPClassUID") == _DIRECTORY:
        raise InputError(f"{file.path} is an index of DICOM files: name the folder with the images")
    if not file.is_image:
        raise InputError(f"{file.path} is {file.kind}; expected an image")
    if not file.pixel_bytes:
        raise InputError(
            f"{file.path} ends before its pixel data: it was cut short, fetch it again"
        )


def _check_others(others: list[Path], found: list[Path]) -> None:
    """Refuse a file that must be a slice by its name, but is not readable as one."""
    patterns = {_pattern(path) for path in found}
    suffixes = {path.suffix.lower() for path in found}
    for path in others:
        if path.name.upper() == "DICOMDIR":
            continue
        suffix = path.suffix.lower()
        alike = _pattern(path) in patterns
        if suffix in DICOM_SUFFIXES or alike or (suffix in suffixes and not _is_text(path)):
            raise InputError(
                f"{path} {_state(path)}, among the files of a series: a slice would be missing; "
                "fetch it again, or move it out of the folder if it is none"
            )


def _state(path: Path) -> str:
    if not path.is_file():
        return "is no file that can be read" if path.exists() else "is a link to nothing"
    size = path.stat().st_size
    return f"holds {size} bytes that are no DICOM" if size else "is empty"


def _pattern(path: Path) -> str:
    """A file's name with its numbers left out, which the slices of a series mostly share."""
    return re.sub(r"\d+", "#", path.name.lower()) if re.search(r"\d", path.name) else ""


def _is_text(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(4096)
    return bool(start) and b"\0" not in start and start.isascii()
