"""Which objects answer which published row: `export/evaluation/rows.toml`, and users' own.

The file says what each key means. Nothing is guessed beyond it: a path or a label's name holds the
words of a row, or the row stays without data.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.errors import InputError
from ..files.regular import small_text
from ..resources import resource_dir

TableName = Literal["3D", "2D"]
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class PublishedRow:
    """One task of a published table; see the head of `export/evaluation/rows.toml`.

    Attributes:
        name: as printed there.
        dimensions: which of the paper's two tables.
        structures: names of the label.
        modality: words of the case's path, one of these.
        region: words of the path or the label's name, one of these; none: no such condition.
        files: patterns of paths, in place of `modality`.
        dsc: DB-SAM's Dice in per cent, where it is known.
        is_papers: whether it comes with this project.
    """

    name: str
    dimensions: TableName
    structures: tuple[str, ...]
    modality: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    dsc: float | None = None
    is_papers: bool = True

    def answers(self, path: str, label_name: str, dimensions: str) -> bool:
        """Whether an object belongs to this row.

        Args:
            path: of its file, below and with the data folder's sub-folders.
            label_name: the file's name for the label, or empty.
            dimensions: `3D` or `2D`, what the case is.
        """
        if dimensions != self.dimensions:
            return False
        words = _words(path)
        if self.files:
            if not any(fnmatch.fnmatch(path, pattern) for pattern in self.files):
                return False
        elif not _holds_one(words, self.modality):
            return False
        if self.region and not _holds_one(words + _words(label_name), self.region):
            return False
        if _words(label_name):
            return any(_words(name) == _words(label_name) for name in self.structures)
        return _holds_one(words, self.structures)


def paper_rows() -> tuple[PublishedRow, ...]:
    """The paper's 21 and 9 tasks.

    Raises:
        InputError: the file is missing or damaged.
    """
    return read_rows(resource_dir("export") / "evaluation" / "rows.toml", is_papers=True)


def rows_with(own: Path | None) -> tuple[PublishedRow, ...]:
    """The paper's rows, with a user's own in place of those of the same name, or after them.

    Raises:
        InputError: see `read_rows`.
    """
    rows = {row.name: row for row in (*paper_rows(), *(read_rows(own) if own else ()))}
    return tuple(rows.values())


def read_rows(path: Path, *, is_papers: bool = False) -> tuple[PublishedRow, ...]:
    """Read a file of rows.

    Raises:
        InputError: not TOML, no `[[row]]`, an unknown or missing key, a value of the wrong kind, or
            one name twice.
    """
    try:
        body = tomllib.loads(small_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"rows {path}: {error}") from error
    tables = body.get("row")
    if set(body) != {"row"} or not isinstance(tables, list) or not tables:
        raise InputError(f"rows {path}: expected [[row]] tables and nothing else")
    rows = [_row(table, f"rows {path}, row {i}", is_papers) for i, table in enumerate(tables, 1)]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"rows {path}: {twice[0]!r} is there twice; rename one of them")
    return tuple(rows)


def _row(table: dict[str, Any], where: str, is_papers: bool) -> PublishedRow:
    known = {field.name for field in fields(PublishedRow)} - {"is_papers"}
    unknown = sorted(set(table) - known)
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}; expected {', '.join(sorted(known))}"
        )
    name: object = table.get("name")
    dimensions: Any = table.get("dimensions")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: name = {name!r}; expected the row's name")
    if dimensions not in get_args(TableName):
        raise InputError(f"{where}, {name}: dimensions = {dimensions!r}; expected '3D' or '2D'")
    dsc = table.get("dsc")
    if dsc is not None and not (isinstance(dsc, (int, float)) and 0 <= dsc <= 100):
        raise InputError(f"{where}, {name}: dsc = {dsc!r}; expected per cent, 0–100")
    lists = {
        key: _texts(table.get(key, []), f"{where}, {name}: {key}")
        for key in ("structures", "modality", "region", "files")
    }
    if not lists["structures"] or not (lists["modality"] or lists["files"]):
        raise InputError(
            f"{where}, {name}: expected structures, and modality or files, with something in them"
        )
    return PublishedRow(
        name, dimensions, dsc=None if dsc is None else float(dsc), is_papers=is_papers, **lists
    )


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise InputError(f"{where} = {value!r}; expected a list of texts")
    return tuple(value)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _holds_one(words: Iterable[str], choices: Sequence[str]) -> bool:
    """Whether all words of one of the choices are among `words`."""
    held = set(words)
    return any(held.issuperset(_words(choice)) for choice in choices)
