"""Deflated DICOM (Deflated Explicit VR Little Endian): unpacked within a bound.

pydicom unpacks such a file at once and to any size. Here its length is counted first, in a buffer
of fixed size, and the header is read from the first bytes alone; the whole is unpacked once it is
known to be what the header says.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from ..core.errors import InputError
from ..files.damage import reason_of
from .scans import MAX_VOLUME_BYTES

_SYNTAX = b"1.2.840.10008.1.2.1.99"
_PLAIN_SYNTAX = b"1.2.840.10008.1.2.1\0\0\0"
_META_START = b"DICM\2\0\0\0UL\4\0"
_META_BYTES = 4096
"""What is looked at for the transfer syntax; the element groups before the data have less."""
_BLOCK_BYTES = 1024 * 1024
_AFTER_BYTES = 4096
"""What may follow the compressed data: an even length is filled up."""


def is_deflated(path: Path) -> bool:
    """Whether a file says that its data set is deflated."""
    with path.open("rb") as stream:
        start = stream.read(_META_BYTES)
    return start[128:140] == _META_START and _SYNTAX in start[140 : _data_start(start)]


def inflated(path: Path, limit: int) -> tuple[bytes, int]:
    """A deflated file as one that is not: its first bytes, and how many it has in all.

    Args:
        path: see `is_deflated`.
        limit: how many bytes are kept.

    Raises:
        InputError: cut short, damaged, or more than `scans.MAX_VOLUME_BYTES`.
    """
    with path.open("rb") as stream:
        start = stream.read(_META_BYTES)
        data_start = _data_start(start)
        kept = bytearray(start[:data_start].replace(_SYNTAX, _PLAIN_SYNTAX))
        size = data_start
        stream.seek(data_start)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            while not unpack.eof:
                packed = unpack.unconsumed_tail or stream.read(_BLOCK_BYTES)
                if not packed:
                    raise InputError(f"{path} was cut short in its deflated data: fetch it again")
                block = unpack.decompress(packed, _BLOCK_BYTES)
                size += len(block)
                kept += block[: max(0, limit - len(kept))]
                if size > MAX_VOLUME_BYTES:
                    raise InputError(
                        f"{path} has more than {MAX_VOLUME_BYTES} bytes once it is inflated; it is "
                        "damaged or made to do harm"
                    )
        except zlib.error as error:
            raise InputError(
                f"{path}: its deflated data are damaged: {reason_of(error)}"
            ) from error
        if len(unpack.unused_data) + len(stream.read(_AFTER_BYTES)) > _AFTER_BYTES:
            raise InputError(f"{path}: bytes follow its deflated data; the file is damaged")
    return bytes(kept), size


def _data_start(start: bytes) -> int:
    """Where the data set starts, behind the group of elements that say how it is written."""
    return 144 + int.from_bytes(start[140:144], "little")
