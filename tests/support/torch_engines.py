"""For tests of benchmarks: TensorRT's runtime on PyTorch's tensors, played by ONNX Runtime.

A plan here is an ONNX file, and addresses are those of tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.engines.layers import read_attention
from dbsam_deploy.engines.network import BuildJob


def _array(address: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Float32 memory at an address."""
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape)


class PlayedContext:
    """An execution context for the shape that its engine was built for."""

    def __init__(self, session: Any) -> None:
        self._session, self._addresses = session, {}
        self._shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set it; false for another number of channels."""
        self._shape = shape
        return name == "image" and shape[1] == 3

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output, with the batch of the input."""
        (found,) = (item for item in self._session.get_outputs() if item.name == name)
        return (self._shape[0], *found.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Set where a tensor lies."""
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Run at once."""
        image = _array(self._addresses["image"], self._shape)
        names = [item.name for item in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(None, {"image": image}), strict=True):
            np.copyto(_array(self._addresses[name], value.shape), value)
        return True


def _deserialised(plan: bytes) -> SimpleNamespace:
    session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
    return SimpleNamespace(
        create_execution_context=lambda: PlayedContext(session), device_memory_size_v2=4096
    )


PLAYED_TENSORRT = SimpleNamespace(
    Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
    Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=_deserialised),
)
"""The module `tensorrt`."""


def played_build(job: BuildJob, folder: Path, graph: str) -> dict[str, Any]:
    """`engines.process.run_job`: each fused node becomes a plugin layer where one was loaded."""
    if job.plugins and not Path(job.plugins).is_file():
        raise EngineError(f"no plugin library {job.plugins}")
    shutil.copyfile(job.onnx, job.plan)
    attention = read_attention(Path(job.onnx))
    if job.flags.quick_plugins:
        attention = attention.of_quick_plugins()
    loaded = job.plugins or job.flags.quick_plugins
    layers = [{"Name": name, "LayerType": "PluginV3"} for name in attention.operators if loaded]
    Path(job.layers).write_text(json.dumps({"Layers": [*layers, {"Name": "x", "LayerType": "y"}]}))
    return {"network_layers": len(layers) + 1, "seconds": 0.0}
