"""Files that a browser sends: in memory, and for a reader in a private folder that is gone at once.

Nothing of what a browser calls a file reaches the disk: what a file is, its content says.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..images.intensity import Window
from ..images.nifti import read_nifti
from ..images.volumes import SOFT_TISSUE, SOFT_TISSUE_TEXT, Volume, from_scan, read_image
from .images import finite, is_ct
from .refusal import NotServedError

MAX_FILES = 20_000
_SERIES_ADVICE = " with --series UID or NUMBER (Python: series=...)"
"""Of a command line, which the page has not."""
_LENGTH = struct.Struct("<I")
_MAX_HEAD_BYTES = 1024 * 1024
_LARGEST = 1e15
"""Of a window's numbers; JSON has whole ones that no float holds."""
_STARTS = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"BM", ".bmp"),
    (b"PK\x03\x04", ".npz"),
    (b"\x1f\x8b", ".nii.gz"),
)
_PLACES = (
    (8, (b"WEBP",), ".webp"),
    (344, (b"n+1\0",), ".nii"),
    (4, (b"n+2\0",), ".nii"),
    (128, (b"DICM",), ".dcm"),
)
"""Where in a file which letters stand, and what it is then."""


@dataclass(frozen=True, eq=False)
class Upload:
    """What a page opens.

    Attributes:
        files: their contents.
        window: level and width, "file" for the one that DICOM names, or None.
        series: of a DICOM folder, where it holds several.
    """

    files: tuple[bytes | memoryview, ...]
    window: Window | str | None = None
    series: str | None = None

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(map(len, self.files))


def read_upload(body: bytes | bytearray) -> Upload:
    """The files of a request: a number of four bytes, so much JSON (`sizes`), then file by file.

    Raises:
        InputError: another form, or sizes that do not fit.
    """
    head = {}
    if len(body) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(body)
        with contextlib.suppress(ValueError, RecursionError):
            end = _LENGTH.size + min(length, _MAX_HEAD_BYTES)
            head = json.loads(bytes(body[_LENGTH.size : end]))
    sizes = head.get("sizes") if isinstance(head, dict) else None
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= MAX_FILES:
        raise InputError(f"an upload without a list of sizes: expected 1 to {MAX_FILES} files")
    if not all(type(size) is int and 0 <= size <= len(body) for size in sizes):
        raise InputError(f"an upload whose sizes are no whole numbers from 0 to {len(body)}")
    place = _LENGTH.size + length
    if place + sum(sizes) != len(body):
        raise InputError(f"an upload of {len(body)} bytes: its files have {sum(sizes)} by its list")
    files, view = [], memoryview(body)
    for size in sizes:
        files.append(view[place : place + size])
        place += size
    return Upload(tuple(files), _window(head.get("window")), _series(head.get("series")))


def _window(given: Any) -> Window | str | None:
    if given is None or given == "file":
        return given
    if isinstance(given, list) and len(given) == 2:
        level, width = given
        if all(type(n) in (int, float) and abs(n) < _LARGEST for n in given):
            return float(level), float(width)
    raise InputError(f"window {given!r:.60}: expected level and width")


def _series(given: Any) -> str | None:
    if given is not None and not (isinstance(given, str) and len(given) <= 64):
        raise InputError(f"series {given!r:.60}: expected a UID or a number as text")
    return given


def suffix_of(content: bytes | memoryview) -> str:
    """What kind of file this is, as the ending of a name; empty for none that is known."""
    start = bytes(content[:352])
    found = [ending for letters, ending in _STARTS if start.startswith(letters)]
    found += [end for at, words, end in _PLACES if any(start[at:].startswith(w) for w in words)]
    return found[0] if found else ""


@contextlib.contextmanager
def lying_in_a_folder(files: Mapping[str, bytes | memoryview]) -> Iterator[Path]:
    """The files under names of ours, in a folder for this user alone that is deleted at the end.

    Raises:
        NotServedError: 507, they cannot be put there.
    """
    with contextlib.ExitStack() as stack:
        try:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="dbsam_page_"))
            folder = Path(name)
            for own_name, content in files.items():
                (folder / own_name).write_bytes(content)
        except OSError as error:
            text = f"no room for temporary files on the server: {error.strerror}"
            raise NotServedError(507, text) from error
        try:
            yield folder
        except InputError as error:
            raise _without(folder, error) from error


def read_uploaded(upload: Upload) -> Volume:
    """The image in an upload: one picture, NIfTI or npz file, or DICOM files.

    Raises:
        InputError: a file of another kind, or see `read_image`; no path of this machine is named.
    """
    names = numbered(upload)
    with lying_in_a_folder(names) as folder:
        (first, *more) = names
        source = folder if more else folder / first
        if not more and first.endswith((".nii", ".nii.gz")):
            image = _read_nifti(source, upload.window)
        else:
            image = read_image(source, window=upload.window, with_boxes=False, series=upload.series)
        return replace(
            image,
            path=Path("image"),
            files=tuple(Path(path.name) for path in image.files),
            notes=tuple(_plain(note, folder) for note in image.notes),
        )


def _read_nifti(path: Path, window: Window | str | None) -> Volume:
    """As other viewers' images are seen: CT by its values, and none that is not finite."""
    if isinstance(window, str):
        raise InputError("NIfTI names no window of its own")
    scan = read_nifti(path)
    scan = replace(scan, values=finite(scan.values))
    # What fills gaps tells nothing of the image.
    told = scan.values if scan.padding is None else scan.values[~scan.padding]
    if window is None and is_ct(told):
        return from_scan(path, "nifti", scan, SOFT_TISSUE, SOFT_TISSUE_TEXT)
    return from_scan(path, "nifti", scan, window)


def numbered(upload: Upload) -> dict[str, bytes | memoryview]:
    """Names of ours → contents; several files can only be DICOM.

    Raises:
        InputError: one file of a kind that is not read.
    """
    if len(upload.files) > 1:
        return {f"file_{n}{suffix_of(one)}": one for n, one in enumerate(upload.files, 1)}
    (content,) = upload.files
    ending = suffix_of(content)
    if not ending:
        raise InputError(
            "the file is none that is read: expected PNG, JPEG, TIFF, BMP, WebP, NIfTI (.nii, "
            ".nii.gz), npz or DICOM"
        )
    return {f"file_1{ending}": content}


@contextlib.contextmanager
def with_sources(image: Volume, upload: Upload | None) -> Iterator[Volume]:
    """The image with the files that it was read from, for a format that refers to them."""
    if upload is None:
        yield image
        return
    names = numbered(upload)
    wanted = {path.name: names[path.name] for path in image.files}
    with lying_in_a_folder(wanted) as folder:
        yield replace(image, path=folder, files=tuple(folder / path for path in image.files))


def _plain(text: str, folder: Path) -> str:
    return text.replace(f"{folder}/", "").replace(str(folder), "the folder")


def _without(folder: Path, error: InputError) -> InputError:
    """The same in words of the page's user, who knows no folder of this machine."""
    text = _plain(error.message, folder).replace(_SERIES_ADVICE, "")
    return InputError(text, *(_plain(line, folder) for line in error.details))
