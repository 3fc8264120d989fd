"""Judges whether a backend can be used on this machine, from what its runtimes say here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import EngineError
from ..engines.kinds import TENSORRT, TENSORRT_RTX, Kind, check_version
from ..extras import NVCC_LINE, ONNXRUNTIME_TENSORRT_LINE, TORCH_GPU_LINE, pip_line
from ..kernels.toolkit import find_nvcc
from .inspections import Answer

Ask = Callable[[str], Answer]
"""Puts a question of `inspections.INSPECTIONS` and returns the answer."""

OLDEST_TARGET = 80
"""Compute capability, times ten, from which on the fused kernels run."""


@dataclass(frozen=True)
class Finding:
    """Whether something can be used here.

    Attributes:
        usable: whether it can be, on at least one device.
        version: what is installed, or "".
        devices: where it runs here, of `cpu` and `cuda`.
        missing: why it cannot be used, or why not on a further device; one line, or "".
        install: the command that would help, or "".
    """

    usable: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    missing: str = ""
    install: str = ""


Probe = Callable[[Ask], Finding]


def _version(answer: Answer) -> str:
    return str(answer.facts.get("version", ""))


def _refused(reasons: list[str], install: str, version: str = "") -> Finding:
    return Finding(False, version, missing="; ".join(reasons), install=install)


def probe_pytorch(ask: Ask) -> Finding:
    """PyTorch on the CPU, and on CUDA where there is a GPU."""
    torch, driver = ask("torch"), ask("driver")
    if torch.error:
        return _refused([torch.error], pip_line("export"))
    if "device" in torch.facts:
        return Finding(True, _version(torch), ("cpu", "cuda"))
    reason, line = _no_cuda(torch, driver)
    return Finding(True, _version(torch), ("cpu",), f"cuda: {reason}", line)


def _no_cuda(torch: Answer, driver: Answer) -> tuple[str, str]:
    """Why a PyTorch that loads sees no GPU, and the command that helps."""
    if driver.error:
        return driver.error, ""
    if not torch.facts.get("cuda"):
        return f"torch {_version(torch)} is a build for the CPU", TORCH_GPU_LINE
    return (
        f"torch {_version(torch)} for CUDA {torch.facts['cuda']} does not use the GPU, whose "
        f"driver runs CUDA up to {driver.facts['cuda']}: update the driver"
    ), ""


def probe_pytorch_fused(ask: Ask) -> Finding:
    """PyTorch on CUDA with the fused kernels, which nvcc builds on their first use."""
    torch, driver = ask("torch"), ask("driver")
    if torch.error:
        return _refused([torch.error], pip_line("export"))
    reasons, line = [], ""
    if "device" not in torch.facts:
        reason, line = _no_cuda(torch, driver)
        reasons.append(reason)
    elif _target(driver) < OLDEST_TARGET:
        reasons.append(f"the GPU is {driver.facts.get('target')}, the kernels need sm_80 or later")
    try:
        find_nvcc()
    except EngineError as error:
        reasons.append(error.message)
        line = line or NVCC_LINE
    if reasons:
        return _refused(reasons, line, _version(torch))
    return Finding(True, _version(torch), ("cuda",))


def _target(driver: Answer) -> int:
    return int(str(driver.facts.get("target", "sm_0")).removeprefix("sm_"))


def probe_onnxruntime(ask: Ask) -> Finding:
    """ONNX Runtime on the CPU, and on CUDA where there is a GPU."""
    cpu, driver = ask("onnxruntime"), ask("driver")
    if cpu.error:
        return _refused([cpu.error], cpu.install or pip_line("cpu"))
    if driver.error:
        return Finding(True, _version(cpu), ("cpu",), f"cuda: {driver.error}")
    cuda = ask("onnxruntime-cuda")
    if cuda.error:
        return Finding(True, _version(cpu), ("cpu",), f"cuda: {cuda.error}", cuda.install)
    return Finding(True, _version(cpu), ("cpu", "cuda"))


def probe_onnxruntime_tensorrt(ask: Ask) -> Finding:
    """ONNX Runtime's TensorRT provider."""
    answer, driver, version = ask("onnxruntime-tensorrt"), ask("driver"), ask("onnxruntime")
    if not answer.error:
        return Finding(True, _version(answer), ("cuda",))
    if driver.error and not answer.install and not version.error:  # all but the GPU is there
        return _refused([driver.error], "", _version(version))
    reasons = [reason for reason in (driver.error, answer.error) if reason]
    return _refused(reasons, answer.install or ONNXRUNTIME_TENSORRT_LINE, _version(version))


def probe_openvino(ask: Ask) -> Finding:
    """OpenVINO on the CPU."""
    answer = ask("openvino")
    if answer.error:
        return _refused([answer.error], answer.install or pip_line("openvino"))
    return Finding(True, _version(answer), ("cpu",))


def probe_auto(ask: Ask) -> Finding:
    """The choice between ONNX Runtime and OpenVINO, which needs the former at least."""
    found, other = probe_onnxruntime(ask), probe_openvino(ask)
    if not found.usable:
        return found
    choice = "onnxruntime or openvino" if other.usable else "onnxruntime alone"
    return Finding(True, choice, ("cpu",), other.missing, other.install)


def probe_tensorrt(ask: Ask) -> Finding:
    """TensorRT engines."""
    return _probe_engines(ask, TENSORRT)


def probe_tensorrt_rtx(ask: Ask) -> Finding:
    """TensorRT-RTX engines: built anywhere, run on a GPU."""
    return _probe_engines(ask, TENSORRT_RTX)


def _probe_engines(ask: Ask, kind: Kind) -> Finding:
    runtime, driver, pycuda = ask(kind.module), ask("driver"), ask("pycuda")
    version, line = _version(runtime), ""
    reasons = [driver.error] if driver.error else []
    old = "" if runtime.error else _too_old(kind, version)
    if runtime.error or old:
        reasons.append(runtime.error or old)
        line = kind.install
    elif driver.error and kind.ahead_of_time and runtime.facts["builder"]:
        reasons.append("engines can be built here, but not run")
    elif not driver.error and not runtime.facts["builder"]:
        reasons.append(f"{kind.title} {version} makes no builder on this GPU: update the driver")
    if pycuda.absent or (pycuda.error and not driver.error):
        reasons.append(pycuda.error)
        line = kind.install
    if reasons:
        return _refused(reasons, line, version)
    return Finding(True, version, ("cuda",))


def _too_old(kind: Kind, version: str) -> str:
    try:
        check_version(kind, version)
    except EngineError as error:
        return error.message
    return ""


BACKEND_PROBES: dict[str, Probe] = {
    "onnxruntime": probe_onnxruntime,
    "onnxruntime-tensorrt": probe_onnxruntime_tensorrt,
    "openvino": probe_openvino,
    "auto": probe_auto,
    "pytorch": probe_pytorch,
    "pytorch-fused": probe_pytorch_fused,
    "tensorrt": probe_tensorrt,
    "tensorrt-rtx": probe_tensorrt_rtx,
}
"""Backend → what finds out whether it can be used here."""
