"""Which cases a data folder holds: npz files, or pairs of images and label maps.

A task is the folder that a case's files lie in, relative to the data folder (whose own name it is
for files directly in it); of nnU-Net's and the Decathlon's layout, the data set's folder.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..cli import numbers
from ..core.errors import InputError
from ..files.damage import reason_of
from ..files.regular import small_text
from ..files.walking import files_below, walk
from .cases import CaseFile, Reading, own_task
from .dicom_pairs import pair_segmentations
from .layouts import Labelled, LeftOut, read_layout, stem_of

EXPECTED = (
    "expected DIR/<task>/*.npz with imgs and gts, NIfTI images with label maps (nnU-Net's or the "
    "Decathlon's folders, images/ and labels/, or x.nii.gz and x_mask.nii.gz), or DICOM series "
    "with SEG files"
)


def add_reading_options(parser: argparse._ActionsContainer) -> None:
    """Options that say how images of a data set are read; `reading_of` takes them."""
    parser.add_argument(
        "--window",
        **numbers("LEVEL", "WIDTH"),
        help="map these values to 0-255, in HU for CT (default: soft tissue where the data say that"
        " they are CT, else the 0.5-99.5 percentiles; bytes as they are)",
    )
    parser.add_argument(
        "--modality",
        metavar="NUMBER|NAME",
        help="which image, where a case has several of one grid (T1, FLAIR, …)",
    )


def reading_of(words: argparse.Namespace) -> Reading:
    """What `add_reading_options` were given."""
    window = None if words.window is None else (words.window[0], words.window[1])
    return Reading(window, words.modality)


def find_labelled(folder: Path, reading: Reading | None = None) -> Labelled:
    """Everything with labels in a folder and its sub-folders, by name, and what has none.

    Links to folders are followed.

    Where there are npz files, they alone are the data set.

    Raises:
        InputError: no such folder, a `dataset.json` that cannot be read, or a modality that has to
            be chosen.
        MissingError: pydicom is not installed, and there is DICOM.
    """
    reading = reading or Reading()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {EXPECTED}")
    found = [path for path in files_below(folder) if path.suffix == ".npz"]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if names:
        return Labelled(tuple(_npz_case(folder, name, reading) for name in names))
    parts, others = [], list[Path]()
    for here, folders, files in walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [here / name for name in sorted(files) if not name.startswith(".")]
        relative = here.relative_to(folder).as_posix()
        place = (own_task(folder), "") if relative == "." else (relative, f"{relative}/")
        part, is_whole = read_layout(here, paths, place, reading)
        parts.append(part)
        if is_whole:
            folders.clear()
        others += [path for path in paths if not stem_of(path)]
    parts.append(pair_segmentations(others, folder, reading))
    return _unique([case for part in parts for case in part.cases], parts)


def _unique(cases: list[CaseFile], parts: Sequence[Labelled]) -> Labelled:
    left_out = [one for part in parts for one in part.left_out]
    by_name: dict[tuple[str, str], CaseFile] = {}
    for case in sorted(cases, key=lambda one: (one.task, one.name)):
        key = (case.task.lower(), case.name.lower())  # their npz may meet on any file system
        first = by_name.setdefault(key, case)
        if first is not case:
            why = f"has the name of {first.labels}: rename one of them"
            left_out.append(LeftOut(case.labels or case.path, why))
    return Labelled(tuple(by_name.values()), tuple(left_out))


def find_cases(
    folder: Path,
    *,
    split: Path | None = None,
    subset: str | None = None,
    reading: Reading | None = None,
) -> list[CaseFile]:
    """List a folder's cases by name, or those that `subset` of a split lists, in its order.

    Args:
        folder: searched with its sub-folders; or one npz file, whose task is its folder's name.
        split: JSON or TOML file, `train` and `validation` → list of the cases' names: the paths of
            npz files relative to `folder`, of pairs without a suffix (`imagesTr` left out).
        subset: which of its lists.
        reading: how images are read, where the data leave it open.

    Raises:
        InputError: no such folder, nothing with labels in it, an image without labels or labels
            without an image, only one of `split` and `subset`, a split that cannot be read, or a
            case in it that is missing or in two lists.
    """
    reading = reading or Reading()
    if folder.is_file() and folder.suffix == ".npz" and split is None and subset is None:
        return [_npz_case(folder.parent, folder.name, reading)]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {EXPECTED}")
    if (split is None) != (subset is None):
        raise InputError("--split and --subset go together: one is missing")
    names = None if split is None or subset is None else read_split(split, subset)
    if names and all(name.endswith(".npz") for name in names):
        cases = {
            name: _npz_case(folder, name, reading) for name in names if (folder / name).is_file()
        }
    else:
        found = find_labelled(folder, reading)
        faults = [one for one in found.left_out if one.is_fault]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise InputError(f"{faults[0].path} {faults[0].why}{more}; {EXPECTED}")
        if not found.cases:
            raise InputError(f"{folder}: no .npz files and no labelled images; {EXPECTED}")
        cases = {case.name: case for case in found.cases}
    missing = [name for name in names or () if name not in cases]
    if missing:
        raise InputError(
            f"{split}: {missing[0]} is not in {folder} ({len(missing)} of {len(names or ())} files "
            f"of {subset} are missing)"
        )
    return [cases[name] for name in names or cases]


def _npz_case(folder: Path, name: str, reading: Reading) -> CaseFile:
    if reading != Reading():
        raise InputError(
            f"{folder / name}: an npz is read as stored; --window and --modality are for NIfTI and "
            "DICOM"
        )
    parent = PurePosixPath(name).parent.as_posix()
    task = own_task(folder) if parent == "." else parent
    return CaseFile(folder / name, task, name)


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
        if plain.is_absolute() or ".." in plain.parts or not plain.name:
            raise InputError(f"{path}: {name!r}: expected a path relative to the data folder")
        if plain.as_posix() in seen:
            raise InputError(f"{path}: {name} is listed twice; a file belongs to one subset, once")
        seen.add(plain.as_posix())
