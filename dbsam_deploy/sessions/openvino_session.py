"""Backend `openvino`: the exported graphs on OpenVINO, on the CPU.

Computes in float32, in bfloat16 (about twice as fast where the processor has instructions for it),
and in int8 wherever the artefact itself is quantised; both may be used together. Then what lies
before the first quantised layer stays float32 (`float_head`).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.inliner

from ..artefact import Artefact
from ..core.contract import BATCH, GraphSpec, graph_specs
from ..core.errors import EngineError, InputError
from ..core.imaging import FloatArray
from ..extras import require
from .float_head import Split, split_head
from .session import Feed, check_feed

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""What is computed in outside quantised layers → OpenVINO's name for it."""
HINT = "INFERENCE_PRECISION_HINT"


def import_openvino() -> ModuleType:
    """The installed OpenVINO.

    Raises:
        MissingError: there is none, or it does not load.
    """
    return require("openvino", extra="openvino", what_for="an export on OpenVINO")


class OpenvinoSession:
    """The exported graphs on OpenVINO; a graph is compiled when first used with a batch size.

    Batch sizes are fixed in the compiled model, which makes it faster; prompts stay dynamic.

    Args:
        artefact: a published export.
        precision: a key of `PRECISIONS`. With bfloat16, embeddings differ from float32's as far as
            `support.references.TOLERANCES` says.
        cache: folder for compiled models; without it `openvino` in the artefact's.
        threads: 0 for one per core.

    Raises:
        InputError: another precision.
        EngineError: openvino is missing.
    """

    def __init__(
        self,
        artefact: Artefact,
        *,
        precision: str = "float32",
        cache: Path | None = None,
        threads: int = 0,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r}: expected {' or '.join(PRECISIONS)}")
        self._runtime = import_openvino()
        self.backend = f"openvino-cpu-{precision}"
        self._artefact = artefact
        self._specs = graph_specs(artefact.preprocessing)
        self._settings = {
            HINT: PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            # By default activations of layers with int8 weights may be quantised on the fly.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads,
            "CACHE_DIR": str(cache or artefact.folder / "openvino"),
        }
        self._compiled: dict[tuple[str, int], list[Any]] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        key = graph, len(feed[spec.input_names[0]])
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(spec, key[1])
        values: Mapping[str, Any] = feed
        try:
            for part in self._compiled[key]:
                outputs = part.create_infer_request().infer(values, share_inputs=True)
                values = {port.any_name: outputs[port] for port in part.outputs}
        except RuntimeError as error:
            raise EngineError(f"{graph}: OpenVINO fails to run it: {error}") from error
        return {name: values[name] for name in spec.output_names}

    def _compile(self, spec: GraphSpec, batch: int) -> list[Any]:
        """One compiled model, or two that follow each other."""
        core = self._runtime.Core()
        path = self._artefact.path(spec.name)
        shapes = {
            tensor.name: [
                axis if isinstance(axis, int) else batch if axis == BATCH else -1
                for axis in tensor.axes
            ]
            for tensor in spec.inputs
        }
        exact = {**self._settings, HINT: PRECISIONS["float32"]}
        try:
            split = self._split(path, spec)
            if split is None:
                return [self._compile_part(core, _source(path), shapes, self._settings)]
            head = self._compile_part(core, _bytes(split.head), shapes, exact)
            between = {split.tensor: list(head.output(0).shape)}
            rest = self._compile_part(core, _bytes(split.rest), between, self._settings)
        except RuntimeError as error:
            raise EngineError(
                f"openvino {self._runtime.__version__} does not compile {path.name}: {error}"
            ) from error
        return [head, rest]

    def _split(self, path: Path, spec: GraphSpec) -> Split | None:
        if self._settings[HINT] == PRECISIONS["float32"]:
            return None
        return split_head(_inlined(path), spec)

    def _compile_part(
        self,
        core: Any,
        source: str | io.BytesIO,
        shapes: dict[str, list[int]],
        settings: dict[str, Any],
    ) -> Any:
        model = core.read_model(source)
        model.reshape({n: self._runtime.PartialShape(shape) for n, shape in shapes.items()})
        return core.compile_model(model, "CPU", settings)


def _source(path: Path) -> str | io.BytesIO:
    """What OpenVINO reads: the file, or its copy without functions, which it does not know."""
    if onnx.load(path, load_external_data=False).functions:
        return _bytes(_inlined(path))
    return str(path)


def _inlined(path: Path) -> onnx.ModelProto:
    """The graph in standard ops only: each function's body in the place of its calls."""
    return onnx.inliner.inline_local_functions(onnx.load(path))


def _bytes(model: onnx.ModelProto) -> io.BytesIO:
    return io.BytesIO(model.SerializeToString())
