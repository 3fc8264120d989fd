"""JSON files that describe others: written with a format version and a seal, read with refusals.

The seal is a hash over all other entries. It shows that a manifest is what this library wrote: no
edit, no damage, no mixture of two. It holds no secret, so whoever can write the folder can make
another; who may write there is for the file system to say.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from ..core.errors import DbsamError
from .atomic import sha256_of, write_atomically

Body = dict[str, Any]
Described = TypeVar("Described")
MAX_BYTES = 16 * 2**20
"""Of a manifest; ours have some kilobytes."""


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
        """Write `body` with the format version and its seal, atomically, and return `path`."""
        whole = {"format": self.version, **body, "seal": seal_of(body)}
        text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
        with write_atomically(path) as stream:
            stream.write(text.encode() + b"\n")
        return path

    def read(self, path: Path, parse: Callable[[Body], Described]) -> Described:
        """What `parse` makes of a manifest's body, the format version and the seal taken out.

        Raises:
            DbsamError: absent, unreadable, of another format, edited, or refused by `parse`.
        """
        if self.absent and not path.is_file():
            raise self.error(f"no {path.name} in {path.parent}: {self.absent}")
        try:
            body = read_json(path)
            if body.pop("format") != self.version:
                raise self.error(f"{path}: another manifest format; {self.again}")
            if body.pop("seal") != seal_of(body):
                raise self.error(
                    f"{path} was edited after it was written (its seal does not fit); {self.again}"
                )
            return parse(body)
        except DbsamError:
            raise
        except RecursionError:
            raise self.error(f"{path} is not {self.title} (too deep); {self.again}") from None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise self.error(f"{path} is not {self.title} ({why}); {self.again}") from error

    def find(self, path: Path, name: str) -> Path:
        """The file `name` that the manifest `path` names; it has to lie below the manifest.

        Raises:
            DbsamError: it is not there, or no file of its own.
        """
        folder = path.parent
        file = folder / name if is_inside(name) else None
        if file is None or file.is_symlink() or not _is_below(file, folder):
            raise self.error(f"{path} names {name!r}, which is not there; {self.again}")
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

    def take(self, path: Path, name: str, expected: str) -> bytes:
        """The content of the file `name`, read once: these bytes are the ones that were hashed.

        Raises:
            DbsamError: it is not there, or has changed.
        """
        file = self.find(path, name)
        content = file.read_bytes()
        self.compare(path, file, hashlib.sha256(content).hexdigest(), expected)
        return content

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

    def check_nothing_else(
        self,
        path: Path,
        names: Collection[str],
        *,
        empty: Collection[str] = (),
        apart: Collection[str] = (),
        ignored: Collection[str] = (),
    ) -> None:
        """Refuse what lies beside the manifest `path` and is not in it.

        Args:
            path: the manifest.
            names: files that it names, relative to its folder.
            empty: folders that may be there without a file.
            apart: folders that have manifests of their own, and are not looked into.
            ignored: names of folders that may lie anywhere, and are not looked into.

        Raises:
            DbsamError: another file, folder or link, with its name.
        """
        files = {path.name, *names}
        folders = {*empty, *apart}
        for name in [*names, *empty, *apart]:
            folders.update(str(parent) for parent in PurePosixPath(name).parents)
        waiting = [path.parent]
        while waiting:
            for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
                name = Path(entry.path).relative_to(path.parent).as_posix()
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder and entry.name in ignored:
                    continue
                if entry.is_symlink() or name not in (folders if is_folder else files):
                    raise self.error(
                        f"{path} does not list {name!r}: move it out of {path.parent} or delete "
                        f"it, or {self.again}"
                    )
                if is_folder and name not in apart:
                    waiting.append(Path(entry.path))


def read_json(path: Path) -> Body:
    """The JSON object of a small file: each name stands once, every number is finite.

    Raises:
        OSError, ValueError, TypeError, RecursionError: it is not there, or is not that.
    """
    return _strict_json(_small_file(path))


def seal_of(body: Mapping[str, Any]) -> str:
    """Hash over a manifest's entries, besides `format` and `seal`."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def is_inside(name: object) -> bool:
    """Whether `name` is written as a path that stays in its folder: relative, no dots, no links.

    >>> is_inside("onnx/encoder.onnx"), is_inside("../encoder.onnx"), is_inside("/etc/passwd")
    (True, False, False)
    """
    if not isinstance(name, str) or not name or len(name) > 1000 or not name.isprintable():
        return False
    parts = name.split("/")
    return "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def is_sha256(text: object) -> bool:
    """Whether `text` is a SHA-256 in hex."""
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _is_below(file: Path, folder: Path) -> bool:
    inside = os.path.join(os.path.realpath(folder), "")
    return os.path.realpath(file).startswith(inside) and os.path.isfile(file)


def _small_file(path: Path) -> bytes:
    """A manifest's bytes; no device, pipe or huge file is read."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("no regular file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"{found.st_size} bytes, expected at most {MAX_BYTES}")
    return path.read_bytes()


def _strict_json(content: bytes) -> Body:
    """A JSON object in which each name stands once and every number is finite."""
    body = json.loads(
        content.decode(),
        object_pairs_hook=_unique,
        parse_constant=_no_constant,
        parse_float=_finite,
    )
    if not isinstance(body, dict):
        raise TypeError(f"a {type(body).__name__}, expected an object")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> Body:
    body = dict(pairs)
    if len(body) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return body


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value
