"""A private copy of a Triton repository: what a server opens is what was hashed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ..files.atomic import sha256_of, writing_to
from .repository import (
    MANIFEST,
    REPOSITORY_NAME,
    VERSION,
    Repository,
    fixed_hashes,
    models_of,
    read_repository,
)


def take_snapshot(folder: Path, target: Path) -> Repository:
    """Copy what `load_repository` accepts into a new folder, and check the copies.

    A server opens its models one after another, and again when one has to be loaded anew. From the
    copy it gets the files that belong together, whatever becomes of `folder` meanwhile. Neither the
    manifest nor bytecode is copied.

    Args:
        folder: a repository.
        target: made, for this user alone.

    Raises:
        InputError: see `load_repository`, or `target` cannot be written.
    """
    repository, path = read_repository(folder), folder / REPOSITORY_NAME
    with writing_to(target):
        target.mkdir(mode=0o700)
        for name, expected in fixed_hashes(repository).items():
            source, copy = MANIFEST.find(path, name), target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            if expected is not None:
                MANIFEST.compare(path, source, sha256_of(copy), expected)
        for model in models_of(repository):
            (target / model / VERSION).mkdir(exist_ok=True)  # an ensemble's has no file
    return replace(repository, folder=target)
