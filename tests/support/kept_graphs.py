"""Graphs that were traced are kept between runs, for what they are made from alone."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from support import references

from dbsam_deploy.files.private import cache_folder
from dbsam_deploy.files.sources import closure
from dbsam_deploy.kernels.build import digest_of
from dbsam_deploy.model.weights import shipped_checkpoint
from dbsam_deploy.resources import resource_dir

MAKERS = ("graphs.onnx_export", "model.weights", "recipe")
"""The modules that make them; what these import counts as well."""
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "torch")


def kept_graph(path: Path, name: str, make: Callable[[], object]) -> Path:
    """`path` with the graph `name` of an earlier run, or as `make` writes it there."""
    kept = cache_folder("traced-graphs")
    place = kept / _key()
    file = place / f"{name}.onnx"
    if file.exists():
        return Path(shutil.copy(file, path))
    make()
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        for other in kept.iterdir():
            if other != place:
                shutil.rmtree(other)  # of other sources
        place.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        shutil.copy(path, unfinished)
        unfinished.replace(file)
    return path


@functools.cache
def _key() -> str:
    ours = (Path(references.__file__), Path(__file__), Path(__file__).parents[1] / "conftest.py")
    recipes = sorted(resource_dir("export").glob("*.toml"))
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    return digest_of(
        [*closure(MAKERS), *recipes, shipped_checkpoint(), *ours], versions, sys.version
    )
