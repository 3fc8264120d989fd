"""The exported graphs on ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..artefact import Artefact, take_graphs
from ..cli import say_on_stderr
from ..core.contract import GraphSpec, graph_specs
from ..core.errors import EngineError, InputError
from ..core.imaging import FloatArray
from ..core.widening import widened
from ..extras import require
from ..files.onnx_data import OnnxContent
from .mapped_weights import LARGE_BYTES, map_weights, open_mapped
from .onnxruntime_providers import (
    CPU,
    PROVIDERS,
    import_onnxruntime,
    open_session,
    require_provider,
)
from .session import OPENED_LATER, Feed, Found, check_contract, check_feed, run_in_parts


class OnnxRuntimeSession:
    """The exported graphs on ONNX Runtime, made of the very bytes that were checked.

    All graphs are read and checked at once, so that they belong together whatever becomes of the
    folder. The prompt decoder is opened when the first point prompt comes.

    Args:
        artefact: a published export.
        device: `cpu` or `cuda`.
        threads: intra-op threads, 0 for one per core.
        as_typed: round to half precision wherever a CPU can, as the file says; by default a CPU
            computes in float32, see `core.widening`.
        cache: folder of this user alone from which weights of large graphs are mapped on a CPU, see
            `mapped_weights`; None holds them in this process's memory.

    Raises:
        InputError: a graph's file is missing or has changed.
        EngineError: onnxruntime or the device's provider is missing or incomplete, or a graph is
            not the contract's. A session never runs on another device than it was asked for.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    later: Collection[str] = OPENED_LATER
    """Graphs whose content waits for their first use."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        device: str = "cpu",
        threads: int = 0,
        as_typed: bool = False,
        cache: Path | None = None,
    ) -> None:
        if device not in self.devices:
            raise InputError(f"device {device!r}: expected {' or '.join(self.devices)}")
        self._runtime, self._provider = import_onnxruntime(), PROVIDERS[device]
        require_provider(self._runtime, self._provider)
        self.backend = f"onnxruntime-{device}"
        self._artefact, self._threads, self._as_typed = artefact, threads, as_typed
        self._weights_cache = cache
        self._specs = graph_specs(artefact.preprocessing)
        self._sessions: dict[str, Any] = {}
        self._content: dict[str, OnnxContent] = {}
        self._lock = threading.Lock()
        for graph, content in take_graphs(artefact):
            self._content[graph] = content
            del content
            if graph not in self.later:
                self._open(graph)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        with self._lock:
            if graph not in self._sessions:
                self._open(graph)
        if self._provider is CPU:
            return run_in_parts(spec, feed, lambda part, last: self._run(spec, part, last))
        return self._run(spec, feed)

    def _run(self, spec: GraphSpec, feed: Feed, tidy: bool = False) -> dict[str, FloatArray]:
        """Run an open graph, which keeps its memory for the next run unless it shall `tidy` up."""
        options = None
        if tidy:
            options = self._runtime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        outputs = self._sessions[spec.name].run(spec.output_names, feed, options)
        if self._provider is CPU:  # an output holds on to the block of memory that it lies in
            outputs = [array.copy() for array in outputs]
        return dict(zip(spec.output_names, outputs, strict=True))

    def _open(self, graph: str) -> None:
        """Open a graph, after which its content is dropped."""
        if graph not in self._content:
            self._artefact.path(graph)  # says which graphs there are
        spec = self._specs[graph]
        model = self._model(graph, self._content[graph])
        session = self._open_mapped(model) or open_session(
            self._runtime,
            model,
            self._provider,
            threads=self._threads,
            options=self._options(spec),
        )
        check_contract(spec, _tensors(session.get_inputs()), _tensors(session.get_outputs()))
        self._sessions[graph] = session
        del self._content[graph]

    def _open_mapped(self, model: OnnxContent) -> Any | None:
        """A session of a large graph whose weights are mapped; None where they shall be held."""
        size = len(model.model) + len(model.data or b"")
        if self._weights_cache is None or self._provider is not CPU or size < LARGE_BYTES:
            return None
        try:
            path = map_weights(self._runtime, model, self._weights_cache, self._threads)
            return open_mapped(self._runtime, path, self._threads)
        except EngineError as error:
            say_on_stderr(f"Weights are held in this process's memory: {error}")
            return None

    def _model(self, graph: str, content: OnnxContent) -> OnnxContent:
        """The graph, or what stands for it on the CPU."""
        if self._provider is CPU and graph in self._artefact.quantization.get("graphs", ()):
            require("onnx", extra="cpu", what_for="an int8 export on ONNX Runtime's CPU provider")
            from .cpu_graph import read_cpu_graph

            return read_cpu_graph(content)
        if self._provider is CPU and not self._as_typed and content.data is None:
            return OnnxContent(widened(content.model))
        return content

    def _options(self, spec: GraphSpec) -> dict[str, str]:
        """Provider options of one graph's session."""
        return {}


def _tensors(found: list[Any]) -> Found:
    return {tensor.name: (_DTYPES.get(tensor.type, tensor.type), tensor.shape) for tensor in found}


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
