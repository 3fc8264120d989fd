"""Zip archives whose directory is read within a bound: npz files and PyTorch's weights."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import DbsamError, InputError
from .regular import regular_size

MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
"""Most bytes of a directory: some 200 000 entries, each of which becomes an object."""

_END_BYTES = 22
_LOCATOR_BYTES = 20
_END64_BYTES = 56


class _Directory(io.BufferedReader):
    """A file that, until its directory was read, gives no more at once than that may have."""

    is_open = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Like a file's."""
        if not self.is_open and size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(
                f"its directory announces {size} bytes; at most {MAX_DIRECTORY_BYTES} are read"
            )
        return super().read(size)


@contextmanager
def open_zip(path: Path, error: type[DbsamError] = InputError) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading.

    Args:
        path: a regular file.
        error: what is raised for another kind.

    Raises:
        DbsamError: of the class `error`: no such file, or a FIFO, socket or device.
        BadZipFile, OSError, ValueError, NotImplementedError, struct.error: damaged, or a directory
            above `MAX_DIRECTORY_BYTES`.
    """
    regular_size(path, error)
    with _Directory(io.FileIO(path)) as stream, zipfile.ZipFile(stream) as archive:
        stream.is_open = True
        yield archive


def plain_sizes(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Name → bytes of an archive that every reader must understand alike.

    Args:
        archive: opened by `open_zip`.
        size: bytes of its file.

    Raises:
        BadZipFile: entries that are compressed, stored twice or overlap, more bytes than the file
            has, or a directory that another reader may look for elsewhere.
    """
    sizes: dict[str, int] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda found: found.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise zipfile.BadZipFile(f"its entry {entry.filename} is compressed")
        if entry.filename in sizes:
            raise zipfile.BadZipFile(f"its entry {entry.filename} is there twice")
        if entry.header_offset < end:
            raise zipfile.BadZipFile(f"its entry {entry.filename} overlaps the one before")
        sizes[entry.filename] = entry.file_size
        end = entry.header_offset + 30 + entry.file_size  # 30: a local header without its name
    if end > archive.start_dir or sum(sizes.values()) > size:
        raise zipfile.BadZipFile(
            f"its directory announces {sum(sizes.values())} bytes; the file has {size}"
        )
    if archive.comment or _start_of_directory(archive) != archive.start_dir:
        raise zipfile.BadZipFile("its directory is not where its end says")
    return sizes


def _start_of_directory(archive: zipfile.ZipFile) -> int:
    stream = archive.fp
    if stream is None:
        raise zipfile.BadZipFile("it is closed")
    stream.seek(0, io.SEEK_END)
    stream.seek(max(0, stream.tell() - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES))
    tail = stream.read().rjust(_END_BYTES + _LOCATOR_BYTES + _END64_BYTES, b"\0")
    if tail[_END64_BYTES:].startswith(b"PK\6\7"):
        return int.from_bytes(tail[48:56], "little")
    return int.from_bytes(tail[-6:-2], "little")
