"""The folder in which an export is made: what is finished, and what must not be published."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .atomic import sha256_of, write_atomically
from .onnx_data import DATA_SUFFIX, data_path
from .publication import keep_only, remove

WORK_NAME = ".work"
"""Of the folder with all work folders, in an export's output."""
_DONE_NAME = "done.json"


@dataclass(frozen=True)
class WorkFolder:
    """One export's work, named by what it is made from; the next run with the same key goes on.

    Attributes:
        root: the folder.
        keep: names in `scratch` that the next run can use.
    """

    root: Path
    keep: tuple[str, ...] = ()

    @property
    def files(self) -> Path:
        """Folder with finished files only, which becomes the publication."""
        return self.root / "files"

    @property
    def scratch(self) -> Path:
        """Folder in which files are made; it is never published."""
        return self.root / "scratch"

    def open(self, say: Callable[[str], None]) -> dict[str, str]:
        """Make the folders, remove what killed runs left in them, and look for finished files.

        Args:
            say: told about a damaged record, which is ignored.

        Returns:
            Name of each finished file → its SHA-256.
        """
        for folder in (self.files, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        found, recorded = {}, self._read(say)
        for name, known in recorded.items():
            path = self.files / name
            if path.is_file() and sha256_of(path) == known:
                found[name] = known
        for name in recorded:
            if name.endswith(DATA_SUFFIX) and name not in found:  # its graph is nothing without it
                found.pop(name.removesuffix(DATA_SUFFIX), None)
        keep_only(self.root, (self.files.name, self.scratch.name, _DONE_NAME))
        keep_only(self.files, found)
        keep_only(self.scratch, self.keep)
        return found

    def _read(self, say: Callable[[str], None]) -> dict[str, str]:
        path = self.root / _DONE_NAME
        if not path.is_file():
            return {}
        try:
            body = json.loads(path.read_bytes())
            return {str(name): str(known) for name, known in body.items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            say(f"{path} is damaged ({error}); everything is made again")
            return {}

    def finish(self, name: str, done: Mapping[str, str]) -> dict[str, str]:
        """Move a file, and its weights beside it, from `scratch` to `files`, and record it.

        Args:
            name: of the file.
            done: what was finished before.

        Returns:
            All that is finished.
        """
        made = self.scratch / name
        files = [path for path in (data_path(made), made) if path.is_file()]
        known = {**done, **{path.name: sha256_of(path) for path in files}}
        with write_atomically(self.root / _DONE_NAME) as stream:
            stream.write(json.dumps(known).encode())
        for path in files:
            path.replace(self.files / path.name)
        return known

    def close(self, names: Collection[str]) -> Path:
        """The folder `files` with nothing but these in it."""
        keep_only(self.files, names)
        return self.files


def work_folder(output: Path, stem: str, key: str, keep: tuple[str, ...] = ()) -> WorkFolder:
    """The work folder of what is made from `key`; those of other keys with this stem are removed.

    The caller is the only writer of `output`, so nobody works in one of them.

    Args:
        output: where it will be published.
        stem: what is made; work on other stems is left alone.
        key: of all that goes in.
        keep: see `WorkFolder`.
    """
    folder = output / WORK_NAME / f"{stem}-{key[:16]}"
    clear_work(output, stem, folder)
    return WorkFolder(folder, keep)


def clear_work(output: Path, stem: str, but: Path | None = None) -> None:
    """Remove the work folders of a stem, but one, and the folder of all of them if it is empty."""
    work = output / WORK_NAME
    if work.is_dir():
        for path in work.iterdir():
            if path.name.rpartition("-")[0] == stem and path != but:
                remove(path)
        with suppress(OSError):
            work.rmdir()
