"""What this user keeps to save work: in folders that nobody else writes, under names with hashes.

Libraries and compiled models run as code, so a folder that another user owns or may write is
refused. Each file's name ends with the SHA-256 of its content; a file that does not fit its name is
deleted and made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..core.errors import EngineError
from .atomic import write_atomically


def cache_folder(name: str) -> Path:
    """Where this user's files of one kind are kept: below XDG_CACHE_HOME, or else `~/.cache`."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is not absolute does not count
    caches = given if given.is_absolute() else Path.home() / ".cache"
    return caches / "dbsam_deploy" / name


def private_folder(folder: Path, what: str, hint: str = "") -> Path:
    """Make a folder for this user alone, or check the one that is there, and return it.

    Args:
        folder: made with mode 0700.
        what: is kept there, for messages.
        hint: what a user can do about a refusal.

    Raises:
        EngineError: it cannot be made, belongs to another user, or others may write there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise EngineError(f"{what} cannot be kept in {folder}: {error.strerror}{hint}") from None
    owner = getattr(os, "geteuid", lambda: found.st_uid)()  # Windows has no such number
    if found.st_uid != owner:
        raise EngineError(
            f"{what} cannot be kept in {folder}: it belongs to user {found.st_uid}, and this is "
            f"user {owner}{hint}"
        )
    if os.name == "posix" and found.st_mode & 0o022:
        raise EngineError(
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
    """A file that `keep` wrote, with its content; damaged ones are deleted, and `damaged` told."""
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        digest = path.name.removeprefix(f"{stem}-").removesuffix(suffix)
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == digest:
                with suppress(OSError):
                    os.utime(path)  # `trim` takes the longest unused first
                return path, content
        damaged(path)
        path.unlink()
    return None


def trim(folder: Path, suffix: str, most_bytes: int, spare: Path | None = None) -> None:
    """Delete what was used longest ago, until what is kept is small enough.

    Args:
        folder: of this user alone.
        suffix: of the files, and folders of files, that count; others stay.
        most_bytes: what is left at most.
        spare: what stays, whatever its size.
    """
    with suppress(OSError):  # others may delete some at the same time
        found = [(path.stat().st_mtime_ns, path) for path in folder.glob(f"*{suffix}")]
        sizes = {path: _size(path) for _, path in found}
        for _, path in sorted(found):
            if sum(sizes.values()) <= most_bytes:
                break
            if path == spare:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            del sizes[path]


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    parts = path.iterdir() if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts)
