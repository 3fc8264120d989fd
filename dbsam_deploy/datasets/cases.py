"""A data folder's cases: `DIR/<task>/*.npz` with `imgs` and `gts`, whole or a subset of a split.

A task is the folder that a file lies in, relative to DIR (DIR's own name for files directly in it).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..files.damage import reason_of
from ..files.regular import small_text
from ..images.npz_files import read_label_names, read_labels
from ..images.volumes import Volume, read_image


@dataclass(frozen=True)
class CaseFile:
    """A file to evaluate.

    Attributes:
        path: where it is.
        task: the folder it lies in.
        name: its path relative to the data folder.
    """

    path: Path
    task: str
    name: str


@dataclass(frozen=True)
class LabelledCase:
    """A file that was read.

    Attributes:
        task: see `CaseFile`.
        name: see `CaseFile`; the last part seeds the boxes.
        volume: (D, H, W) slices with the file's own boxes and spacing, if it has any.
        labels: (D, H, W) whole numbers, 0 outside every object.
        label_names: value → name; may be empty.
    """

    task: str
    name: str
    volume: Volume
    labels: npt.NDArray[Any]
    label_names: dict[int, str]

    def __post_init__(self) -> None:
        if self.labels.shape != self.volume.shape:
            raise InputError(
                f"{self.name}: labels of shape {self.labels.shape} for images of shape "
                f"{self.volume.shape}"
            )

    @property
    def file_name(self) -> str:
        """Name without folders."""
        return PurePosixPath(self.name).name

    def present(self, index: int) -> list[int]:
        """Labels on slice `index`, ascending."""
        return [int(label) for label in np.unique(self.labels[index]) if label]


def find_cases(
    folder: Path, *, split: Path | None = None, subset: str | None = None
) -> list[CaseFile]:
    """List the folder's npz files by name, or those that `subset` of a split lists, in its order.

    Args:
        folder: searched with its sub-folders; or one npz file, whose task is its folder's name.
        split: JSON or TOML file, `train` and `validation` → list of paths relative to `folder`.
        subset: which of its lists.

    Raises:
        InputError: no such folder, no npz in it, only one of `split` and `subset`, a split that
            cannot be read, or a file in it that is missing or in two lists.
    """
    if folder.is_file() and folder.suffix == ".npz" and split is None and subset is None:
        return [CaseFile(folder, folder.resolve().parent.name, folder.name)]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected DIR/<task>/*.npz")
    if (split is None) != (subset is None):
        raise InputError("--split and --subset go together: one is missing")
    if split is not None and subset is not None:
        names = read_split(split, subset)
    else:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npz"))
    if not names:
        raise InputError(f"{folder}: no .npz files with imgs and gts; expected DIR/<task>/*.npz")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{split}: {missing[0]} is not in {folder} ({len(missing)} of {len(names)} files of "
            f"{subset} are missing)"
        )
    return [CaseFile(folder / name, _task(name, folder), name) for name in names]


def _task(name: str, folder: Path) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return folder.resolve().name if parent == "." else parent


def read_split(path: Path, subset: str) -> list[str]:
    """The files that `subset` of a split lists, relative to the data folder.

    Raises:
        InputError: not JSON or TOML of lists of paths, no such subset, an empty one, a path that
            leaves the folder, or a file that is listed twice.
    """
    try:
        text = small_text(path)
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a readable JSON or TOML split: {reason_of(error)}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in content.values()
    ):
        raise InputError(
            f"{path}: expected lists of files by name, as "
            '{"train": ["<task>/<file>.npz"], "validation": [...]}'
        )
    if subset not in content:
        raise InputError(f"{path}: no subset {subset!r}; it has {', '.join(content) or 'none'}")
    _check_names([name for names in content.values() for name in names], path)
    if not content[subset]:
        raise InputError(f"{path}: subset {subset!r} lists no files")
    return list(content[subset])


def _check_names(names: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or plain.suffix != ".npz":
            raise InputError(f"{path}: {name!r}: expected a .npz path relative to the data folder")
        if plain.as_posix() in seen:
            raise InputError(f"{path}: {name} is listed twice; a file belongs to one subset, once")
        seen.add(plain.as_posix())


def read_case(file: CaseFile) -> LabelledCase:
    """Read images and labels.

    Raises:
        InputError: a damaged or pickled file, missing arrays, images that are not finite, labels
            of another size, or labels without a single object.
    """
    volume = read_image(file.path)
    labels = read_labels(file.path, volume.shape)
    if labels.min() < 0:
        raise InputError(f"{file.path}: gts holds {labels.min()}; expected labels from 0 upwards")
    if not labels.any():
        raise InputError(f"{file.path}: gts is 0 everywhere; there is no object to evaluate")
    return LabelledCase(file.task, file.name, volume, labels, read_label_names(file.path))


def read_cases(files: Sequence[CaseFile]) -> Iterator[LabelledCase]:
    """Read one file after another, so that only one is held in memory."""
    return (read_case(file) for file in files)
