"""Asks one runtime what it can do here, in a process of its own.

Importing a GPU library can end the process, and loading PyTorch takes seconds, so every question is
put to a fresh Python: what breaks there is an answer like any other. The functions below run in
that process; `inspect_runtime` starts it and reads the answer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

from ..core.errors import DbsamError, EngineError, MissingError
from ..engines.device import find_gpu, initialisation_error
from ..extras import EXTRAS
from ..machine.child_process import run_python
from ..machine.cuda_errors import cuda_error, explained
from ..machine.hardware import DRIVER_LIBRARY, describe_hardware
from ..sessions.onnxruntime_providers import (
    PROVIDERS,
    import_onnxruntime,
    open_session,
    require_provider,
)

TIMEOUT_S = 30.0
"""Only a process that hangs takes this long; the usual answer comes within three seconds."""
NOT_IMPORTED = frozenset({"accelerate", "monai", "onnxscript", "segment_anything", "torch"})
"""Found but not imported: they take longer than all other questions together (torch has a question
of its own), and segment_anything's top needs torchvision, which we do without."""
_MARK = "dbsam-inspection:"
_SIDE = 4
ONE_NODE_MODEL = (
    b'\x08\t:G\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12\x08one_node'
    b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x04\n\x02\x08\x04"
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x04\n\x02\x08\x04B\x04\n\x00\x10\x11"
)
"""ONNX model that multiplies `x`, (4, 4) float32, with itself; as a file, since a machine that runs
models need not have the package onnx, which makes them."""


@dataclass(frozen=True)
class Answer:
    """What a runtime said.

    Attributes:
        facts: by name, empty if it could not say anything.
        error: why it cannot be used, in one line, or "".
        install: the command that would help, where the error itself knows it.
        absent: the module that is not installed, or "".
    """

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    install: str = ""
    absent: str = ""


class _AbsentError(Exception):
    """A module that is not installed."""


def inspect_runtime(name: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """Put the question `name` (a key of `INSPECTIONS`) to a fresh Python."""
    code = f"from dbsam_deploy.diagnosis.inspections import answer; answer({name!r})"
    try:
        ended = run_python(["-c", code], timeout_s=timeout_s)
    except EngineError as error:
        return Answer(error=error.message)
    lines = [line for line in ended.output.splitlines() if line.startswith(_MARK)]
    if not lines:
        return Answer(error=explained(ended.reason()))
    found = Answer(**json.loads(lines[-1].removeprefix(_MARK)))
    logged = re.search(r"with error: (.+)", ended.log)  # ONNX Runtime's log of a library
    if found.error and logged:
        return replace(found, error=f"{found.error} ({logged.group(1).strip()})")
    return found


def answer(name: str) -> None:
    """Answer the question `name` on standard output and end this process."""
    try:
        body: dict[str, Any] = {"facts": INSPECTIONS[name]()}
    except _AbsentError as error:
        body = {"error": f"{error} is not installed", "absent": str(error)}
    except MissingError as error:
        body = {"error": error.what, "install": error.install}
    except DbsamError as error:
        body = {"error": error.message}
    print(f"{_MARK}{json.dumps(body)}", flush=True)
    os._exit(0)  # a library that fails while Python ends has answered all the same


def _module(name: str) -> ModuleType:
    """Import a module that may not be installed."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise _AbsentError(top)
    return importlib.import_module(name)


def inspect_driver() -> dict[str, Any]:
    """The first GPU, as its driver describes it."""
    gpu = find_gpu()
    if gpu is not None:
        return asdict(gpu)
    shown = describe_hardware().gpu
    if shown:
        status = initialisation_error()
        why = cuda_error(status) if status else "a container needs --gpus all"
        raise EngineError(
            f"nvidia-smi shows {shown}, but the driver library {DRIVER_LIBRARY} gives this process "
            f"no GPU ({why})"
        )
    raise EngineError("no NVIDIA GPU, or no driver for it")


def inspect_torch() -> dict[str, Any]:
    """PyTorch: a product on the CPU, and one on the GPU if it sees one."""
    torch = _module("torch")
    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda or ""}
    _check_product(torch, "cpu")
    if torch.cuda.is_available():
        _check_product(torch, "cuda")
        facts["device"] = torch.cuda.get_device_name(0)
        facts["capability"] = list(torch.cuda.get_device_capability(0))
    return facts


def _check_product(torch: ModuleType, device: str) -> None:
    ones = torch.ones(_SIDE, _SIDE, device=device)
    total = float((ones @ ones).sum())
    if total != _SIDE**3:
        raise EngineError(f"torch on {device}: a product of ones sums to {total}, not {_SIDE**3}")


def _inspect_provider(label: str) -> dict[str, Any]:
    """ONNX Runtime: a one-node model, opened and run on one provider."""
    import numpy as np

    runtime = import_onnxruntime()
    facts = {"version": runtime.__version__, "offers": runtime.get_available_providers()}
    require_provider(runtime, PROVIDERS[label])
    session = open_session(runtime, ONE_NODE_MODEL, PROVIDERS[label])
    ones = np.ones((_SIDE, _SIDE), np.float32)
    (out,) = session.run(None, {"x": ones})
    if not np.array_equal(out, ones @ ones):
        raise EngineError(f"onnxruntime on {label}: a product of ones is not {_SIDE} everywhere")
    return facts


def inspect_onnxruntime() -> dict[str, Any]:
    """ONNX Runtime on the CPU."""
    return _inspect_provider("cpu")


def inspect_onnxruntime_cuda() -> dict[str, Any]:
    """ONNX Runtime on CUDA."""
    return _inspect_provider("cuda")


def inspect_onnxruntime_tensorrt() -> dict[str, Any]:
    """ONNX Runtime on its TensorRT provider."""
    return _inspect_provider("tensorrt")


def inspect_openvino() -> dict[str, Any]:
    """OpenVINO: a one-node model, compiled and run on the CPU."""
    import numpy as np

    openvino = _module("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(ONE_NODE_MODEL)), "CPU")
    ones = np.ones((_SIDE, _SIDE), np.float32)
    if not np.array_equal(compiled([ones])[0], ones @ ones):
        raise EngineError(f"openvino: a product of ones is not {_SIDE} everywhere")
    return {"version": openvino.__version__}


def inspect_tensorrt() -> dict[str, Any]:
    """TensorRT: its version, and whether it makes a builder, which needs a GPU."""
    return _inspect_builder("tensorrt")


def inspect_tensorrt_rtx() -> dict[str, Any]:
    """TensorRT-RTX: its version, and whether it makes a builder, which needs no GPU."""
    return _inspect_builder("tensorrt_rtx")


def _inspect_builder(module: str) -> dict[str, Any]:
    tensorrt = _module(module)
    try:
        made = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR)) is not None
    except (TypeError, RuntimeError):  # what its binding makes of a null pointer
        made = False
    return {"version": tensorrt.__version__, "builder": made}


def inspect_pycuda() -> dict[str, Any]:
    """PyCUDA: its version and the GPUs it sees."""
    driver = _module("pycuda.driver")
    driver.init()
    return {"version": importlib.metadata.version("pycuda"), "devices": driver.Device.count()}


def _inspect_extra(name: str) -> Callable[[], dict[str, Any]]:
    (extra,) = (extra for extra in EXTRAS if extra.name == name)

    def inspect() -> dict[str, Any]:
        for module in extra.modules:
            if module in NOT_IMPORTED:
                if importlib.util.find_spec(module) is None:
                    raise _AbsentError(module)
            else:
                _module(module)
        return {"versions": {name: _version(name) for name in extra.distributions}}

    return inspect


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


EXTRA_PREFIX = "extra:"
INSPECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": inspect_driver,
    "torch": inspect_torch,
    "onnxruntime": inspect_onnxruntime,
    "onnxruntime-cuda": inspect_onnxruntime_cuda,
    "onnxruntime-tensorrt": inspect_onnxruntime_tensorrt,
    "openvino": inspect_openvino,
    "tensorrt": inspect_tensorrt,
    "tensorrt_rtx": inspect_tensorrt_rtx,
    "pycuda": inspect_pycuda,
    **{EXTRA_PREFIX + extra.name: _inspect_extra(extra.name) for extra in EXTRAS},
}
"""Question → the function that answers it in the process of its own."""
