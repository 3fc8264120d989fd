"""System shared memory of a client: regions that the server maps, kept for further requests."""

from __future__ import annotations

import os
import sys
import threading
import uuid
import warnings
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import ServingError

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_SMALLEST = 1 << 20

CLOSE_WAIT_S = 5.0
"""How long closing a client waits for the server to let go of a region."""
IN_USE_PAUSE_S = 0.005


class SharedRegion:
    """A block of system shared memory; it has a name in the file system until `unlink`.

    Args:
        size: bytes.

    Raises:
        ServingError: not on Linux, or this machine's shared memory has less room than that.
    """

    def __init__(self, size: int) -> None:
        if sys.platform != "linux":
            raise ServingError(
                f"shared memory with the server works on Linux, not on {sys.platform}: use "
                "shared_memory=False"
            )
        # Writing past the room of a full tmpfs would kill this process with SIGBUS.
        status = os.statvfs(_SHARED_MEMORY)
        free = status.f_bavail * status.f_frsize
        if size > free:
            raise ServingError(
                f"{_SHARED_MEMORY} has {free} bytes free, the request needs {size}: enlarge it "
                "(docker: --shm-size) or use shared_memory=False"
            )
        self.size = size
        self.name = f"dbsam_client_{uuid.uuid4().hex}"
        self.key = f"/{self.name}"
        self._block = shared_memory.SharedMemory(self.name, create=True, size=size)

    def write(self, array: npt.NDArray[Any], offset: int) -> None:
        """Copy `array` to `offset`."""
        target = np.ndarray(array.shape, array.dtype, self._block.buf, offset)
        target[...] = array

    def read(self, shape: tuple[int, ...], dtype: str, offset: int) -> npt.NDArray[Any]:
        """A copy of the array at `offset`."""
        return np.ndarray(shape, dtype, self._block.buf, offset).copy()

    def unlink(self) -> None:
        """Give the memory back; the server keeps its own mapping until it unregisters the name."""
        self._block.close()
        self._block.unlink()


class RegionPool:
    """The registered regions of one client, for any number of threads.

    A region whose request ended in an error may still be written by the server, so it is not used
    again: it is unlinked at once and its name stays stale until the server lets go of it. A process
    that was forked from the client's own begins without any: its parent still uses them.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._idle: list[SharedRegion] = []
        self._stale: list[str] = []
        self._lock, self._process = threading.Lock(), os.getpid()

    def _locked(self) -> threading.Lock:
        if self._process != os.getpid():
            self._begin()
        return self._lock

    def take(self, size: int) -> SharedRegion | None:
        """A registered region of at least `size` bytes, if there is one; drops a smaller one."""
        with self._locked():
            for index, region in enumerate(self._idle):
                if region.size >= size:
                    return self._idle.pop(index)
            dropped = self._idle.pop() if self._idle else None
        if dropped is not None:
            self.retire(dropped)
        return None

    def give_back(self, region: SharedRegion) -> None:
        """Keep a registered region for the next request."""
        with self._locked():
            self._idle.append(region)

    def retire(self, region: SharedRegion) -> None:
        """Unlink `region` and remember its name."""
        with self._locked():
            self._stale.append(region.name)
        region.unlink()

    def retire_all(self) -> None:
        """Unlink every idle region."""
        with self._locked():
            idle, self._idle = self._idle, []
        for region in idle:
            self.retire(region)

    def claim_stale(self) -> list[str]:
        """Names that the server still has to unregister; the caller's to deal with from now on."""
        with self._locked():
            names, self._stale = self._stale, []
        return names

    def leave_stale(self, names: list[str]) -> None:
        """Names that the server did not let go of yet."""
        with self._locked():
            self._stale += names


def region_size(needed: int) -> int:
    """Bytes to ask for: a power of two, so that slightly larger images fit as well."""
    return max(_SMALLEST, 1 << (needed - 1).bit_length())


def is_in_use(error: Exception) -> bool:
    """Whether the server refused to unregister a region because a request still uses it."""
    return "currently in use" in str(error)


def warn_registered(reason: str) -> None:
    """Warn that the memory is unlinked here, while the server keeps its mapping for now."""
    warnings.warn(
        f"the Triton server keeps a shared memory region of this client registered: {reason}",
        ResourceWarning,
        stacklevel=5,
    )
