"""The compiled plugin library in TensorRT's registry: loaded, listed, refused with a reason."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from ..core.errors import EngineError
from ..extras import LEAN_LINE, pip_line, require
from ..machine.child_process import run_python
from .plugin_build import PluginLibrary, read_library

NAMESPACE, VERSION = "dbsam", "1"


OPERATORS = (
    "MsDeformAttn",
    "ChannelAttention",
    "RelPosAttention",
    "DepthwiseConvGelu",
    "WindowedAttention",
)
"""Names under which TensorRT finds the plugins, in namespace `NAMESPACE`, version `VERSION`."""


RUNTIMES = ("tensorrt", "tensorrt_lean", "tensorrt_lean_bindings")
"""Modules with a plugin registry; the lean ones load a library without a GPU."""


def load_plugins(path: Path, *, runtime: Any = None) -> PluginLibrary:
    """Register the library in TensorRT's plugin registry of this process; again is no mistake.

    Args:
        path: the library.
        runtime: the TensorRT module; by default `tensorrt`, imported here.

    Raises:
        EngineError: no TensorRT, a library that was changed or compiled for another major version,
            one that cannot be loaded, or other plugins of these names in the process.
    """
    library = read_library(path)
    if runtime is None:
        runtime = require("tensorrt", extra="gpu", what_for="a plugin")
    version = runtime.__version__
    if library.tensorrt_headers.split(".")[0] != version.split(".")[0]:
        wanted = ".".join(version.split(".")[:2])
        raise EngineError(
            f"{path} was compiled with headers of TensorRT {library.tensorrt_headers}, this is "
            f"TensorRT {version}: run `python -m dbsam_deploy.plugins build --tensorrt {wanted}`"
        )
    register_library(library.path, library.sha256, runtime)
    return library


@functools.cache
def register_library(path: Path, sha256: str, runtime: Any) -> tuple[Any, ...]:
    """Load a library into the registry of a TensorRT module, whatever headers it was compiled with.

    Args:
        path: the library.
        sha256: of that file; a process holds one library.
        runtime: the TensorRT module.

    Returns:
        The creators of `OPERATORS`.

    Raises:
        EngineError: it cannot be loaded, lacks one, or the process has other plugins of that name.
    """
    registry = runtime.get_plugin_registry()
    if there := _creators(registry):
        raise EngineError(
            f"cannot load {path} (sha256 {sha256[:12]}…): this process has other plugins named "
            f"{NAMESPACE}::{next(iter(there))}; use a process of its own"
        )
    if registry.load_library(str(path.resolve())) is None:
        raise EngineError(
            f"TensorRT {runtime.__version__} cannot load {path}: {_why_unloadable(path)}"
        )
    there = _creators(registry)
    missing = [name for name in OPERATORS if name not in there]
    if missing:
        raise EngineError(
            f"{path} has no plugin {NAMESPACE}::{missing[0]} of version {VERSION}: "
            "run `python -m dbsam_deploy.plugins build`"
        )
    return tuple(there[name] for name in OPERATORS)


def _creators(registry: Any) -> dict[str, Any]:
    found = {name: registry.get_creator(name, VERSION, NAMESPACE) for name in OPERATORS}
    return {name: creator for name, creator in found.items() if creator is not None}


def _why_unloadable(path: Path) -> str:
    try:
        library = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        return str(error)
    lacks = [name for name in ("getCreators", "setLoggerFinder") if not hasattr(library, name)]
    return (
        f"it is no plugin library, it lacks {', '.join(lacks)}" if lacks else "it gives no reason"
    )


def show_creators(argv: list[str] | None = None) -> int:
    """In the process of `list_creators`: print what the registry shows of a library as JSON."""
    path, sha256 = sys.argv[1:] if argv is None else argv
    for name in RUNTIMES:
        try:
            runtime = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        raise EngineError(
            f"no TensorRT with a plugin registry: `{LEAN_LINE}` (no GPU needed), or "
            f"`{pip_line('gpu')}`"
        )
    creators = [
        {
            "name": creator.name,
            "version": creator.plugin_version,
            "namespace": creator.plugin_namespace,
            "attributes": {field.name: field.type.name for field in creator.field_names},
        }
        for creator in register_library(Path(path), sha256, runtime)
    ]
    print(json.dumps({"runtime": f"{name} {runtime.__version__}", "creators": creators}))
    return 0


_SHOW = (
    "import sys; from dbsam_deploy.cli import run; "
    "from dbsam_deploy.kernels.plugin_registry import show_creators; "
    "sys.exit(run(show_creators))"
)


def list_creators(path: Path) -> dict[str, Any]:
    """What a registry shows of a library, asked in a process of its own.

    Returns:
        `runtime`: module and version that loaded it; `creators`: name, version, namespace and
        attributes (name → type) of each plugin.

    Raises:
        EngineError: no file, no TensorRT module with a registry, or it cannot be loaded.
    """
    library = read_library(path)
    ended = run_python(["-c", _SHOW, str(path), library.sha256])
    if ended.status:
        raise EngineError(f"{path} cannot be shown: {ended.reason()}")
    shown: dict[str, Any] = json.loads(ended.output)
    return shown
