"""For tests: PyCUDA and the CUDA driver, played on the CPU.

What tests of a session have to find out is kept as it is on a GPU: copies and kernels wait on the
stream until it is synchronised, device memory starts as NaN and is gone when its owner is, and a
graph is recorded without running.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from dbsam_deploy.engines.cuda import CudaDevice

Bytes = npt.NDArray[np.uint8]


class GpuFaultError(Exception):
    """What a GPU would answer with undefined behaviour."""


class CpuStream:
    """Work in order, done when it is synchronised; recorded instead while a graph is captured."""

    _handles = itertools.count(1)

    def __init__(self, gpu: CpuGpu) -> None:
        self.handle = next(self._handles)
        self.waiting: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        gpu.streams[self.handle] = self

    def put(self, work: Callable[[], None]) -> None:
        """Add work."""
        (self.waiting if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        """Do all that waits."""
        if self.captured is not None:
            raise GpuFaultError("a stream is synchronised while a graph is recorded")
        while self.waiting:
            self.waiting.pop(0)()


class CpuMemory:
    """A device allocation; its content cannot be reached once it is collected."""

    def __init__(self, gpu: CpuGpu, size: int) -> None:
        content = np.full(size, 0xFF, np.uint8)
        self._address = content.ctypes.data
        gpu.memory[self._address] = content
        weakref.finalize(self, gpu.memory.pop, self._address, None)

    def __int__(self) -> int:
        return self._address


class CpuGpu:
    """The machine: memory, streams, graphs, and what happened on it.

    Attributes:
        memory: address → content of every allocation that is alive.
        counts: how often something was done: `run`, `captured`, `replayed`, `context`.
        free_bytes: what `mem_alloc` may still take.
    """

    def __init__(self, capability: tuple[int, int] = (8, 6), free_bytes: int = 2**31) -> None:
        self.capability, self.free_bytes = capability, free_bytes
        self.memory: dict[int, Bytes] = {}
        self.streams: dict[int, CpuStream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.counts: dict[str, int] = {}
        self.current = 0

    def count(self, what: str) -> None:
        """Note that something happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def bytes_at(self, address: int, size: int) -> Bytes:
        """`size` bytes of a living allocation."""
        content = self.memory.get(address)
        if content is None or content.nbytes < size:
            raise GpuFaultError(f"{size} bytes at {address:#x}, which is no such allocation")
        return content[:size]


class CpuCudaError(Exception):
    """`pycuda.driver.Error`."""


class CpuOutOfMemoryError(CpuCudaError):
    """`pycuda.driver.MemoryError`."""


class CpuPycuda:
    """The part of `pycuda.driver` that `engines.cuda` uses."""

    Error = CpuCudaError
    MemoryError = CpuOutOfMemoryError

    def __init__(self, gpu: CpuGpu) -> None:
        self._gpu = gpu
        self.Context = SimpleNamespace(pop=lambda: self._enter(-1))

    def _enter(self, step: int) -> None:
        self._gpu.current += step

    def _needs_context(self) -> None:
        if self._gpu.current != 1:
            raise CpuCudaError(f"{self._gpu.current} contexts are current")

    def init(self) -> None:
        """Begin."""

    def get_driver_version(self) -> int:
        """CUDA 13.0."""
        return 13000

    def Device(self, number: int) -> SimpleNamespace:  # noqa: N802
        """The GPU."""
        context = SimpleNamespace(push=lambda: self._enter(1))
        return SimpleNamespace(
            name=lambda: "Stand-in GPU",
            compute_capability=lambda: self._gpu.capability,
            retain_primary_context=lambda: context,
        )

    def Stream(self) -> CpuStream:  # noqa: N802
        """A new stream."""
        self._needs_context()
        return CpuStream(self._gpu)

    def mem_alloc(self, size: int) -> CpuMemory:
        """Device memory."""
        self._needs_context()
        if size > self._gpu.free_bytes:
            raise CpuOutOfMemoryError("out of memory")
        return CpuMemory(self._gpu, size)

    def pagelocked_empty(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Host memory that nobody has written yet."""
        self._needs_context()
        return np.full(size, 0xFF, dtype)

    def memcpy_htod_async(self, address: int, source: Bytes, stream: CpuStream) -> None:
        """Copy up when the stream gets there, from what the source holds then."""

        def copy() -> None:
            self._gpu.bytes_at(address, source.nbytes)[:] = source

        self._needs_context()
        stream.put(copy)

    def memcpy_dtoh_async(self, target: Bytes, address: int, stream: CpuStream) -> None:
        """Copy down when the stream gets there."""

        def copy() -> None:
            target[:] = self._gpu.bytes_at(address, target.nbytes)

        self._needs_context()
        stream.put(copy)


class CpuDriver:
    """The CUDA graph functions of `libcuda`."""

    def __init__(self, gpu: CpuGpu) -> None:
        self._gpu, self._numbers = gpu, itertools.count(1)

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:  # noqa: N802
        """Begin to record."""
        self._gpu.streams[stream.value or 0].captured = []
        return 0 if mode == 1 else 1

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:  # noqa: N802
        """End it and give the graph."""
        found = self._gpu.streams[stream.value or 0]
        work, found.captured = found.captured, None
        graph._obj.value = self._store(work or [])
        self._gpu.count("captured")
        return 0 if work else 901

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        """Make a graph executable."""
        executable._obj.value = self._store(self._gpu.graphs[graph.value])
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
        """Put a graph's work on a stream."""
        for work in self._gpu.graphs[executable.value]:
            self._gpu.streams[stream.value].put(work)
        self._gpu.count("replayed")
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        """Forget a graph."""
        return 0 if self._gpu.graphs.pop(graph.value, None) is not None else 400

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def _store(self, work: list[Callable[[], None]]) -> int:
        number = next(self._numbers)
        self._gpu.graphs[number] = work
        return number


def stand_in_device(gpu: CpuGpu) -> CudaDevice:
    """The real device class on a stand-in."""
    return CudaDevice(CpuPycuda(gpu), load=lambda name: CpuDriver(gpu))
