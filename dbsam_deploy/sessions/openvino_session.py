"""Backend `openvino`: the exported graphs on OpenVINO, on the CPU.

Computes in float32, in bfloat16 (about twice as fast where the processor has instructions for it),
and in int8 wherever the artefact itself is quantised; both may be used together. Coordinates, and
what a recipe left in float between quantised layers, then stay float32 (`float_head`).
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.inliner

from ..artefact import Artefact, take_graphs
from ..core.compiled_parts import run_parts
from ..core.contract import BATCH, MASK_BITS, GraphSpec, graph_specs
from ..core.errors import CacheError, EngineError, InputError
from ..core.imaging import FloatArray
from ..extras import require
from ..files.atomic import write_files
from ..files.onnx_data import OnnxContent
from ..files.onnx_files import read_content
from ..files.private import (
    OTHER_FOLDER,
    cache_folder,
    discard,
    find_kept,
    keep,
    making,
    private_folder,
    trim,
)
from ..machine.cores import fewer_cores
from ..machine.hardware import cpuinfo, processor
from .float_head import Part, split_graph
from .session import Feed, Found, check_contract, check_feed, run_in_parts

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""What is computed in outside quantised layers → OpenVINO's name for it."""
KEPT_BYTES = 4 << 30
"""Most that compiled models take in a user's cache; one of SAM's ViT-B has 416 MB."""
_SUFFIX = ".blob"
HINT = "INFERENCE_PRECISION_HINT"
BFLOAT16 = "bfloat16"


def import_openvino() -> ModuleType:
    """The installed OpenVINO.

    Raises:
        MissingError: there is none, or it does not load.
    """
    return require("openvino", extra="openvino", what_for="an export on OpenVINO")


@dataclass(frozen=True)
class CompiledPart:
    """A compiled model.

    Attributes:
        model: OpenVINO's.
        path: where it is kept; the name ends with the SHA-256 of its content.
        settings: that it was compiled with, and is opened with again.
    """

    model: Any
    path: Path
    settings: dict[str, Any]


class OpenvinoSession:
    """The exported graphs on OpenVINO; a graph is compiled when first used with a batch size.

    Batch sizes are fixed in the compiled model, which makes it faster; prompts stay dynamic. All
    graphs are read and checked at once, and kept, so that they belong together whatever becomes of
    the folder.

    Args:
        artefact: a published export.
        precision: a key of `PRECISIONS`, of all graphs. With bfloat16, embeddings differ from
            float32's as far as `support.references.TOLERANCES` says.
        lowered: graphs that compute in bfloat16 though `precision` is float32.
        cache: folder for compiled models, this user's alone; without it `openvino` in this user's
            cache.
        threads: 0 for one per core that this process may use.

    Raises:
        InputError: another precision, or a graph's file that is missing or has changed.
        EngineError: openvino is missing, a graph is not the contract's, or the cache is not this
            user's alone.
    """

    def __init__(
        self,
        artefact: Artefact,
        *,
        precision: str = "float32",
        lowered: Collection[str] = (),
        cache: Path | None = None,
        threads: int = 0,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r}: expected {' or '.join(PRECISIONS)}")
        self._runtime = import_openvino()
        self.backend = f"openvino-cpu-{precision}"
        for graph in lowered:
            self.backend += f"-{graph}-{BFLOAT16}"
        self._artefact = artefact
        self._specs = graph_specs(artefact.preprocessing)
        # Masks of logits are no matter of speed here, and their edges would move.
        whole = set(self._specs) - {MASK_BITS}
        self._lowered = whole if precision == BFLOAT16 else set(lowered)
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            # By default activations of layers with int8 weights may be quantised on the fly.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads or fewer_cores(),
        }
        hint = f"; {OTHER_FOLDER}"
        self._cache = private_folder(cache or cache_folder("openvino"), "compiled models", hint)
        self._graphs = {
            graph: _standard(content, self._specs[graph])
            for graph, content in take_graphs(artefact)
        }
        self._compiled: dict[tuple[str, int], list[CompiledPart]] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        models = [part.model for part in self.compiled(graph, len(feed[spec.input_names[0]]))]
        return run_in_parts(spec, feed, lambda part, _: self._run(spec, models, part))

    def compiled(self, graph: str, batch: int = 1) -> list[CompiledPart]:
        """What runs a graph: compiled models that follow each other, compiled now if need be.

        Args:
            graph: its name.
            batch: images at once.

        Raises:
            EngineError: it cannot be compiled, or kept.
        """
        with self._lock:
            if (graph, batch) not in self._compiled:
                self._compiled[graph, batch] = self._compile(self._specs[graph], batch)
            return self._compiled[graph, batch]

    def _run(self, spec: GraphSpec, models: list[Any], feed: Feed) -> dict[str, FloatArray]:
        try:
            return run_parts(models, feed, spec.output_names)
        except RuntimeError as error:
            raise EngineError(f"{spec.name}: OpenVINO fails to run it: {error}") from error

    def _compile(self, spec: GraphSpec, batch: int) -> list[CompiledPart]:
        """Compiled models that follow each other: one, but for what is partly in bfloat16."""
        core = self._runtime.Core()
        name = self._artefact.path(spec.name).name
        source = self._graphs[spec.name]
        shapes = {
            tensor.name: [
                axis if isinstance(axis, int) else batch if axis == BATCH else -1
                for axis in tensor.axes
            ]
            for tensor in spec.inputs
        }
        kinds = {
            lowered: {**self._settings, HINT: PRECISIONS[BFLOAT16 if lowered else "float32"]}
            for lowered in (True, False)
        }
        try:
            if spec.name not in self._lowered:
                return [self._compile_part(core, source, shapes, kinds[False])]
            parts = split_graph(read_content(source), spec)
            if len(parts) == 1:
                return [self._compile_part(core, source, shapes, kinds[True])]
            return list(self._compile_parts(core, parts, shapes, kinds))
        except RuntimeError as error:
            raise EngineError(
                f"openvino {self._runtime.__version__} does not compile {name}: {error}"
            ) from error

    def _compile_parts(
        self,
        core: Any,
        parts: Iterable[Part],
        shapes: dict[str, list[int]],
        kinds: Mapping[bool, dict[str, Any]],
    ) -> Iterator[CompiledPart]:
        """Each part, with the sizes that those before it give."""
        for part in parts:
            own = {value.name: shapes[value.name] for value in part.graph.graph.input}
            content = OnnxContent(part.graph.SerializeToString())
            compiled = self._compile_part(core, content, own, kinds[part.lowered])
            outputs = compiled.model.outputs
            shapes |= {name: _sizes(port) for port in outputs for name in port.names}
            yield compiled

    def _compile_part(
        self,
        core: Any,
        source: OnnxContent,
        shapes: dict[str, list[int]],
        settings: dict[str, Any],
    ) -> CompiledPart:
        """A compiled model, out of the cache if it has one of all that determines it."""
        facts = [self._runtime.__version__, processor(cpuinfo()), shapes, settings]
        key = hashlib.sha256(source.model + json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if found := find_kept(self._cache, key, _SUFFIX):
            try:
                opened = core.import_model(io.BytesIO(found[1]), "CPU", settings)
            except RuntimeError:  # of a machine that hides other instructions, say: made again
                discard(found[0])
            else:
                return CompiledPart(opened, found[0], settings)
        model = self._read(core, source)
        model.reshape({n: self._runtime.PartialShape(shape) for n, shape in shapes.items()})
        compiled = core.compile_model(model, "CPU", settings)
        with self._keeping():
            path = keep(self._cache, key, _SUFFIX, compiled.export_model().getvalue())
        trim(self._cache, _SUFFIX, KEPT_BYTES, spare=path)
        return CompiledPart(compiled, path, settings)

    def _read(self, core: Any, source: OnnxContent) -> Any:
        """A graph as OpenVINO has it; weights in a file of their own are read from a disk alone."""
        if source.data is None:
            return core.read_model(io.BytesIO(source.model))
        with self._keeping(), making(self._cache, _SUFFIX) as folder:
            path = folder / "graph.onnx"
            write_files({path: source.model, path.with_name(source.location): source.data})
            return core.read_model(path)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"compiled models cannot be kept in {self._cache}: {error.strerror}; {OTHER_FOLDER}"
            ) from error


def _sizes(port: Any) -> list[int]:
    """A tensor's sizes, -1 where one is not fixed."""
    return [size.get_length() if size.is_static else -1 for size in port.get_partial_shape()]


def _standard(content: OnnxContent, spec: GraphSpec) -> OnnxContent:
    """A graph in standard ops only, since OpenVINO knows no functions, checked by the contract."""
    try:
        model = onnx.load_model_from_string(content.model)
    except Exception as error:
        raise EngineError(f"the file of {spec.name} is no ONNX ({error}): export again") from error
    fixed = {tensor.name for tensor in model.graph.initializer}
    inputs = [tensor for tensor in model.graph.input if tensor.name not in fixed]
    check_contract(spec, _tensors(inputs), _tensors(model.graph.output))
    if not model.functions:
        return content
    inlined = onnx.inliner.inline_local_functions(model)
    return replace(content, model=inlined.SerializeToString())


def _tensors(found: Any) -> Found:
    return {tensor.name: _tensor(tensor.type.tensor_type) for tensor in found}


def _tensor(kind: Any) -> tuple[str, list[int | None]]:
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), sizes
    except KeyError:
        return "unknown", sizes
