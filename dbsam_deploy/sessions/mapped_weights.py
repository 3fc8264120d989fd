"""Large graphs on the CPU with weights that are mapped from a file, not held by each process.

ONNX Runtime lays weights out for its kernels whenever a session opens, in memory of that process.
Here it does so once and writes graph and weights as it computes with them; from then on all
processes that compute with one model share its weights' memory. A session opens no sooner, as the
file's hash is compared; what is computed is the same, bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.errors import CacheError
from ..files.inputs import digest
from ..files.onnx_data import OnnxContent
from ..files.private import discard, making, private_folder, trim
from ..machine.hardware import cpuinfo, processor
from .onnxruntime_providers import CPU, open_session

LARGE_BYTES = 128 << 20
"""Smaller graphs open in a fifth of a second, and most of their memory is for activations."""
KEPT_BYTES = 4 << 30
"""Most that these files take in a user's cache; those of SAM's ViT-B take 0.7 GB."""
_ROOM = 3
"""Files are made where this many times the graph's size is free; they take twice that size."""
_GRAPH, _WEIGHTS, _SUFFIX = "graph.onnx", "graph.bin", ".mapped"


def map_weights(runtime: ModuleType, content: OnnxContent, cache: Path, threads: int = 0) -> Path:
    """The file of a graph with mapped weights, written now unless the cache has it.

    Args:
        runtime: the module `onnxruntime`.
        content: of the graph's files.
        cache: folder for such files, this user's alone.
        threads: intra-op threads of the session that writes it, 0 for one per core.

    Raises:
        CacheError: the files cannot be kept.
        EngineError: ONNX Runtime refuses the graph.
    """
    private_folder(cache, "mapped weights")
    facts = [runtime.__version__, runtime.get_build_info(), processor(cpuinfo())]
    key = digest(content.model, content.data or b"", *facts)
    kept = _find(cache, key)
    if kept is None:
        try:
            _check_room(cache, len(content.model) + len(content.data or b""))
            with making(cache, _SUFFIX) as scratch:
                pack = partial(_pack, scratch / _GRAPH)
                open_session(runtime, content, CPU, threads=threads, prepare=pack)
                kept = _keep(cache, key, scratch)
        except OSError as error:
            raise CacheError(
                f"mapped weights cannot be kept in {cache}: {error.strerror}"
            ) from error
        trim(cache, _SUFFIX, KEPT_BYTES, spare=kept)
    return kept / _GRAPH


def open_mapped(runtime: ModuleType, path: Path, threads: int = 0) -> Any:
    """An `InferenceSession` on the CPU of what `map_weights` returned.

    Raises:
        EngineError: ONNX Runtime refuses it.
    """
    as_it_is = partial(_as_it_is, runtime)
    return open_session(runtime, str(path), CPU, threads=threads, prepare=as_it_is)


def _pack(path: Path, settings: Any) -> None:
    """Let a session write its graph, and its weights beside that, as it computes with them."""
    settings.optimized_model_filepath = str(path)
    settings.log_severity_level = 3  # it warns that the file is for this processor, as it is
    for key, value in {
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        settings.add_session_config_entry(key, value)


def _as_it_is(runtime: ModuleType, settings: Any) -> None:
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL


def _check_room(folder: Path, size: int) -> None:
    """Leave the last of a disk to a batch's results: ONNX Runtime would fill it, and then fail."""
    if shutil.disk_usage(folder).free < _ROOM * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _keep(folder: Path, key: str, made: Path) -> Path:
    """Give a folder with both files its name, which ends with the hash of their content."""
    kept = folder / f"{key}-{_hash(made)}{_SUFFIX}"
    try:
        made.rename(kept)
    except OSError:
        if not _is_whole(kept, key):  # which another process has made meanwhile
            raise
    return kept


def _find(folder: Path, key: str) -> Path | None:
    """What `_keep` has named; what is damaged is deleted, to be made again."""
    for path in folder.glob(f"{key}-*{_SUFFIX}"):
        if _is_whole(path, key):
            with suppress(OSError):
                os.utime(path)
            return path
        discard(path)
    return None


def _is_whole(path: Path, key: str) -> bool:
    """Whether a folder, which is no link, has the files that its name says."""
    with suppress(OSError):
        return not path.is_symlink() and path.name == f"{key}-{_hash(path)}{_SUFFIX}"
    return False


def _hash(folder: Path) -> str:
    """SHA-256 of the hashes of both files."""
    found = []
    for name in (_GRAPH, _WEIGHTS):
        with (folder / name).open("rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").digest())
    return digest(*found)
