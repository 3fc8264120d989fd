"""Folders with all their sub-folders, those behind symbolic links, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_Place = tuple[int, int]


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, links to folders followed, except one that leads back to a folder around it.

    Yields:
        A folder, its sub-folders' names, which the caller may change to say where to go on, and
        its files' names.
    """
    above: dict[str, frozenset[_Place]] = {}
    for root, folders, files in os.walk(folder, followlinks=True):
        around = above.pop(root, frozenset()) | {_place(root)}
        folders[:] = [name for name in folders if _place(os.path.join(root, name)) not in around]
        yield Path(root), folders, files
        above |= {os.path.join(root, name): around for name in folders}


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted; see `walk`."""
    return sorted(here / name for here, _, files in walk(folder) for name in files)


def _place(path: str) -> _Place:
    """Which folder it is, whatever name it was reached by."""
    try:
        found = os.stat(path)
    except OSError:  # gone since it was listed; os.walk passes it over
        return (0, 0)
    return found.st_dev, found.st_ino
