"""System shared memory of a client: regions that the server maps, kept for further requests."""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from dataclasses import dataclass, field
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


@dataclass
class RegionPool:
    """The registered regions of one client.

    A region whose request ended in an error may still be written by the server, so it is not used
    again: it is unlinked at once and its name stays in `stale` until the server lets go of it.

    Attributes:
        idle: registered and free.
        stale: names of unlinked regions that the server still has to unregister.
    """

    idle: list[SharedRegion] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    def take(self, size: int) -> SharedRegion | None:
        """A registered region of at least `size` bytes, if there is one; drops a smaller one."""
        for index, region in enumerate(self.idle):
            if region.size >= size:
                return self.idle.pop(index)
        if self.idle:
            self.retire(self.idle.pop())
        return None

    def retire(self, region: SharedRegion) -> None:
        """Unlink `region` and remember its name."""
        self.stale.append(region.name)
        region.unlink()

    def retire_all(self) -> None:
        """Unlink every idle region."""
        while self.idle:
            self.retire(self.idle.pop())


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
