"""CUDA's error numbers in words, with what helps; the driver's and the runtime's are the same."""

from __future__ import annotations

import re

_OLD_DRIVER = (
    "the driver is older than the CUDA that is used here, or there is none: compare `nvidia-smi` "
    "with the CUDA version of the package, and update the driver"
)
_LATER_CODE = "it is compiled for other GPUs than this one: build it for this GPU's sm_NN"
_BROKEN = "a kernel did something wrong before: run the command under compute-sanitizer"
_RECORDED = "something was used that cannot be recorded in a CUDA graph"

_ERRORS: dict[int, tuple[str, str]] = {
    1: ("cudaErrorInvalidValue", ""),
    2: ("cudaErrorMemoryAllocation", "the GPU's memory is used up: `nvidia-smi` shows by whom"),
    3: ("cudaErrorInitializationError", "CUDA was used before this process was forked"),
    9: ("cudaErrorInvalidConfiguration", "more threads, blocks or shared memory than the GPU has"),
    34: ("cudaErrorStubLibrary", "a stub of libcuda.so was found in place of the driver's"),
    35: ("cudaErrorInsufficientDriver", _OLD_DRIVER),
    36: ("cudaErrorCallRequiresNewerDriver", _OLD_DRIVER),
    46: ("cudaErrorDevicesUnavailable", "the GPU is in exclusive use: `nvidia-smi` shows by whom"),
    98: ("cudaErrorInvalidDeviceFunction", _LATER_CODE),
    100: ("cudaErrorNoDevice", "the driver finds no GPU (a container needs --gpus all)"),
    101: ("cudaErrorInvalidDevice", ""),
    200: ("cudaErrorInvalidKernelImage", _LATER_CODE),
    201: ("cudaErrorDeviceUninitialized", "no CUDA context is current in this thread"),
    209: ("cudaErrorNoKernelImageForDevice", _LATER_CODE),
    214: ("cudaErrorECCUncorrectable", "the GPU's memory has a fault: restart it, see `dmesg`"),
    218: ("cudaErrorInvalidPtx", ""),
    222: ("cudaErrorUnsupportedPtxVersion", _OLD_DRIVER),
    400: ("cudaErrorInvalidResourceHandle", ""),
    500: ("cudaErrorSymbolNotFound", ""),
    700: ("cudaErrorIllegalAddress", _BROKEN),
    701: ("cudaErrorLaunchOutOfResources", "the kernel needs more registers than the GPU has"),
    702: ("cudaErrorLaunchTimeout", "the GPU serves a display, which ends long kernels"),
    715: ("cudaErrorIllegalInstruction", _BROKEN),
    716: ("cudaErrorMisalignedAddress", _BROKEN),
    719: ("cudaErrorLaunchFailure", _BROKEN),
    801: ("cudaErrorNotSupported", ""),
    802: ("cudaErrorSystemNotReady", "the fabric manager of the NVSwitch is not running"),
    803: (
        "cudaErrorSystemDriverMismatch",
        "libcuda.so and the kernel's driver differ: restart after an update of the driver",
    ),
    804: ("cudaErrorCompatNotSupportedOnDevice", _OLD_DRIVER),
    900: ("cudaErrorStreamCaptureUnsupported", _RECORDED),
    901: ("cudaErrorStreamCaptureInvalidated", _RECORDED),
    906: ("cudaErrorStreamCaptureImplicit", _RECORDED),
    908: ("cudaErrorStreamCaptureWrongThread", _RECORDED),
    999: ("cudaErrorUnknown", "see `dmesg`, and whether `nvidia-smi` still shows the GPU"),
}
"""Number → name and what helps, of those that a user meets."""

_LOGGED = re.compile(r"CUDA[^|]*?\berror:? (\d+)", re.I)


def cuda_error(status: int) -> str:
    """An error in words, for a message.

    >>> cuda_error(1), cuda_error(77)
    ('CUDA error 1 (cudaErrorInvalidValue)', 'CUDA error 77')
    """
    name, hint = _ERRORS.get(status, ("", ""))
    words = ": ".join(filter(None, (name, hint)))
    return f"CUDA error {status} ({words})" if words else f"CUDA error {status}"


def explained(text: str) -> str:
    """A library's message with the meaning of the CUDA error whose number it gives.

    >>> explained("CUDA initialization failure with error: 1")
    'CUDA initialization failure with error: 1 (cudaErrorInvalidValue)'
    """
    found = _LOGGED.search(text)
    known = cuda_error(int(found[1])).partition(" (")[2] if found else ""
    return f"{text} ({known}" if known else text
