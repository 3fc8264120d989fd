"""TensorRT: the plugin library, engines with plugins in them, their layers and their gate."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

from ..artefact import ENGINES, TRIALS, Artefact, load_artefact
from ..core.errors import EngineError
from ..engines.build import EngineOptions, build_engines, check_options
from ..engines.device import find_gpu
from ..engines.kinds import TENSORRT, TENSORRT_RTX, Kind
from ..engines.layers import LayerReport, check_plugins, read_attention, read_layers
from ..engines.manifest import Flags
from ..extras import HEADERS_LINE, LEAN_LINE, headers_line
from ..kernels.headers import find_headers, installed_tensorrt
from ..kernels.plugin_build import (
    DEFAULT_OUTPUT,
    LIBRARY_NAME,
    PluginLibrary,
    build_plugins,
    read_library,
)
from ..kernels.plugin_registry import RUNTIMES, list_creators
from ..sessions.engine_session import EngineSession, TensorrtRtxSession, TensorrtSession
from .machine_state import need_gpu
from .operators import AHEAD, need_nvcc
from .runtimes import hold
from .speed import time_session
from .verdicts import CheckFunction, Context, NotRunError, Passed, need_package

BUILD_LINE = "python -m dbsam_deploy.plugins build"


def _own_library(context: Context) -> Path:
    return context.folder / "plugins" / LIBRARY_NAME


def plugin_library(context: Context) -> Passed:
    """The library of `plugins build`, or one compiled here for this machine's GPU.

    Raises:
        NotRunError: no compiler, or no headers.
        EngineError: it does not compile.
    """
    if (DEFAULT_OUTPUT / LIBRARY_NAME).is_file():
        return _describe(read_library(DEFAULT_OUTPUT / LIBRARY_NAME))
    need_nvcc()
    if shutil.which("cmake") is None:
        raise NotRunError("no cmake on the PATH", "pip install cmake")
    runtime = installed_tensorrt()
    try:
        find_headers()
    except EngineError as error:
        line = headers_line(runtime) if runtime else HEADERS_LINE
        raise NotRunError(error.message, line) from error
    gpu = find_gpu()
    target = AHEAD if gpu is None else gpu.target
    library = build_plugins(_own_library(context).parent, architectures=(target,))
    return _describe(library)


def _describe(library: PluginLibrary) -> Passed:
    targets = ", ".join(library.architectures)
    text = f"for {targets}, headers of TensorRT {library.tensorrt_headers}, {library.path.name}"
    return Passed(text, {"path": str(library.path), "sha256": library.sha256})


def load_library(context: Context) -> Passed:
    """The plugin library in a TensorRT's registry, for which the lean runtime does without a GPU.

    Raises:
        NotRunError: no library, or no TensorRT with a registry.
        EngineError: it cannot be loaded.
    """
    path = _library(context)
    if not any(map(importlib.util.find_spec, RUNTIMES)):
        raise NotRunError("no TensorRT with a plugin registry", LEAN_LINE)
    shown = list_creators(path)
    names = ", ".join(creator["name"] for creator in shown["creators"])
    return Passed(f"{shown['runtime']} has {names}", shown)


def _library(context: Context) -> Path:
    """The library to build engines with.

    Raises:
        NotRunError: there is none.
    """
    for path in (_own_library(context), DEFAULT_OUTPUT / LIBRARY_NAME):
        if path.is_file():
            return path
    raise NotRunError("there is no plugin library", BUILD_LINE)


def _own_copy(context: Context, name: str) -> Artefact:
    """A copy of the export, into which engines are built; the user's stays as it is."""
    source, copy = context.find_artefact(), context.folder / "engines" / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(ENGINES, TRIALS))
    return load_artefact(copy)


def _say(text: str) -> None:
    print(text, flush=True)


def tensorrt(context: Context) -> Passed:
    """Engines with our plugin library; see `_run`."""
    need_gpu()
    need_package("tensorrt", TENSORRT.extra)
    options = EngineOptions(TENSORRT, plugins=_library(context))
    return _built_and_run(context, "plugins", options)


def quick_plugins(context: Context) -> Passed:
    """Engines whose plugins' code is inside the plan; see `_run`."""
    need_gpu()
    need_package("tensorrt", TENSORRT.extra)
    need_nvcc()
    return _built_and_run(
        context, "quick", EngineOptions(TENSORRT, flags=Flags(quick_plugins=True))
    )


def taken_apart(context: Context) -> Passed:
    """Engines without plugins, of standard operators; see `_run`."""
    need_gpu()
    need_package("tensorrt", TENSORRT.extra)
    return _built_and_run(context, "plain", EngineOptions(TENSORRT, take_apart=True))


def build_rtx(context: Context) -> Passed:
    """TensorRT-RTX engines, built for this machine's GPU or ahead of time for another one.

    Raises:
        NotRunError: no TensorRT-RTX.
        EngineError: the builder refuses the graphs.
    """
    need_package("tensorrt_rtx", TENSORRT_RTX.extra)
    targets = () if find_gpu() is not None else ("sm_86",)
    artefact = _own_copy(context, "rtx")
    records = build_engines(artefact, check_options(EngineOptions(TENSORRT_RTX, targets)), _say)
    first = next(iter(records.values()))
    sizes = {graph: record.plan.size_bytes for graph, record in records.items()}
    return Passed(
        f"{len(records)} engines built for {', '.join(first.targets)} by TensorRT-RTX "
        f"{first.version}, of standard operators",
        {"plan_bytes": sizes},
    )


def run_rtx(context: Context) -> Passed:
    """The engines of `build_rtx` on this machine's GPU; see `_run`.

    Raises:
        NotRunError: no GPU, or nothing was built.
    """
    need_gpu()
    folder = context.folder / "engines" / "rtx"
    if not (folder / ENGINES).is_dir():
        raise NotRunError("no TensorRT-RTX engine was built", TENSORRT_RTX.install)
    return _run(load_artefact(folder), TENSORRT_RTX)


def _built_and_run(context: Context, name: str, options: EngineOptions) -> Passed:
    artefact = _own_copy(context, name)
    build_engines(artefact, check_options(options), _say)
    return _run(artefact, options.kind)


_SESSIONS: dict[str, Callable[..., EngineSession]] = {
    TENSORRT.name: TensorrtSession,
    TENSORRT_RTX.name: TensorrtRtxSession,
}


def _run(artefact: Artefact, kind: Kind) -> Passed:
    """Layers of an artefact's engines, their masks against PyTorch's, and their times.

    Raises:
        AccuracyError: the masks miss the gate.
        EngineError: they do not run, or fused operators did not become plugins.
    """
    session = _SESSIONS[kind.name](artefact, verified=False)
    try:
        reports = {graph: _layers(artefact, session, graph) for graph in artefact.graphs}
        found, times = hold(artefact, session), time_session(artefact, session)
    finally:
        session.close()
    plugins, nodes = (
        sum(getattr(r, n) for r in reports.values()) for n in ("plugins", "operators")
    )
    layers = {graph: report.as_dict() for graph, report in reports.items()}
    return Passed(
        f"{plugins} plugin layers for {nodes} fused operators; {found.text}; {times.text}",
        {**found.figures, **times.figures, "layers": layers},
    )


def _layers(artefact: Artefact, session: EngineSession, graph: str) -> LayerReport:
    """What the builder made of a graph.

    Raises:
        EngineError: fused operators that should be plugins are none.
    """
    record, attention = session.records[graph], read_attention(artefact.path(graph))
    if record.flags.quick_plugins:
        attention = attention.of_quick_plugins()
    report = read_layers(session.layers(graph), attention)
    if record.plugins is not None or record.flags.quick_plugins:
        check_plugins(report, record.plan.file)
    return report


ENGINE_CHECKS: dict[str, CheckFunction] = {
    "plugin library": plugin_library,
    "plugins, loaded": load_library,
    "tensorrt, plugins": tensorrt,
    "tensorrt, quick plugins": quick_plugins,
    "tensorrt, no plugins": taken_apart,
    "tensorrt-rtx, built": build_rtx,
    "tensorrt-rtx, run": run_rtx,
}
