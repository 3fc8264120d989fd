"""Runs one engine: buffers that grow, one execution context, CUDA graphs of shapes seen before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import GraphSpec
from ..core.errors import EngineError
from ..core.imaging import Arrays
from .cuda import Bytes, CudaDevice, CudaGraph
from .shapes import Shape, axis_sizes, check_outputs, concrete_shapes, size_bytes

MAX_RECORDINGS = 8
"""CUDA graphs kept for each engine; the one used longest ago is dropped for a new shape."""


@dataclass
class _Buffer:
    """One tensor's memory: on the device and page-locked on the host, of one capacity in bytes."""

    device: Any
    host: Bytes

    @property
    def capacity(self) -> int:
        return self.host.nbytes


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph, and the context that it was recorded from, which it needs unchanged."""

    context: Any
    graph: CudaGraph


class EngineRunner:
    """One graph's engine on one GPU. Not for several threads at once.

    The first run of a shape goes through a context that serves all shapes; the second one through a
    context of its own, from which a CUDA graph is recorded; later ones replay that. Contexts share
    one block of memory for activations, since one runs at a time.

    Args:
        engine: a deserialised engine.
        spec: its graph.
        device: the GPU, current in this thread here and in every method.
        new_context: makes an execution context of `engine` without activation memory if `record`
            is true, else with its own.
        record: whether CUDA graphs are recorded here (and not by the runtime or not at all).
    """

    def __init__(
        self,
        engine: Any,
        spec: GraphSpec,
        device: CudaDevice,
        *,
        new_context: Callable[[Any], Any],
        record: bool,
    ) -> None:
        self._engine, self._spec, self._device = engine, spec, device
        self._new_context, self._record = new_context, record
        self._size = int(engine.device_memory_size_v2) if record else 0
        self._activations: Any = device.allocate(max(self._size, 1)) if record else None
        self._context = self._open_context()
        self._buffers: dict[str, _Buffer] = {}
        self._seen: set[tuple[Shape, ...]] = set()
        self._recordings: OrderedDict[tuple[Shape, ...], _Recording] = OrderedDict()

    def _open_context(self) -> Any:
        context = self._new_context(self._engine)
        if context is None:
            raise EngineError(
                f"{self._spec.name}: the runtime makes no execution context; is there enough GPU "
                "memory? Its reason is in the log above"
            )
        if self._record:
            context.set_device_memory(int(self._activations), self._size)
        return context

    def run(self, feed: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run on arrays that `sessions.check_feed` and `profiles.check_sizes` have passed.

        Raises:
            EngineError: the runtime refuses, or memory is short.
        """
        shapes = concrete_shapes(self._spec, axis_sizes(self._spec, feed))
        self._reserve(shapes)
        for tensor in self._spec.inputs:
            buffer = self._buffers[tensor.name]
            host = buffer.host[: size_bytes(tensor, shapes[tensor.name])]
            np.copyto(host.view(tensor.dtype).reshape(shapes[tensor.name]), feed[tensor.name])
            self._device.upload(buffer.device, host)
        self._launch(shapes)
        views = {}
        for tensor in self._spec.outputs:
            buffer, shape = self._buffers[tensor.name], shapes[tensor.name]
            views[tensor.name] = buffer.host[: size_bytes(tensor, shape)]
            self._device.download(views[tensor.name], buffer.device)
        self._device.synchronise()
        return {
            tensor.name: views[tensor.name]
            .view(tensor.dtype)
            .reshape(shapes[tensor.name])
            .copy()  # the buffer belongs to the next run
            for tensor in self._spec.outputs
        }

    def _reserve(self, shapes: dict[str, Shape]) -> None:
        """Make every buffer large enough; recordings know addresses, so a new one ends them."""
        for tensor in (*self._spec.inputs, *self._spec.outputs):
            size = size_bytes(tensor, shapes[tensor.name])
            found = self._buffers.get(tensor.name)
            if found is None or found.capacity < size:
                self._drop_recordings()
                self._buffers.pop(tensor.name, None)  # freed before the larger one is taken
                memory = self._device.allocate(size)
                self._buffers[tensor.name] = _Buffer(memory, self._device.allocate_host(size))

    def _drop_recordings(self) -> None:
        for recording in self._recordings.values():
            recording.graph.close()
        self._recordings.clear()
        self._seen.clear()

    def _launch(self, shapes: dict[str, Shape]) -> None:
        key = tuple(shapes[name] for name in self._spec.input_names)
        if key in self._recordings:
            self._recordings.move_to_end(key)
            self._recordings[key].graph.launch()
        elif self._record and key in self._seen:
            context = self._open_context()
            self._bind(context, shapes)
            # TensorRT prepares a context for its shapes in the first run, which cannot be recorded.
            self._enqueue(context)
            self._keep(
                key, _Recording(context, self._device.record(lambda: self._enqueue(context)))
            )
        else:
            self._bind(self._context, shapes)
            self._enqueue(self._context)
            self._seen.add(key)

    def _keep(self, key: tuple[Shape, ...], recording: _Recording) -> None:
        self._recordings[key] = recording
        if len(self._recordings) > MAX_RECORDINGS:
            self._device.synchronise()
            oldest, dropped = self._recordings.popitem(last=False)
            self._seen.discard(oldest)
            dropped.graph.close()

    def _bind(self, context: Any, shapes: dict[str, Shape]) -> None:
        """Tell a context shapes and addresses of this run."""
        if not context.set_optimization_profile_async(0, self._device.stream):
            raise EngineError(f"{self._spec.name}: the runtime refuses the engine's profile")
        for name in self._spec.input_names:
            if not context.set_input_shape(name, shapes[name]):
                raise EngineError(f"{self._spec.name}: the runtime refuses {name} {shapes[name]}")
        found = {name: tuple(context.get_tensor_shape(name)) for name in self._spec.output_names}
        check_outputs(self._spec, shapes, found)
        for name in shapes:
            if not context.set_tensor_address(name, int(self._buffers[name].device)):
                raise EngineError(f"{self._spec.name}: the runtime refuses the memory of {name}")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise EngineError(
                f"{self._spec.name}: the runtime refused to run; its reason is in the log above"
            )

    def close(self) -> None:
        """Free recordings, contexts and buffers."""
        self._device.synchronise()
        self._drop_recordings()
        self._context = None
        self._buffers.clear()
        self._activations = None
