"""Backend `openvino`: the exported graphs on OpenVINO, on the CPU.

Computes in float32, in bfloat16 (about twice as fast where the processor has instructions for it),
and in int8 wherever the artefact itself is quantised; both may be used together.
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from .artefact import Artefact
from .contract import BATCH, GraphSpec, graph_specs
from .errors import EngineError, InputError, MissingError
from .extras import pip_line
from .fusions import inlined
from .sessions import Feed, FloatArray, check_feed

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""What is computed in outside quantised layers → OpenVINO's name for it."""


def import_openvino() -> ModuleType:
    """The installed OpenVINO.

    Raises:
        MissingError: there is none, or it does not load.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingError(
            f"OpenVINO is not installed or does not load ({error})", pip_line("openvino")
        ) from error
    return openvino


class OpenvinoSession:
    """The exported graphs on OpenVINO; a graph is compiled when first used with a batch size.

    Batch sizes are fixed in the compiled model, which makes it faster; prompts stay dynamic.

    Args:
        artefact: a published export.
        precision: a key of `PRECISIONS`. With bfloat16, embeddings differ from float32's as far as
            `dbsam_deploy.testing.TOLERANCES` says.
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
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            # By default activations of layers with int8 weights may be quantised on the fly.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads,
            "CACHE_DIR": str(cache or artefact.folder / "openvino"),
        }
        self._compiled: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        key = graph, len(feed[spec.input_names[0]])
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(spec, key[1])
        try:
            outputs = self._compiled[key].create_infer_request().infer(feed, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"{graph}: OpenVINO fails to run it: {error}") from error
        return {name: outputs[name] for name in spec.output_names}

    def _compile(self, spec: GraphSpec, batch: int) -> Any:
        core = self._runtime.Core()
        path = self._artefact.path(spec.name)
        try:
            model = core.read_model(_source(path))
            model.reshape(
                {
                    tensor.name: self._runtime.PartialShape(
                        [
                            axis if isinstance(axis, int) else batch if axis == BATCH else -1
                            for axis in tensor.axes
                        ]
                    )
                    for tensor in spec.inputs
                }
            )
            return core.compile_model(model, "CPU", self._settings)
        except RuntimeError as error:
            raise EngineError(
                f"openvino {self._runtime.__version__} does not compile {path.name}: {error}"
            ) from error


def _source(path: Path) -> str | io.BytesIO:
    """What OpenVINO reads: the file, or its copy without functions, which it does not know."""
    if onnx.load(path, load_external_data=False).functions:
        return io.BytesIO(inlined(path).SerializeToString())
    return str(path)
