"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..core.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NEW = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_ADVICE = {
    errno.ENOSPC: "free some space there, or write elsewhere",
    errno.EDQUOT: "free some of your quota, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "make it writable, or write elsewhere",
    errno.EPERM: "make it writable, or write elsewhere",
    errno.EEXIST: "move what is in the way, or write elsewhere",
    errno.ENOTDIR: "move what is in the way, or write elsewhere",
    errno.EISDIR: "move what is in the way, or write elsewhere",
    errno.ENOTEMPTY: "move what is in the way, or write elsewhere",
    errno.ELOOP: "write elsewhere",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "write elsewhere",
    errno.EIO: "the disk has a fault; write elsewhere",
}
"""What goes wrong with a disk and not with this library → what a user does about it."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn what a disk refuses inside the block into one line for the user.

    Args:
        place: what is being written, for the message.

    Raises:
        InputError: full, read-only, not ours, or something is in the way. Other errors of the
            system are bugs and pass.
    """
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename
        # What is missing is a bug, but for a folder that the system lets nobody make (/proc/out).
        unmade = error.errno == errno.ENOENT and name and Path(name) in (place, *place.parents)
        advice = "write elsewhere" if unmade else _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        where = f" ({name})" if name and str(name) != str(place) else ""
        raise InputError(f"{place} cannot be written: {error.strerror}{where}; {advice}") from error


def locked(handle: int) -> bool:
    """Take an open file for this process until it is closed or the process ends.

    Returns:
        False where another one has it.

    Raises:
        OSError: the file system knows no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_file_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears at `path` when the block ends well, and not at all otherwise.

    A reader, or a run that is killed, sees the earlier file or the whole new one. What a killed run
    leaves, `<name>.partial`, is taken over by the next one that writes `path`.
    """
    partial, handle = _open_partial(path)
    with os.fdopen(handle, "wb") as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if fcntl is None:
                stream.close()  # Windows renames no open file
            partial.replace(path)  # while it is locked: another writer leaves it alone
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _open_partial(path: Path) -> tuple[Path, int]:
    """A file beside `path` that no other writer uses, empty, and its handle."""
    partial = path.with_name(f"{path.name}.partial")
    if fcntl is not None:
        with suppress(OSError):  # somebody else's, or no locks on this file system
            if (handle := _take_over(partial)) is not None:
                return partial, handle
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    return partial, os.open(partial, _NEW | os.O_EXCL, 0o666)


def _take_over(partial: Path) -> int | None:
    """The handle of a file that is ours now, made or left by a killed run; None if it is in use."""
    while True:
        handle = os.open(partial, _NEW, 0o666)
        try:
            if not locked(handle):
                os.close(handle)
                return None
            if is_file_at(handle, partial):
                os.ftruncate(handle, 0)
                return handle
        except OSError:
            os.close(handle)
            partial.unlink(missing_ok=True)
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was renamed between the two calls


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, content: bytes) -> Path:
    """Write a user's file whole or not at all, with the folders above it, and return its path.

    Raises:
        InputError: the folder cannot be made or written.
    """
    return write_files({path: content})[0]


def write_files(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write files that belong together: none appears before all of them are on the disk.

    Args:
        contents: path → content; the folders above are made.

    Raises:
        InputError: a folder cannot be made or written; the earlier files are all as they were.
    """
    path = Path()
    try:
        with ExitStack() as stack:
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context(write_atomically(path))
                stream.write(content)
                stream.flush()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path} cannot be written: {error}") from error
    return list(contents)
