"""Recordings of a function, one for each set of input shapes: CUDA graphs in use, others in tests.

A CUDA graph launches hundreds of kernels at once, but always on the same addresses: inputs are
copied into the recording's buffers, and outputs stay in its buffers until the next replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARM_UP_CALLS = 3
"""Calls before a recording: libraries choose algorithms and allocate workspaces in them."""


@dataclass(frozen=True)
class Recording:
    """A function on fixed buffers.

    Attributes:
        inputs: buffers that a replay reads.
        outputs: buffers that a replay writes.
        replay: runs the function once more; asynchronous on CUDA.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


Recorder = Callable[[Function, tuple[Tensor, ...]], Recording]
"""(function, example inputs on the device) → its recording for these shapes."""


def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> AbstractContextManager[None]:
    """Record a CUDA graph while other threads go on using CUDA.

    PyTorch's default mode ends a recording as soon as any thread allocates or frees memory.

    Args:
        graph: the graph to record.
        pool: whose memory the graph takes, see `torch.cuda.graph_pool_handle`; None for its own.
    """
    recording: AbstractContextManager[None] = torch.cuda.graph(
        graph, pool=pool, capture_error_mode="thread_local"
    )
    return recording


class CudaGraphRecorder:
    """Records CUDA graphs that share one memory pool.

    Sharing is safe as long as replays run one after the other on one stream and each one's outputs
    are read before the next: recordings may lay their tensors in the same places.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: tuple[Tensor, ...]) -> Recording:
        """Warm up on a side stream, as capturing demands, then record."""
        buffers = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            outputs = function(*buffers)
        return Recording(buffers, outputs, graph.replay)


class RecordedFunction:
    """Calls a function through recordings, made when a set of input shapes is first seen.

    Args:
        function: tensors in, a tuple of tensors out; no values may decide its control flow.
        recorder: makes a recording.
        device: where the recordings' buffers lie.
        limit: recordings kept; the one used longest ago goes first.
    """

    def __init__(
        self, function: Function, recorder: Recorder, *, device: torch.device, limit: int = 16
    ) -> None:
        self._function, self._recorder = function, recorder
        self._device, self._limit = device, limit
        self._recordings: OrderedDict[tuple[object, ...], Recording] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on inputs of any device.

        Returns:
            The recording's own output buffers: valid until the next call.
        """
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        recording = self._recordings.pop(key, None)
        if recording is None:
            while len(self._recordings) >= self._limit:
                self._recordings.popitem(last=False)
            on_device = tuple(tensor.to(self._device) for tensor in inputs)
            recording = self._recorder(self._function, on_device)
        self._recordings[key] = recording
        for buffer, tensor in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        recording.replay()
        return recording.outputs
