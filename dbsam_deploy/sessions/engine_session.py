"""Sessions on engines: TensorRT and TensorRT-RTX behind the interface of `sessions.Session`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ..artefact import Artefact
from ..core.contract import graph_specs
from ..core.errors import EngineError, InputError
from ..core.imaging import FloatArray
from ..engines.cuda import CudaDevice, open_device
from ..engines.device import Gpu
from ..engines.kinds import TENSORRT, TENSORRT_RTX, Kind, import_kind
from ..engines.manifest import (
    EngineRecord,
    check_runs_here,
    engine_folder,
    own_plugin_library,
    read_plan,
    read_records,
    require_parity,
)
from ..engines.network import engine_tensors, inspect_engine, load_engine
from ..engines.profiles import check_sizes
from ..engines.runner import EngineRunner
from ..engines.shapes import axis_sizes
from .session import OPENED_LATER, Feed, check_contract, check_feed

SPECIALIZATIONS = ("lazy", "eager", "none")
"""When TensorRT-RTX compiles kernels for a new shape: behind its first run, before it, or never."""


class EngineSession(ABC):
    """An artefact's engines of one kind on the first GPU.

    Every plan is checked before it is loaded: its content, the runtime's version, this GPU, and
    that it passed its gate on such a GPU together with the others; a loaded engine is compared with
    the contract. All plans are read when the session opens, and so are loaded, but for the prompt
    decoder's, which waits for its first use. Runs of several threads take turns.

    Args:
        kind: which engines.
        artefact: a published export with engines.
        cuda_graphs: replay shapes that come again as CUDA graphs.
        verified: False only to measure a gate that has not been passed yet.
        device: the GPU, None to open the first one.
        runtime: the kind's module, None to import it.

    Raises:
        MissingError: the runtime or PyCUDA is not installed.
        EngineError: no GPU, or plans that are missing, changed, for another version or GPU, not
            verified, or not of the contract's graphs.
    """

    def __init__(
        self,
        kind: Kind,
        artefact: Artefact,
        *,
        cuda_graphs: bool = True,
        verified: bool = True,
        device: CudaDevice | None = None,
        runtime: Any = None,
    ) -> None:
        self.backend = kind.name
        self.kind, self._artefact = kind, artefact
        self._folder = engine_folder(artefact, kind)
        self._specs = graph_specs(artefact.preprocessing)
        self._records = read_records(artefact, kind)
        self._trt = import_kind(kind) if runtime is None else runtime
        self._device = open_device(kind.extra) if device is None else device
        for record in self._records.values():
            check_runs_here(record, str(self._trt.__version__), self.gpu)
        if verified:
            require_parity(artefact.folder, self._records, self.gpu)
        # Read with the session, so that they belong together whatever becomes of the folder.
        self._plans = {
            graph: read_plan(self._folder, record) for graph, record in self._records.items()
        }
        self._libraries = {
            graph: own_plugin_library(self._folder, record)
            for graph, record in self._records.items()
        }
        self._cuda_graphs = cuda_graphs
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._engines: dict[str, Any] = {}
        self._runners: dict[str, EngineRunner] = {}
        self._lock = threading.Lock()
        with self._device.current():
            for graph in self._records:
                if graph not in OPENED_LATER:
                    self._engine(graph)

    @property
    def gpu(self) -> Gpu:
        """The GPU that runs the engines."""
        return self._device.gpu

    @property
    def records(self) -> dict[str, EngineRecord]:
        """Manifest of each graph's plan."""
        return dict(self._records)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`.

        Raises:
            InputError: a feed that breaks the contract, or sizes that the engine was not built for.
        """
        spec = self._specs[graph]
        check_feed(spec, feed)
        check_sizes(spec, self._records[graph].ranges, axis_sizes(spec, feed))
        with self._lock, self._device.current():
            if graph not in self._runners:
                self._runners[graph] = self._open_runner(graph)
            return self._runners[graph].run(feed)

    def layers(self, graph: str) -> str:
        """What the builder made of a graph: its engine inspector's JSON."""
        with self._lock, self._device.current():
            return inspect_engine(self._trt, self._engine(graph))

    def close(self) -> None:
        """Free everything on the GPU; the session is of no use afterwards."""
        with self._lock, self._device.current():
            for runner in self._runners.values():
                runner.close()
            self._runners.clear()
            self._engines.clear()

    def _engine(self, graph: str) -> Any:
        if graph not in self._engines:
            record = self._records[graph]
            library = self._libraries[graph]
            if library is not None:
                self._load_plugins(library)
            self._check_plan(graph, self._plans[graph])
            engine = load_engine(
                self._trt,
                self._runtime,
                self._plans[graph],
                version_compatible=record.flags.version_compatible,
            )
            check_contract(self._specs[graph], *engine_tensors(self._trt, engine))
            self._engines[graph] = engine
            del self._plans[graph]
        return self._engines[graph]

    def _load_plugins(self, library: Path) -> None:
        from ..kernels.plugin_registry import load_plugins

        load_plugins(library, runtime=self._trt)

    def _check_plan(self, graph: str, plan: bytes) -> None:  # noqa: B027 - most kinds cannot ask
        """Ask the runtime about a plan before it is loaded."""

    def _open_runner(self, graph: str) -> EngineRunner:
        return EngineRunner(
            self._engine(graph),
            self._specs[graph],
            self._device,
            new_context=self._new_context,
            record=self._cuda_graphs and not self.kind.captures,
        )

    @abstractmethod
    def _new_context(self, engine: Any) -> Any:
        """An execution context of `engine`; None where the runtime makes none."""


class TensorrtSession(EngineSession):
    """TensorRT engines; see `EngineSession`."""

    def __init__(self, artefact: Artefact, **options: Any) -> None:
        super().__init__(TENSORRT, artefact, **options)

    def _new_context(self, engine: Any) -> Any:
        if not self._cuda_graphs:
            return engine.create_execution_context()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return engine.create_execution_context(strategy)


class TensorrtRtxSession(EngineSession):
    """TensorRT-RTX engines, whose kernels are compiled for this GPU when they are loaded.

    Args:
        artefact: see `EngineSession`.
        specialization: one of `SPECIALIZATIONS`; `none` gives every shape the same kernels.
        **options: see `EngineSession`.
    """

    def __init__(self, artefact: Artefact, *, specialization: str = "lazy", **options: Any) -> None:
        if specialization not in SPECIALIZATIONS:
            raise InputError(
                f"specialization {specialization!r}: expected one of {', '.join(SPECIALIZATIONS)}"
            )
        self._specialization = specialization
        super().__init__(TENSORRT_RTX, artefact, **options)

    def _check_plan(self, graph: str, plan: bytes) -> None:
        validity, found = self._runtime.get_engine_validity(plan)
        if validity == self._trt.EngineValidity.INVALID:
            members = self._trt.EngineInvalidityDiagnostics.__members__
            reasons = [name for name, value in members.items() if int(found) & int(value)]
            raise EngineError(
                f"{graph}.plan is not valid here: {', '.join(reasons) or found}; build it for "
                f"{self.gpu.target} ({self.gpu.name}) with this version"
            )

    def _new_context(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            strategies, self._specialization.upper()
        )
        if self._cuda_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)
