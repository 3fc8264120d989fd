"""ONNX Runtime's execution providers, and sessions that really run on the one that was asked for.

Where the libraries of a provider are missing, ONNX Runtime goes on with another one, down to the
CPU, and tells only its log. Here that is an error: before a session is opened the provider's
libraries are looked for, and an open session must have its heavy nodes on the provider.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.errors import EngineError, MissingError
from ..extras import ONNXRUNTIME_GPU_LINE, ONNXRUNTIME_TENSORRT_LINE, TENSORRT_10, pip_line, require
from ..files.onnx_data import OnnxContent
from ..machine.cores import fewer_cores
from ..machine.hardware import cpuinfo, has_vnni
from ..machine.onnxruntime_memory import share_memory
from ..machine.privacy import silence

DRIVER_LIBRARY = "libcuda.so.1"
HEAVY_NODES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
# Without VNNI, x86 sums two products of uint8 and int8 in 16 bits, which overflow; with this, ONNX
# Runtime makes such weights unsigned. With VNNI that would cost a third of the speed.
_SAFE_INT8 = "session.x64quantprecision"
# What ONNX Runtime's binding raises; its classes share no base but Exception.
_FAILURES = (
    "EPFail",
    "EngineError",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: ONNX Runtime's name for it.
        label: ours, as in `onnxruntime-cuda`.
        install: the command that installs what it needs.
        options: options that every session gets.
        library: its shared library beside ONNX Runtime's own, or "".
        behind: providers for small nodes that it does not take.
    """

    name: str
    label: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    library: str = ""
    behind: tuple[str, ...] = ()


CPU = Provider("CPUExecutionProvider", "cpu", pip_line("cpu"))
CUDA = Provider(
    "CUDAExecutionProvider",
    "cuda",
    ONNXRUNTIME_GPU_LINE,
    # An fp32 export means float32: TF32 keeps 10 bits of the mantissa.
    options={"use_tf32": "0"},
    library="libonnxruntime_providers_cuda.so",
)
TENSORRT = Provider(
    "TensorrtExecutionProvider",
    "tensorrt",
    ONNXRUNTIME_TENSORRT_LINE,
    library="libonnxruntime_providers_tensorrt.so",
    behind=(CUDA.name,),
)
PROVIDERS = {provider.label: provider for provider in (CPU, CUDA, TENSORRT)}


def import_onnxruntime() -> ModuleType:
    """The installed ONNX Runtime.

    Raises:
        MissingError: there is none, or it does not load.
    """
    return silence(require("onnxruntime", extra="cpu", what_for="an export on ONNX Runtime"))


def require_provider(runtime: ModuleType, provider: Provider) -> None:
    """Check that this build has a provider and that its libraries load.

    Raises:
        EngineError: no NVIDIA driver.
        MissingError: another build, or a library that is not there.
    """
    offered = runtime.get_available_providers()
    if provider.name not in offered:
        raise MissingError(
            f"this onnxruntime {runtime.__version__} offers {', '.join(offered)}, not "
            f"{provider.name}",
            provider.install,
        )
    if not provider.library or sys.platform != "linux":
        return
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        raise EngineError(
            f"{provider.name} needs an NVIDIA GPU, and this machine has no driver for one "
            f"({error}); use --backend onnxruntime --device cpu"
        ) from error
    _load_cuda(runtime, provider)
    if provider is TENSORRT:
        _load_tensorrt(runtime)


def _load_cuda(runtime: ModuleType, provider: Provider) -> None:
    """Load CUDA's libraries out of the wheels that hold them, or from the system."""
    if not hasattr(runtime, "preload_dlls"):  # before 1.21 only the system's are found
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runtime.preload_dlls()
    missing = re.search(r"Failed to load \S+: (.+)", said.getvalue())
    if missing:
        raise MissingError(
            f"{provider.name} of onnxruntime {runtime.__version__} is built for CUDA "
            f"{getattr(runtime, 'cuda_version', '?')}, whose libraries do not load "
            f"({missing.group(1)})",
            provider.install,
        )


def _load_tensorrt(runtime: ModuleType) -> None:
    """Load the TensorRT that this build asks for, out of TensorRT's wheel or from the system."""
    path = Path(runtime.__file__ or "").parent / "capi" / TENSORRT.library
    named = re.search(rb"libnvinfer\.so\.(\d+)", path.read_bytes()) if path.is_file() else None
    if named is None:
        raise MissingError(f"{path} names no TensorRT library", TENSORRT.install)
    if importlib.util.find_spec("tensorrt_libs") is not None:
        importlib.import_module("tensorrt_libs")
    try:
        ctypes.CDLL(named.group().decode())
    except OSError as error:
        major = int(named.group(1))
        raise MissingError(
            f"{TENSORRT.name} of onnxruntime {runtime.__version__} is built for TensorRT {major}, "
            f"which does not load ({error})",
            pip_line("gpu", TENSORRT_10 if major == 10 else f"tensorrt>={major},<{major + 1}"),
        ) from error


def open_session(
    runtime: ModuleType,
    model: str | bytes | OnnxContent,
    provider: Provider,
    *,
    threads: int = 0,
    options: Mapping[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda settings: None,
) -> Any:
    """An `InferenceSession` on `provider`, and on no other one in its place.

    Args:
        runtime: the module `onnxruntime`, after `require_provider`.
        model: path, or content of its file or files.
        provider: where it must run.
        threads: intra-op threads, 0 for one per core that this process may use.
        options: provider options of this session.
        prepare: changes its `SessionOptions` further.

    Raises:
        EngineError: the provider refuses the model, was dropped, or did not take its heavy nodes.
    """
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads or fewer_cores()
    settings.enable_mem_pattern = False
    if provider is CPU:
        share_memory(runtime, settings)
    safe = provider is CPU and not has_vnni(cpuinfo())
    settings.add_session_config_entry(_SAFE_INT8 if safe else _RECORD_PLACEMENT, "1")
    chain = [(provider.name, {**provider.options, **(options or {})}), *provider.behind]
    source = _source(model, settings)
    prepare(settings)
    try:
        session = runtime.InferenceSession(source, settings, providers=chain, enable_fallback=0)
    except _failures(runtime) as error:
        raise EngineError(
            f"onnxruntime {runtime.__version__} opens no session on {provider.name}: {error}"
        ) from error
    # The binding keeps the content to open it once more on another provider, which is not wanted.
    if isinstance(getattr(session, "_model_bytes", None), bytes):
        session._model_bytes = None
    used = session.get_providers()
    if used[:1] != [provider.name]:
        raise EngineError(
            f"onnxruntime {runtime.__version__} left {provider.name} out and would run on "
            f"{', '.join(used)}; its log says why"
        )
    if provider is not CPU:
        _check_placement(session, provider)
    return session


def _source(model: str | bytes | OnnxContent, settings: Any) -> str | bytes:
    """What a session is opened from; weights in a file of their own go into its settings."""
    if not isinstance(model, OnnxContent):
        return model
    if model.data is not None:
        settings.add_external_initializers_from_files_in_memory(
            [model.location], [model.data], [len(model.data)]
        )
    return model.model


def _failures(runtime: ModuleType) -> tuple[type[Exception], ...]:
    binding = runtime.capi.onnxruntime_pybind11_state
    own = [getattr(binding, name) for name in _FAILURES if hasattr(binding, name)]
    return (RuntimeError, ValueError, *own)


def _check_placement(session: Any, provider: Provider) -> None:
    """Refuse a session whose heavy nodes run elsewhere, as far as this version can tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    elsewhere: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider.name:
            heavy = sum(node.op_type in HEAVY_NODES for node in part.get_nodes())
            elsewhere[part.ep_name] += heavy
    found = ", ".join(f"{count} on {name}" for name, count in elsewhere.items() if count)
    if found:
        raise EngineError(
            f"{provider.name} did not take all of the graph: heavy nodes ran elsewhere ({found}); "
            "use another --backend"
        )
