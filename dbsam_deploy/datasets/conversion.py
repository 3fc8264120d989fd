"""A data set as MedSAM's npz files, one a case, each made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .. import __version__
from ..core.errors import InputError
from ..files.atomic import sha256_of, write_file
from ..images.npz_files import read_array
from ..images.volumes import npz_bytes
from .cases import CaseFile, npz_name, read_case
from .layouts import Labelled, LeftOut

REPORT_NAME = "conversion.json"
_RECORD, _MAX_RECORD_BYTES = "conversion", 1024 * 1024


@dataclass(frozen=True)
class Converted:
    """One npz, and what it was made from.

    Attributes:
        npz: its path relative to the output folder.
        images: file or folder of the images, relative to the data folder.
        labels: of the label map or SEG file.
        shape: D, H, W.
        intensity: how stored values became 0–255.
        notes: what else was made of the files.
        key: of everything that went in.
    """

    npz: str
    images: str
    labels: str
    shape: tuple[int, ...]
    intensity: str
    notes: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Conversion:
    """What became of a data set.

    Attributes:
        cases: all that are there now.
        made: how many of them this run made; the others were there.
        skipped: everything that makes no npz; paths relative to the data folder.
    """

    cases: tuple[Converted, ...]
    made: int
    skipped: tuple[LeftOut, ...]


def convert_cases(
    found: Labelled, folder: Path, output: Path, progress: Callable[[int, str], None]
) -> Conversion:
    """Write every case as `OUTPUT/<task>/<case>.npz`, and `conversion.json`.

    An npz holds `imgs` uint8, `gts`, `label_ids` and `label_names` where labels have names,
    `spacing` (z, y, x) in mm where the images have one, and `conversion`, its own record as JSON.
    One that was made from the same files in the same way is kept.

    Args:
        found: the cases, from `find_labelled`.
        folder: the data folder.
        output: made if missing.
        progress: called with the number of cases done, and the present one's name.

    Raises:
        InputError: the output cannot be written.
        MissingError: the package for a format is not installed.
    """
    cases, made = [], 0
    skipped = [replace(one, path=_relative(one.path, folder)) for one in found.left_out]
    for number, file in enumerate(found.cases):
        progress(number, file.name)
        target = f"{file.task}/{npz_name(PurePosixPath(file.name).name)}"
        try:
            key = _key(file)
            kept = _kept(output / target, key)
            content, record = (b"", kept) if kept else _converted(file, target, folder, key)
        except InputError as error:
            why = " ".join(error.message.split())
            skipped.append(LeftOut(_relative(file.path, folder), why))
            continue
        if content:
            write_file(output / target, content)
            made += 1
        cases.append(record)
    progress(len(found.cases), "")
    result = Conversion(tuple(cases), made, tuple(skipped))
    write_file(output / REPORT_NAME, _report(result))
    return result


def _report(result: Conversion) -> bytes:
    body = {
        "format": 1,
        "version": __version__,
        "cases": [asdict(case) for case in result.cases],
        "skipped": [{"path": one.path.as_posix(), "why": one.why} for one in result.skipped],
    }
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def _relative(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _key(file: CaseFile) -> str:
    """Hash of the files' content and of all that says how they are read."""
    about: list[Any] = [
        __version__,
        file.task,
        file.name,
        file.label_names,
        file.ignored,
        file.series,
    ]
    about += [file.volume, file.window, file.is_ct]
    try:
        sums = [sha256_of(path) for path in file.files or (file.path,)]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([about, sums]).encode()).hexdigest()


def _kept(path: Path, key: str) -> Converted | None:
    """The record of an npz that an earlier run made from the same; None where it has to be made.

    Raises:
        InputError: something else is in the way.
    """
    if not path.exists():
        return None
    try:
        body = json.loads(str(read_array(path, _RECORD, _MAX_RECORD_BYTES)))
        record = Converted(**{**body, "shape": tuple(body["shape"]), "notes": tuple(body["notes"])})
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is there and was not made by `convert`: move it, or choose another folder"
        ) from error
    return record if record.key == key else None


def _converted(file: CaseFile, target: str, folder: Path, key: str) -> tuple[bytes, Converted]:
    """Content of the npz of a case, and its record."""
    case = read_case(file)
    record = Converted(
        target,
        _relative(file.path, folder).as_posix(),
        _relative(file.labels or file.path, folder).as_posix(),
        case.volume.shape,
        str(case.volume.intensity),
        case.notes,
        key,
    )
    arrays: dict[str, Any] = {
        "imgs": case.volume.pixels,
        "gts": case.labels.astype(np.min_scalar_type(int(case.labels.max()))),
        _RECORD: np.array(json.dumps(asdict(record), ensure_ascii=False)),
    }
    if case.label_names:
        arrays["label_ids"] = np.array(list(case.label_names), np.int64)
        arrays["label_names"] = np.array(list(case.label_names.values()), np.str_)
    if case.volume.spacing_mm is not None:
        arrays["spacing"] = np.array(case.volume.spacing_mm, np.float64)
    return npz_bytes(**arrays), record
