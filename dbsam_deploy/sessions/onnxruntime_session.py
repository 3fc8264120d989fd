"""The exported graphs on ONNX Runtime."""

from __future__ import annotations

from typing import Any

from ..artefact import Artefact
from ..core.contract import GraphSpec, graph_specs
from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..extras import require
from .onnxruntime_providers import (
    CPU,
    PROVIDERS,
    import_onnxruntime,
    open_session,
    require_provider,
)
from .session import Feed, check_feed


class OnnxRuntimeSession:
    """The exported graphs on ONNX Runtime; graphs are loaded when first used.

    Args:
        artefact: a published export.
        device: `cpu` or `cuda`.
        threads: intra-op threads, 0 for one per core.

    Raises:
        EngineError: onnxruntime or the device's provider is missing or incomplete. A session never
            runs on another device than the one it was asked for.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, artefact: Artefact, *, device: str = "cpu", threads: int = 0) -> None:
        if device not in self.devices:
            raise InputError(f"device {device!r}: expected {' or '.join(self.devices)}")
        self._runtime, self._provider = import_onnxruntime(), PROVIDERS[device]
        require_provider(self._runtime, self._provider)
        self.backend = f"onnxruntime-{device}"
        self._artefact, self._threads = artefact, threads
        self._specs = graph_specs(artefact.preprocessing)
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        if graph not in self._sessions:
            self._sessions[graph] = open_session(
                self._runtime,
                self._model(graph),
                self._provider,
                threads=self._threads,
                options=self._options(spec),
            )
        outputs = self._sessions[graph].run(spec.output_names, feed)
        return dict(zip(spec.output_names, outputs, strict=True))

    def _model(self, graph: str) -> str | bytes:
        """The file, or what stands for it on the CPU."""
        path = self._artefact.path(graph)
        if self._provider is CPU and graph in self._artefact.quantization.get("graphs", ()):
            require("onnx", extra="cpu", what_for="an int8 export on ONNX Runtime's CPU provider")
            from .cpu_graph import read_cpu_graph

            return read_cpu_graph(path)
        return str(path)

    def _options(self, spec: GraphSpec) -> dict[str, str]:
        """Provider options of one graph's session."""
        return {}
