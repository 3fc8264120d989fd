"""Pixel data of a DICOM file → stored values, with one decoder for each kind of compression.

Everything is checked before it is decoded: that there is a decoder, that the file has all its
bytes, and that a compressed image is no larger than the header says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError, MissingError
from ..extras import pip_line, require
from ..files.damage import reason_of
from .dicom_files import HEADER_TAGS, MAX_HEADER_BYTES, DicomFile
from .quiet import without_stderr

_EXTENDED_JPEG = "1.2.840.10008.1.2.4.51"
_PREFERRED = ("pydicom", "pyjpegls", "pylibjpeg", "pillow", "gdcm")
"""pydicom's decoding plugins in the order in which one is taken; gdcm also prints on stderr."""
_SIZE_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Second bytes of the JPEG and JPEG-LS markers that hold a frame's height and width."""


def check_decodable(file: DicomFile) -> None:
    """Refuse pixel data that cannot be decoded, is not whole, or is larger than the header says.

    Raises:
        InputError: a kind of compression that nothing decodes, missing bytes or frames, or a
            compressed image of another size than the header's.
        MissingError: the decoder is not installed.
    """
    if not _is_compressed(file):
        expected = _pixel_utils().get_expected_length(file.header)
        lead = 8 if file.header.original_encoding[0] else 12  # tag, kind and length
        found = max(0, file.pixel_bytes - lead)
        if found < expected:
            raise InputError(
                f"{file.path} was cut short: {found} bytes of pixels, expected {expected}: fetch "
                "it again"
            )
        if file.is_deflated and found > expected + MAX_HEADER_BYTES:
            raise InputError(
                f"{file.path}: {found} bytes of pixels once it is inflated, expected {expected}: "
                "it is damaged or made to do harm"
            )
        return
    _choose_decoder(file)
    count = int(file.header.get("NumberOfFrames", 1) or 1)
    size = (int(file.header.Rows), int(file.header.Columns))
    found = 0
    for encoded in _encoded_frames(_whole(file), file, count):
        found += 1
        coded = coded_size(encoded)
        if coded is not None and coded != size:
            raise InputError(
                f"{file.path}: the header says {size[0]}×{size[1]} pixels, the compressed image "
                f"{coded[0]}×{coded[1]}: the file is damaged"
            )
    if found != count:
        raise InputError(
            f"{file.path}: {found} compressed frames; expected {count}: fetch it again"
        )


def decode(file: DicomFile) -> Iterator[npt.NDArray[Any]]:
    """The frames of a file in their order: (H, W) stored values, or (H, W, 3) RGB.

    Raises:
        InputError: damaged pixels.
        MissingError: the decoder is not installed.
    """
    plugin = _choose_decoder(file) if _is_compressed(file) else ""
    try:
        if plugin == "gdcm" and file.transfer_syntax == _EXTENDED_JPEG:
            yield from _by_gdcm(file)
            return
        if not plugin and int(file.header.get("BitsAllocated", 8) or 8) == 1:
            yield from _bits(file)
            return
        # A large plain file is read frame by frame, unless it is encoded in another way than it
        # says, which only pydicom's reading of the whole file copes with.
        named = require("pydicom.uid", extra="dicom", what_for="DICOM").UID(file.transfer_syntax)
        plain = not plugin and file.header.original_encoding[0] == named.is_implicit_VR
        source = file.source() if plain else _whole(file)
        options = {"transfer_syntax_uid": file.transfer_syntax} if plain else {}
        planes = require("pydicom.pixels", extra="dicom", what_for="DICOM").iter_pixels(
            source, decoding_plugin=plugin, **options
        )
        yield from planes
    except (InputError, MissingError):
        raise
    except Exception as error:  # each decoder has its own
        raise InputError(
            f"{file.path}: its pixels cannot be decoded: {reason_of(error)}"
        ) from error


def coded_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width that a compressed frame itself says; None where its kind does not.

    Args:
        encoded: JPEG, JPEG-LS, JPEG 2000 or HTJ2K; other kinds have no size of their own.
    """
    if encoded[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(encoded) and encoded[at] == 0xFF:
            marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
            if marker in _SIZE_MARKERS:
                size = encoded[at + 5 : at + 9]
                return int.from_bytes(size[:2], "big"), int.from_bytes(size[2:], "big")
            at += 1 if marker == 0xFF else 2 + length
        return None
    found = re.search(rb"\xff\x4f\xff\x51", encoded[:4096])
    if found is None or len(encoded) < found.start() + 24:
        return None
    at = found.start() + 8
    width, height, left, top = np.frombuffer(encoded[at : at + 16], ">u4").tolist()
    return height - top, width - left


def _is_compressed(file: DicomFile) -> bool:
    uid = require("pydicom.uid", extra="dicom", what_for="DICOM").UID(file.transfer_syntax)
    return bool(uid.is_transfer_syntax and uid.is_encapsulated)


def _pixel_utils() -> Any:
    return require("pydicom.pixels.utils", extra="dicom", what_for="DICOM")


def _choose_decoder(file: DicomFile) -> str:
    """The plugin of pydicom that decodes a compressed file."""
    pixels = require("pydicom.pixels", extra="dicom", what_for="DICOM")
    uid = require("pydicom.uid", extra="dicom", what_for="DICOM").UID(file.transfer_syntax)
    try:
        available = set(pixels.get_decoder(uid).available_plugins)
    except NotImplementedError:
        raise InputError(
            f"{file.path}: no decoder for {uid.name}: convert the file first, for example with "
            "dcmconv or gdcmconv"
        ) from None
    if uid == _EXTENDED_JPEG and int(file.header.get("BitsStored", 8) or 8) > 8:
        available &= {"gdcm"}
    for name in _PREFERRED:
        if name in available:
            return name
    raise MissingError(f"{file.path}: no decoder for {uid.name} is installed", pip_line("dicom"))


def _whole(file: DicomFile) -> Any:
    """The data set with its pixel data, which must be there to its end."""
    pydicom = require("pydicom", extra="dicom", what_for="DICOM")
    tags = [*HEADER_TAGS, "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData"]
    dataset = pydicom.dcmread(file.source(), force=True, specific_tags=tags)
    if "PixelData" not in dataset:
        raise InputError(f"{file.path} was cut short within its pixel data: fetch it again")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(file.transfer_syntax)
    return dataset


def _encoded_frames(dataset: Any, file: DicomFile, count: int) -> Iterator[bytes]:
    encaps = require("pydicom.encaps", extra="dicom", what_for="DICOM")
    try:
        yield from encaps.generate_frames(dataset.PixelData, number_of_frames=count)
    except Exception as error:
        raise InputError(
            f"{file.path}: its compressed pixels are damaged: {reason_of(error)}"
        ) from error


def _bits(file: DicomFile) -> Iterator[npt.NDArray[Any]]:
    """Frames of one bit a pixel, packed without gaps: pydicom 3.0 cuts one that fills no byte."""
    packed = np.frombuffer(_whole(file).PixelData, np.uint8)
    rows, columns = int(file.header.Rows), int(file.header.Columns)
    for frame in range(int(file.header.get("NumberOfFrames", 1) or 1)):
        start, stop = frame * rows * columns, (frame + 1) * rows * columns
        bits = np.unpackbits(packed[start // 8 : -(-stop // 8)], bitorder="little")
        yield bits[start % 8 :][: rows * columns].reshape(rows, columns)


def _by_gdcm(file: DicomFile) -> Iterator[npt.NDArray[Any]]:
    """JPEG of 12 bits by GDCM itself: pydicom's way to it hands over 8 bits at most."""
    gdcm = require("gdcm", extra="dicom", what_for="JPEG of 12 bits in DICOM")
    header = file.header
    shape = (-1, int(header.Rows), int(header.Columns))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(file.path))
    with without_stderr():  # it tries 8 bits first, and says that they do not do
        if not reader.Read():
            raise InputError(f"{file.path}: its compressed pixels are damaged")
        image = reader.GetImage()
        content = image.GetBuffer().encode("utf-8", "surrogateescape")
    kind = "<i2" if int(header.PixelRepresentation) else "<u2"
    yield from np.frombuffer(content, kind).reshape(shape)
