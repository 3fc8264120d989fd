"""JSON files that describe others: written with a format version, read back with refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import DbsamError
from .atomic import sha256_of, write_atomically

Body = dict[str, Any]
Described = TypeVar("Described")


@dataclass(frozen=True)
class ManifestKind:
    """One kind of manifest, and how a reader refuses one.

    Attributes:
        title: what it is, with its article, for messages.
        again: what a user does about one that is unusable.
        error: class of every refusal.
        version: of its format.
        absent: what to do where there is none; "" where that is like any other that is unusable.
    """

    title: str
    again: str
    error: type[DbsamError]
    version: int = 1
    absent: str = ""

    def write(self, path: Path, body: Mapping[str, Any]) -> Path:
        """Write `body` with the format version, atomically, and return `path`."""
        text = json.dumps({"format": self.version, **body}, indent=2, sort_keys=True)
        with write_atomically(path) as stream:
            stream.write(text.encode() + b"\n")
        return path

    def read(self, path: Path, parse: Callable[[Body], Described]) -> Described:
        """What `parse` makes of a manifest's body, the format version taken out.

        Raises:
            DbsamError: absent, unreadable, of another format, or refused by `parse`.
        """
        if self.absent and not path.is_file():
            raise self.error(f"no {path.name} in {path.parent}: {self.absent}")
        try:
            body = json.loads(path.read_text())
            if body.pop("format") != self.version:
                raise self.error(f"{path}: another manifest format; {self.again}")
            return parse(body)
        except DbsamError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.error(f"{path} is not {self.title} ({error}); {self.again}") from error

    def find(self, path: Path, name: str) -> Path:
        """The file `name` that the manifest `path` names; it has to lie below the manifest.

        Raises:
            DbsamError: it is not there.
        """
        folder = path.parent
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise self.error(f"{path} names {name}, which is not there; {self.again}")
        return file

    def check(self, path: Path, hashes: Mapping[str, str | None]) -> None:
        """Check the files that the manifest `path` names.

        Args:
            path: the manifest.
            hashes: name → SHA-256; None where the file only has to be there.

        Raises:
            DbsamError: one is not there, or has changed.
        """
        for name, expected in hashes.items():
            file = self.find(path, name)
            if expected is not None:
                self.compare(path, file, sha256_of(file), expected)

    def compare(self, path: Path, file: Path, found: str, expected: str) -> None:
        """Compare a file's SHA-256 with the one that the manifest `path` has of it.

        Raises:
            DbsamError: it has changed.
        """
        if found != expected:
            raise self.error(
                f"{file} was changed after {path.name} was written (its hash differs: "
                f"{found[:12]}, not {expected[:12]}); {self.again}"
            )
