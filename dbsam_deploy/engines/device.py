"""The GPU of this machine, asked of its driver: no CUDA package is needed to know there is none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.errors import EngineError
from ..machine.cuda_errors import cuda_error
from ..machine.hardware import DRIVER_LIBRARY

_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its driver gives it.
        target: compute capability in the form `sm_86`.
        cuda: newest CUDA version that its driver runs, `13.0`.
    """

    name: str
    target: str
    cuda: str


def target_name(major: int, minor: int) -> str:
    """Name of a compute capability.

    >>> target_name(8, 6), target_name(12, 0)
    ('sm_86', 'sm_120')
    """
    return f"sm_{major}{minor}"


def initialisation_error(load: Callable[[str], Any] = ctypes.CDLL) -> int:
    """CUDA error with which the driver refuses to begin; 0 where it begins, or is not there."""
    try:
        return int(load(DRIVER_LIBRARY).cuInit(0))
    except OSError:
        return 0


def find_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """The first GPU that this process may use, or None: no driver, or no device behind it.

    Args:
        load: opens the driver's library.

    Raises:
        EngineError: there is a device, but the driver does not answer questions about it.
    """
    try:
        driver = load(DRIVER_LIBRARY)
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    ]
    if any(status):
        raise EngineError(
            f"{DRIVER_LIBRARY} counts {count.value} GPUs but answers a question about the first "
            f"with {cuda_error(next(filter(None, status)))}; check the driver with nvidia-smi"
        )
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), target_name(major.value, minor.value), cuda)
