"""Folders that are replaced as a whole: a reader sees the earlier one or the new one.

The caller keeps other writers out, see `locks.one_writer`, and calls `tidy` before it begins.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic import sync_folder

_AT_FDCWD, _EXCHANGE = -100, 2
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""What a kernel or a file system answers that cannot exchange names."""


def beside(place: Path, what: str) -> Path:
    """A hidden neighbour of a publication: on its file system, and in no list of publications."""
    return place.with_name(f".{place.name}.{what}")


def new_folder(place: Path) -> Path:
    """An empty folder in which the next content of `place` is put together."""
    fresh = beside(place, "new")
    remove(fresh)
    fresh.mkdir()
    return fresh


def tidy(place: Path) -> None:
    """Remove what a killed run left of a replacement; an earlier `place` is put back.

    Where names cannot be exchanged, a run can be killed when the earlier publication was moved
    aside and the new one was not there yet.
    """
    aside = beside(place, "old")
    if _is_there(aside) and not _is_there(place):
        aside.rename(place)
    for leftover in (aside, beside(place, "new")):
        remove(leftover)


def replace_folder(fresh: Path, place: Path) -> None:
    """Give `fresh` the name `place`; what was there is removed.

    On Linux the two are exchanged in one step. Where that cannot be done there is a moment without
    `place`, after which a failure puts the earlier folder back, and a kill leaves that to `tidy`.

    Args:
        fresh: complete, on the same file system.
        place: absent, or an earlier publication.

    Raises:
        OSError: `place` is as it was.
    """
    _sync(fresh)
    old = fresh
    if not _is_there(place):
        fresh.rename(place)
    elif not exchange(fresh, place):
        old = beside(place, "old")
        place.rename(old)
        try:
            fresh.rename(place)
        except BaseException:
            old.rename(place)
            raise
    sync_folder(place.parent)
    with suppress(OSError):
        remove(old)  # `tidy` tries again


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """An empty folder that gets the name `place` when the block ends, and goes if it fails.

    Raises:
        OSError: see `replace_folder`.
    """
    fresh = new_folder(place)
    try:
        yield fresh
        replace_folder(fresh, place)
    except BaseException:
        with suppress(OSError):
            remove(fresh)  # else `tidy` does
        raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step.

    Returns:
        False where the system or the file system cannot; nothing has changed then.

    Raises:
        OSError: it can, and refuses these.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove everything in a folder but these."""
    for path in folder.iterdir():
        if path.name not in names:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link (not its target), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    """Whether a name is taken, by a broken link as well."""
    return os.path.lexists(path)


def _sync(folder: Path) -> None:
    """Bring all files of a folder, and their names, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))
