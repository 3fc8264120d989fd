"""Stands in for Triton's C++ `onnxruntime` backend where only its Python backend is installed.

Triton takes a folder `<backend directory>/onnxruntime` with this file for a backend of that name,
so the production `config.pbtxt` is served unchanged: same batching, same ensemble, ONNX Runtime on
the CPU from Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from allocation import reuse_blocks
from array_guard import guard_arrays
from cores import fewer_cores
from widening import MOST_BYTES, widened

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
}

_BLOCK = 8 << 20
"""Bytes of an embedding of 1024 pixels, twice."""
_SMALL_ROWS = 2
"""Prompts of a run whose memory (33 MiB each at 1024 pixels) is kept for the next run."""


class _OnnxGraph:
    """A graph on ONNX Runtime.

    Attributes:
        inputs: name, Triton's type and sizes of each; a free axis has its name in place of a size.
        outputs: likewise.
    """

    def __init__(self, path: Path, threads: int) -> None:
        """Open it as a local session does, see `widening`; a large one's weights stay a file."""
        import onnxruntime  # not where another runtime takes its place

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or fewer_cores()
        # A pattern would keep a second block as large as all tensors of a run.
        options.enable_mem_pattern = False
        # Its threads spin while they wait for work of a run, but not after it: the cores are needed
        # for the answer's way back.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._tidy = onnxruntime.RunOptions()
        self._tidy.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        small = path.stat().st_size <= MOST_BYTES
        source = widened(path.read_bytes()) if small else str(path)
        chain = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(source, options, providers=chain)
        self.inputs, self.outputs = (
            [(tensor.name, _TYPES.get(tensor.type), tensor.shape) for tensor in found]
            for found in (self._session.get_inputs(), self._session.get_outputs())
        )
        self._free = [n for n, _, shape in self.inputs if str(shape[1]).startswith("num_")]

    def run(self, names: list[str], batch: dict[str, Any]) -> list[Any]:
        """Outputs by their names.

        A large run's memory is given back; a click keeps its own, which makes the next one quick.
        """
        rows = max((batch[name].shape[1] for name in self._free), default=1)
        options = self._tidy if rows > _SMALL_ROWS else None
        found: list[Any] = self._session.run(names, batch, options)
        return found


class TritonPythonModel:
    """One instance of a model that names this backend."""

    graph_file = "model.onnx"
    notice = "a stand-in for Triton's onnxruntime backend runs {path} on the CPU from Python"

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph and compare its inputs and outputs with the configuration."""
        guard_arrays(pb_utils)
        reuse_blocks(_BLOCK)
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], self.graph_file)
        if not path.is_file():
            raise pb_utils.TritonModelException(self.missing(path))
        self._session = self.open(path, config["parameters"])
        self._batched = batched = config["max_batch_size"] > 0
        _check(config["input"], self._session.inputs, batched)
        _check(config["output"], self._session.outputs, batched)
        self._inputs = [name for name, _, _ in self._session.inputs]
        self._limits = {
            name: _limits(shape[batched:], config["parameters"])
            for name, _, shape in self._session.inputs
        }
        self._outputs = [name for name, _, _ in self._session.outputs]
        notice = self.notice.format(path=path)
        pb_utils.Logger.log_warn(f"STAND-IN, model {args['model_name']}: {notice}")

    def open(self, path: Path, parameters: dict[str, Any]) -> Any:
        """The graph: `inputs`, `outputs` and `run`, as `_OnnxGraph` has them."""
        threads = parameters.get("intra_op_thread_count", {}).get("string_value", "0")
        return _OnnxGraph(path, int(threads))

    def missing(self, path: Path) -> str:
        """Text for a graph file that is not there."""
        return f"the graph {path} is missing: export again"

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests as the one batch that Triton's batcher made of them.

        An exception of the runtime is the requests' error, sent by Triton itself.
        """
        feeds = [{t.name(): t.as_numpy() for t in request.inputs()} for request in requests]
        found = (_mistake(feed, self._limits, batched=self._batched) for feed in feeds)
        wrong = "; ".join(filter(None, found))
        if wrong:  # requests of one batch have one shape, so all have the mistake
            error = pb_utils.TritonError(wrong, pb_utils.TritonError.INVALID_ARG)
            return [pb_utils.InferenceResponse(error=error) for _ in requests]
        return self._run(feeds)

    def _run(self, feeds: list[dict[str, Any]]) -> list[Any]:
        sizes = [len(feed[self._inputs[0]]) for feed in feeds]
        batch = feeds[0]
        if len(feeds) > 1:
            batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        outputs = self._session.run(self._outputs, batch)
        cuts = np.cumsum(sizes)[:-1]
        parts = zip(*(np.split(output, cuts) for output in outputs), strict=True)
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.ascontiguousarray(array))
                    for name, array in zip(self._outputs, part, strict=True)
                ]
            )
            for part in parts
        ]


def _limits(shape: list[Any], parameters: dict[str, Any]) -> list[tuple[int, int]]:
    """Least and largest size of each axis; of a free one the parameter `max_<its name>`."""
    found = []
    for axis in shape:
        if isinstance(axis, int):
            found.append((axis, axis))
        else:
            found.append((1, int(parameters[f"max_{axis}"]["string_value"])))
    return found


def _mistake(
    feed: dict[str, Any], limits: dict[str, list[tuple[int, int]]], *, batched: bool
) -> str:
    """What is wrong with the arrays' shapes, or ""; of a batched model without its first axis."""
    for name, expected in limits.items():
        sizes = feed[name].shape[batched:]
        fits = len(sizes) == len(expected) and all(
            least <= size <= most for size, (least, most) in zip(sizes, expected, strict=True)
        )
        if not fits:
            ranges = [str(low) if low == high else f"{low}–{high}" for low, high in expected]
            return f"{name}: {list(sizes)} a request, expected [{', '.join(ranges)}]"
    return ""


def _check(
    configured: list[dict[str, Any]], graph: list[tuple[str, Any, list[Any]]], batched: bool
) -> None:
    """Refuse a configuration that is not the graph's, as the C++ backend does."""
    found = {name: (dtype, shape) for name, dtype, shape in graph}
    names = {item["name"] for item in configured}
    if names != set(found):
        raise pb_utils.TritonModelException(
            f"config.pbtxt names {sorted(names)}, the graph has {sorted(found)}: export again"
        )
    for item in configured:
        dtype, shape = found[item["name"]]
        dims = [int(size) for size in item["dims"]]
        sizes = shape[1:] if batched else shape
        fits = len(dims) == len(sizes) and all(
            dim == size or not isinstance(size, int) for dim, size in zip(dims, sizes, strict=True)
        )
        if item["data_type"] != dtype or not fits:
            raise pb_utils.TritonModelException(
                f"{item['name']}: config.pbtxt says {item['data_type']}{dims}, the graph "
                f"{dtype}{list(sizes)}: export again"
            )
