"""One GPU through PyCUDA: memory on both sides, copies, and CUDA graphs, all on one stream.

PyCUDA has no CUDA graphs, so recording and replaying them calls the driver's own functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import EngineError
from ..extras import require
from ..machine.cuda_errors import cuda_error
from ..machine.hardware import DRIVER_LIBRARY
from .device import Gpu, find_gpu, target_name

Bytes = npt.NDArray[np.uint8]

_NO_GPU = (
    "engines run on an NVIDIA GPU, and the driver finds none here: use --backend onnxruntime on "
    "this machine"
)
_THREAD_LOCAL = 1
"""Other threads may go on using CUDA while this one records."""


class CudaGraph:
    """A recorded sequence of kernels; `launch` runs it again on the same addresses.

    Args:
        driver: the driver's library.
        executable: `CUgraphExec`.
        stream: handle of the stream to launch on.
    """

    def __init__(self, driver: Any, executable: ctypes.c_void_p, stream: int) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream

    def launch(self) -> None:
        """Run the kernels; asynchronous."""
        call = self._driver.cuGraphLaunch
        _checked(call(self._executable, ctypes.c_void_p(self._stream)), "launching a CUDA graph")

    def close(self) -> None:
        """Free it; it must not be running."""
        _checked(self._driver.cuGraphExecDestroy(self._executable), "freeing a CUDA graph")


class CudaDevice:
    """The first GPU, in the context that PyTorch uses too.

    Args:
        pycuda: the module `pycuda.driver`.
        load: opens the driver's library.

    Raises:
        EngineError: there is no GPU, or its driver does not answer.
    """

    def __init__(self, pycuda: Any, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        self._pycuda = pycuda
        try:
            pycuda.init()
            device = pycuda.Device(0)
            self._context = device.retain_primary_context()
            with self.current():
                self._stream = pycuda.Stream()
            self._driver = load(DRIVER_LIBRARY)
        except (pycuda.Error, OSError) as error:
            raise EngineError(f"{_NO_GPU} ({error})") from error
        major, minor = device.compute_capability()
        version = pycuda.get_driver_version()
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        self.gpu = Gpu(device.name(), target_name(major, minor), cuda)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread; every other method needs that."""
        self._context.push()
        try:
            yield
        finally:
            self._pycuda.Context.pop()

    @property
    def stream(self) -> int:
        """Handle of the stream that everything here runs on."""
        return int(self._stream.handle)

    def allocate(self, size: int) -> Any:
        """Device memory of `size` bytes, an object whose `int` is the address.

        Raises:
            EngineError: there is not enough.
        """
        try:
            return self._pycuda.mem_alloc(size)
        except self._pycuda.MemoryError as error:
            raise EngineError(
                f"the GPU has no {size / 2**20:.0f} MiB left ({error}); free it or send fewer "
                "images or prompts at a time"
            ) from error

    def allocate_host(self, size: int) -> Bytes:
        """Page-locked memory of `size` bytes, which copies reach without a detour."""
        memory: Bytes = self._pycuda.pagelocked_empty(size, np.uint8)
        return memory

    def upload(self, memory: Any, host: Bytes) -> None:
        """Copy to the device; asynchronous, so `host` must stay as it is."""
        self._pycuda.memcpy_htod_async(int(memory), host, self._stream)

    def download(self, host: Bytes, memory: Any) -> None:
        """Copy from the device; complete after `synchronise`."""
        self._pycuda.memcpy_dtoh_async(host, int(memory), self._stream)

    def synchronise(self) -> None:
        """Wait until everything on the stream is done."""
        self._stream.synchronize()

    def record(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what `enqueue` puts on the stream, without running it.

        Raises:
            EngineError: something in it cannot be recorded.
        """
        driver, stream = self._driver, ctypes.c_void_p(self.stream)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        begin = driver.cuStreamBeginCapture_v2
        _checked(begin(stream, _THREAD_LOCAL), "recording a CUDA graph")
        try:
            enqueue()
        finally:
            status = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
        _checked(status, "recording a CUDA graph")
        instantiate = driver.cuGraphInstantiateWithFlags
        flags = ctypes.c_ulonglong(0)
        try:
            status = instantiate(ctypes.byref(executable), graph, flags)
            _checked(status, "preparing a CUDA graph")
        finally:
            _checked(driver.cuGraphDestroy(graph), "freeing a CUDA graph")
        return CudaGraph(driver, executable, self.stream)


def _checked(status: int, what: str) -> None:
    if status:
        raise EngineError(
            f"{what} failed with {cuda_error(status)}; open the session with cuda_graphs=False "
            "to do without"
        )


def open_device(extra: str = "gpu") -> CudaDevice:
    """The first GPU.

    Args:
        extra: what installs PyCUDA, `gpu` or `rtx`.

    Raises:
        EngineError: there is no GPU.
        MissingError: PyCUDA is not installed.
    """
    if find_gpu() is None:
        raise EngineError(_NO_GPU)
    # pip compiles it with nvcc, so that a CUDA toolkit must be there first
    return CudaDevice(require("pycuda.driver", extra=extra, what_for="a session on engines"))
