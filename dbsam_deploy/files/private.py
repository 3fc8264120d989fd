"""What this user keeps to save work: in folders that nobody else writes, under names with hashes.

Libraries and compiled models run as code, so a folder that another user owns or may write is
refused. Each file's name ends with the SHA-256 of its content; a file that does not fit its name is
deleted and made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import CacheError
from .atomic import write_atomically

OTHER_FOLDER = "name another folder (--engine-cache; for any command XDG_CACHE_HOME)"
"""What a user can do where compiled models and engines cannot be kept."""
_UNFINISHED = (".unfinished", ".partial")
"""Endings of what `making` and `write_atomically` have not finished."""
_LEFT_S = 3600
"""What nobody finished, or went on with, for this long was left by a killed process."""


def cache_folder(name: str) -> Path:
    """Where this user's files of one kind are kept: below XDG_CACHE_HOME, or else `~/.cache`.

    Raises:
        CacheError: neither is known, as for a container's user without a name.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is not absolute does not count
    try:
        caches = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise CacheError(
            f"no place for {name} of this user, who has no home folder: name one of this user's "
            "in the environment's XDG_CACHE_HOME"
        ) from None
    return caches / "dbsam_deploy" / name


def private_folder(folder: Path, what: str, hint: str = "") -> Path:
    """Make a folder for this user alone, or check the one that is there, and return it.

    Args:
        folder: made with mode 0700.
        what: is kept there, for messages.
        hint: what a user can do about a refusal.

    Raises:
        CacheError: it cannot be made, belongs to another user, or others may write there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise CacheError(f"{what} cannot be kept in {folder}: {error.strerror}{hint}") from None
    owner = getattr(os, "geteuid", lambda: found.st_uid)()  # Windows has no such number
    if found.st_uid != owner:
        raise CacheError(
            f"{what} cannot be kept in {folder}: it belongs to user {found.st_uid}, and this is "
            f"user {owner}{hint}"
        )
    if os.name == "posix" and found.st_mode & 0o022:
        raise CacheError(
            f"{what} cannot be kept in {folder}: other users may write there; run "
            f"`chmod go-w {folder}`{hint}"
        )
    return folder


def keep(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Write a file whole, through to the disk, under a name that says its content's hash."""
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()}{suffix}"
    with write_atomically(path) as stream:
        stream.write(content)
    return path


def find_kept(
    folder: Path,
    stem: str,
    suffix: str,
    *,
    damaged: Callable[[Path], None] = lambda path: None,
) -> tuple[Path, bytes] | None:
    """A file that `keep` wrote, with its content; damaged ones are deleted, and `damaged` told.

    One that another process deletes meanwhile, or that cannot be read, counts as not there.
    """
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        digest = path.name.removeprefix(f"{stem}-").removesuffix(suffix)
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == digest:
                    with suppress(OSError):
                        os.utime(path)  # `trim` takes the longest unused first
                    return path, content
            path.lstat()  # it is still there
            damaged(path)
            discard(path)
    return None


@contextmanager
def making(folder: Path, suffix: str) -> Iterator[Path]:
    """A new folder in which something of this suffix is made; `trim` finds it after a kill."""
    with tempfile.TemporaryDirectory(suffix + _UNFINISHED[0], dir=folder) as scratch:
        yield Path(scratch)


def trim(folder: Path, suffix: str, most_bytes: int, spare: Path | None = None) -> None:
    """Delete what killed processes left, then what was used longest ago until little is kept.

    Args:
        folder: of this user alone.
        suffix: of the files, and folders of files, that count; others stay.
        most_bytes: what is left at most.
        spare: what stays, whatever its size.
    """
    for path in folder.glob(f"*{suffix}.*"):
        with suppress(OSError):
            age_s = time.time() - path.lstat().st_mtime
            if path.suffix in _UNFINISHED and age_s > _LEFT_S:
                discard(path)
    found = []
    for path in folder.glob(f"*{suffix}"):
        with suppress(OSError):  # others may delete some at the same time
            found.append((path.lstat().st_mtime_ns, path, _size(path)))
    left = sum(size for *_, size in found)
    for _, path, size in sorted(found):
        if left <= most_bytes:
            break
        if path != spare and discard(path):
            left -= size


def discard(path: Path) -> bool:
    """Delete a file, a link, or a folder with all that is in it; whether it is gone."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def _size(path: Path) -> int:
    """Bytes of a file or link, or of the files in a folder."""
    parts = path.iterdir() if path.is_dir() and not path.is_symlink() else [path]
    return sum(part.lstat().st_size for part in parts)
