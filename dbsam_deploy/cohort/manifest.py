"""Which studies a batch has: the rows of a CSV file, or what lies in a folder."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..files.regular import small_text
from ..images.dicom_files import looks_like_dicom
from ..images.intensity import Window
from ..images.volumes import OWN_WINDOW, PICTURE_SUFFIXES
from ..pacs.address import PacsAddress, is_address
from ..volumes.study_prompts import Numbers, ObjectPrompts, SlicePrompt, StudyPrompts

PROMPT_COLUMNS = ("object", "box", "slice", "box3d")
COLUMNS = ("name", "path", "prompts", *PROMPT_COLUMNS, "window", "series", "volume")
MAX_STUDIES = 100_000
MAX_NAME, MAX_PATH = 100, 4000
OWN_NAMES = ("batch.html", "batch.json")
"""What a batch writes beside the studies' folders."""

_FILES = (*PICTURE_SUFFIXES, ".npz", ".nii", ".nii.gz", ".dcm", ".dicom")


@dataclass(frozen=True)
class Study:
    """One study, and what is asked of it.

    Attributes:
        name: of its folder among the results; no two differ by case alone.
        path: an image file, a folder with a DICOM series, or a study in a PACS.
        prompts: what is looked for, or the file that says it; None for the boxes of its own file.
        window: see `images.volumes.read_image`.
        series: the same.
        volume: the same.
    """

    name: str
    path: Path | PacsAddress
    prompts: StudyPrompts | Path | None = None
    window: Window | str | None = None
    series: str | None = None
    volume: int | None = None


def read_manifest(
    path: Path, *, root: Path | None = None, propagate: bool = False, pacs: str | None = None
) -> list[Study]:
    """The studies of a CSV file: commas, semicolons or tabs, UTF-8, names of columns first.

    A row names its study's `path` and perhaps its `name`, either a `prompts` file or one object
    (`box` with `slice`, or `box3d`, numbers with blanks between them, called `object`), and how the
    file is read: `window`, `series`, `volume`. Paths are relative to `root`, or studies in a PACS.

    Args:
        path: the file.
        root: folder below which all files lie; by default that of the manifest.
        propagate: of prompts in columns, see `StudyPrompts`.
        pacs: see `pacs.address.service_url`; without it no study may lie in one.

    Raises:
        InputError: with its row: no such column, a cell that is not usable, a file outside `root`
            or a study in another PACS, a name that is there twice. A file that is missing is told
            when its study's turn comes.
    """
    text = small_text(path).removeprefix("\ufeff")
    if "\0" in text:
        raise InputError(f"{path} holds null bytes: save it as CSV in UTF-8")
    folder = (path.parent if root is None else root).resolve()
    studies = []
    for number, cells in _rows(path, text):
        try:
            studies.append(_study(cells, folder, propagate, pacs))
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error.message}") from error
    return check_names(studies, path)


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of each row that is not empty, as a spreadsheet counts them, and its cells."""
    lines = text.splitlines()
    head = next(iter(lines), "")
    separator = max(",;\t", key=head.count)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        if "path" not in names or len(set(names)) < len(names) or set(names) - {*COLUMNS}:
            raise InputError(
                f"{path} has the columns {', '.join(map(repr, names))[:200] or 'none'}: expected "
                f"path, and perhaps some of {', '.join(sorted({*COLUMNS} - {'path'}))}, each once"
            )
        for number, row in enumerate(reader, start=2):
            if number > MAX_STUDIES + 1:
                raise InputError(f"{path} has more than {MAX_STUDIES} rows: split it")
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise InputError(
                    f"{path}, row {number}: {len(row)} cells, expected {len(names)}; put a cell "
                    f"that holds {separator!r} in quotes"
                )
            yield number, {k: cell.strip() for k, cell in zip(names, row, strict=True)}
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: {error}") from error


def _study(cells: dict[str, str], root: Path, propagate: bool, pacs: str | None) -> Study:
    cell = dict.fromkeys(COLUMNS, "") | cells
    in_pacs = is_address(cell["path"])
    path = _in_pacs(cell, pacs) if in_pacs else _inside(cell["path"], root, "path")
    in_columns = [name for name in PROMPT_COLUMNS if cell[name]]
    if cell["prompts"] and in_columns:
        raise InputError(f"prompts and {in_columns[0]}: give a prompts file or these columns")
    prompts: StudyPrompts | Path | None = None
    if cell["prompts"]:
        prompts = _inside(cell["prompts"], root, "prompts")
    elif in_columns:
        prompts = StudyPrompts((_object(cell),), propagate or bool(cell["box3d"]))
    return Study(
        cell["name"] or name_of(path),
        path,
        prompts,
        _window(cell["window"]),
        cell["series"] or None,
        int(_numbers(cell, "volume", 1)[0]) if cell["volume"] else None,
    )


def _object(cell: dict[str, str]) -> ObjectPrompts:
    name = cell["object"] or "object"
    if cell["box3d"] and not cell["box"] and not cell["slice"]:
        return ObjectPrompts(name, box_3d=_numbers(cell, "box3d", 6))
    if not cell["box"] or cell["box3d"]:
        raise InputError("expected either box (with slice, in a volume) or box3d")
    index = int(_numbers(cell, "slice", 1)[0]) if cell["slice"] else None
    return ObjectPrompts(name, (SlicePrompt(_numbers(cell, "box", 4), index=index),))


def _numbers(cell: dict[str, str], name: str, count: int) -> Numbers:
    words = re.split(r"[\s,;]+", cell[name])
    kind = int if count == 1 else float
    try:
        numbers = tuple(float(kind(word)) for word in words)
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        what = "a whole number" if count == 1 else f"{count} numbers with blanks between them"
        raise InputError(f"{name} {cell[name][:60]!r}: expected {what}")
    return numbers


def _window(text: str) -> Window | str | None:
    if text in ("", OWN_WINDOW):
        return text or None
    level, width = _numbers({"window": text}, "window", 2)
    return level, width


def _in_pacs(cell: dict[str, str], pacs: str | None) -> PacsAddress:
    """The study of a cell, in the PACS that the user has named: it is shown a login.

    Raises:
        InputError: an address of another form, or of another PACS.
    """
    address = PacsAddress.parse(cell["path"])
    if address.url != pacs:
        own = str(address).partition("?")[0]
        raise InputError(f"{address} lies in a PACS: --pacs {own} says that it may be asked")
    if cell["series"]:
        raise InputError("series goes with a folder: in a PACS it is a part of the path")
    return address


def _inside(text: str, root: Path, what: str) -> Path:
    """The file of a cell.

    Raises:
        InputError: none, or one outside `root`, through links as well.
    """
    if not text:
        raise InputError(f"no {what}")
    if len(text) > MAX_PATH:
        raise InputError(f"{what} {text[:60]!r}…: longer than {MAX_PATH} characters")
    if "://" in text:
        raise InputError(f"{what} {text[:200]!r}: expected a file or folder, or dicomweb://…")
    try:
        found = (root / text).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links
        raise InputError(f"{what} {text[:200]!r}: {error}") from error
    if not found.is_relative_to(root) or found == root:
        raise InputError(
            f"{what} {text[:200]!r} lies outside of {root}: name the folder that holds all files "
            "with --root"
        )
    return root / text


def name_of(path: Path | PacsAddress) -> str:
    """A study's name where none is given: that of its file, without what a folder cannot have."""
    if isinstance(path, PacsAddress):
        return path.series or path.study
    stem = path.name.removesuffix(".gz")
    stem = Path(stem).stem if stem.lower().endswith(_FILES) else stem
    return re.sub(r"[^\w.-]+", "_", stem).strip("._-")[:MAX_NAME]


def find_studies(folder: Path) -> tuple[list[Study], list[str]]:
    """Each image file and each folder in `folder` is a study.

    Returns:
        The studies by name, and names of what else lies there.

    Raises:
        InputError: there is none, the folder is a DICOM series itself, or two have one name.
    """
    studies, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir() and looks_like_dicom(path):
            raise InputError(f"{folder} holds DICOM files itself: it is one study, see predict")
        if path.is_dir() or path.name.lower().endswith(_FILES):
            studies.append(Study(name_of(path), path))
        else:
            others.append(path.name)
    return check_names(studies, folder), others


def check_names(studies: Sequence[Study], source: Path) -> list[Study]:
    """`studies`, if each has a name of its own that a folder can have.

    Raises:
        InputError: there is no study, or with the name.
    """
    if not studies:
        raise InputError(f"{source} names no study: expected one a row, or image files in a folder")
    seen: dict[str, Study] = {}
    for study in studies:
        if not re.fullmatch(r"[^\W_][\w.-]*", study.name) or len(study.name) > MAX_NAME:
            raise InputError(
                f"{source}: name {study.name[:120]!r}: expected a letter or digit, then letters, "
                f"digits, '.', '_' or '-', {MAX_NAME} at most; it names a folder"
            )
        key = unicodedata.normalize("NFKC", study.name).casefold()
        if key in OWN_NAMES:
            raise InputError(f"{source}: name {study.name!r} is that of the report; choose another")
        if key in seen:
            raise InputError(
                f"{source}: {seen[key].path} and {study.path} are both called {study.name!r}: "
                "rename one, or name each in a CSV's column name"
            )
        seen[key] = study
    return list(studies)
