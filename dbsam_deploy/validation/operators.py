"""The fused kernels: built, compared with PyTorch, replayed as CUDA graphs, and sanitised.

On a GPU they run there; without one the same sources run on the CPU, thread by thread, where g++
is found (docs/adr/007-kernels-proved-without-a-gpu.md).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import AccuracyError, EngineError
from ..diagnosis.probes import OLDEST_TARGET
from ..engines.device import find_gpu
from ..extras import GXX_LINE, NVCC_LINE, TORCH_GPU_LINE
from ..kernels import library as kernels
from ..kernels.detector import detecting_library
from ..kernels.toolkit import TOOLKITS, find_nvcc
from ..machine.child_process import Ended, python_command
from .machine_state import need_gpu
from .operator_cases import (
    DTYPES,
    OperatorCase,
    cases_of,
    draw,
    expected,
    run_emulation,
    run_operator,
)
from .tolerances import KERNELS, share_of_bound
from .verdicts import CheckFunction, Context, NotRunError, Passed, need_package

if TYPE_CHECKING:
    from torch import Tensor

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_LINE = "apt-get install cuda-sanitizer-13-0"
"""A package of NVIDIA's own repository."""
AHEAD = "sm_90"
"""What the kernels are compiled for where there is no GPU to ask."""
_DONE = "dbsam: all kernels have run"
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def need_gxx() -> None:
    """Refuse to go on without the C++ compiler.

    Raises:
        NotRunError: it is not on the PATH.
    """
    if shutil.which("g++") is None:
        raise NotRunError("no g++ on the PATH", GXX_LINE)


def need_nvcc() -> Path:
    """The CUDA compiler.

    Raises:
        NotRunError: it is nowhere.
    """
    try:
        return find_nvcc()
    except EngineError as error:
        raise NotRunError(error.message, NVCC_LINE) from error


def need_cuda() -> str:
    """PyTorch's device for the first GPU.

    Raises:
        NotRunError: no GPU that runs the kernels, or no PyTorch that uses it.
    """
    gpu = need_gpu()
    if int(gpu.target.removeprefix("sm_")) < OLDEST_TARGET:
        raise NotRunError(f"{gpu.name} is {gpu.target}, the kernels need sm_80 or later")
    need_package("torch", "export")
    import torch

    if not torch.cuda.is_available():
        raise NotRunError(f"torch {torch.__version__} does not use the GPU", TORCH_GPU_LINE)
    return "cuda"


def build_library(context: Context) -> Passed:
    """Compile all kernels for this machine's GPU and load them.

    Raises:
        NotRunError: no GPU.
        EngineError: no compiler, or it refuses a source.
    """
    device = need_cuda()
    import torch

    from ..kernels import torch_ops

    torch_ops.kernel_library(torch.device(device))
    return Passed(f"compiled for this GPU and loaded: {', '.join(kernels.OPERATORS)}")


def build_for_cpu(operator: str, context: Context) -> Passed:
    """Compile a kernel for the emulation, which a machine without a GPU compares with PyTorch.

    Raises:
        NotRunError: no g++, or a GPU, which does without.
        EngineError: it refuses the source.
    """
    if find_gpu() is not None:
        raise NotRunError("needless: the GPU runs the kernels themselves")
    need_gxx()
    path = kernels.build_host_library(operator)
    return Passed("compiled for this CPU", {"library": path.name})


def build_for_cuda(operator: str, context: Context) -> Passed:
    """Compile a kernel for this machine's GPU, or, where there is none, for `AHEAD`.

    Raises:
        NotRunError: no nvcc.
        EngineError: it refuses the source.
    """
    need_nvcc()
    gpu = find_gpu()
    target = AHEAD if gpu is None else gpu.target
    usages = kernels.resource_usage(operator, target)
    most, spilled = max(u.registers for u in usages), sum(u.spill_bytes for u in usages)
    figures = {u.kernel: f"{u.registers} registers, {u.spill_bytes} B spilled" for u in usages}
    text = f"{len(usages)} kernels for {target}, up to {most} registers, {spilled} B spilled"
    return Passed(f"{text}; compiled only", figures)


def compare(operator: str, dtype: str, context: Context) -> Passed:
    """Every case of an operator against PyTorch's reference in float32.

    Raises:
        NotRunError: neither a GPU nor g++, or no PyTorch.
        AccuracyError: an error beyond the bound of the type.
        EngineError: a kernel that cannot be built or refuses its arguments.
    """
    need_package("torch", "export")
    full, device = find_gpu() is not None, "cpu"
    run: Callable[[OperatorCase, tuple[Tensor, ...]], tuple[Tensor, ...]] = run_emulation
    if full:
        device, run = need_cuda(), run_operator
    else:
        need_gxx()
    shares = {}
    for name, case in cases_of(operator, full=full).items():
        tensors = tuple(tensor.to(device) for tensor in draw(case, dtype))
        shares[name] = share_of(run(case, tensors), expected(case, tensors), dtype, name)
    worst = max(shares, key=lambda name: shares[name])
    where = "on the GPU" if full else "on this CPU's emulation"
    return Passed(
        f"{len(shares)} shapes {where}; largest error {shares[worst]:.0%} of its bound ({worst})",
        {"share_of_bound": shares, "bound": KERNELS[dtype].relative},
    )


def share_of(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: str, what: str) -> float:
    """The largest error of all outputs as a share of the bound.

    Raises:
        AccuracyError: beyond the bound, or another number of outputs.
    """
    if len(found) != len(truth):
        raise AccuracyError(f"{what}: {len(found)} outputs, expected {len(truth)}")
    return max(
        share_of_bound(ours.float().cpu().numpy(), theirs.cpu().numpy(), KERNELS[dtype], what)
        for ours, theirs in zip(found, truth, strict=True)
    )


def replay(operator: str, context: Context) -> Passed:
    """Capture an operator as a CUDA graph, give it other inputs, replay it, compare.

    Raises:
        NotRunError: no GPU.
        AccuracyError: a replay that does not follow its inputs.
    """
    device = need_cuda()
    import torch

    from ..sessions.cuda_graphs import CudaGraphRecorder

    shares = {}
    for name, case in cases_of(operator, full=True).items():
        tensors = tuple(tensor.to(device) for tensor in draw(case, "float16"))
        recording = CudaGraphRecorder()(partial(_called, case), tensors)
        fresh = tuple(tensor.to(device) for tensor in draw(case, "float16", seed=1))
        for buffer, tensor in zip(recording.inputs, fresh, strict=True):
            buffer.copy_(tensor)
        for output in recording.outputs:
            output.fill_(torch.nan)
        recording.replay()
        shares[name] = share_of(recording.outputs, expected(case, fresh), "float16", name)
    return Passed(f"{len(shares)} shapes follow their inputs", {"share_of_bound": shares})


def _called(case: OperatorCase, *tensors: Tensor) -> tuple[Tensor, ...]:
    return run_operator(case, tensors)


def detect(operator: str, context: Context) -> Passed:
    """An operator's small cases on the CPU under our detector of races and stray accesses.

    Raises:
        NotRunError: no g++, or no PyTorch.
        EngineError: it finds something.
    """
    need_gxx()
    need_package("torch", "export")
    library = detecting_library(operator)
    calls = [(dtype, case) for dtype in DTYPES for case in cases_of(operator, full=False).values()]
    for dtype, case in calls:
        run_emulation(case, draw(case, dtype), library)
    return Passed(f"{len(calls)} calls on this CPU, no race and no stray access")


def run_alone(operator: str) -> None:
    """In the process under compute-sanitizer: no kernel but ours runs, all inputs are copies."""
    from ..kernels import torch_ops

    for dtype in DTYPES:
        for case in cases_of(operator, full=False).values():
            tensors = tuple(tensor.to("cuda") for tensor in draw(case, dtype))
            found = getattr(torch_ops, operator)(*tensors, **case.sizes)
            for tensor in found if isinstance(found, tuple) else (found,):
                tensor.cpu()
    print(_DONE, flush=True)


def sanitize(tool: str, operator: str, context: Context) -> Passed:
    """An operator's small cases under one tool of compute-sanitizer.

    Raises:
        NotRunError: no GPU, or no compute-sanitizer.
        EngineError: it reports something, or does not come to its end.
    """
    need_cuda()
    program = _find_sanitizer()
    code = f"from dbsam_deploy.validation.operators import run_alone; run_alone({operator!r})"
    command, environment = python_command(["-c", code])
    options = ["--tool", tool, "--error-exitcode", "9"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor is an allocation of its own
    ended = subprocess.run(
        [program, *options, *command], capture_output=True, text=True, env=environment, check=False
    )
    print(ended.stdout, ended.stderr, sep="\n", flush=True)  # into the step's log
    summary = _SUMMARY.search(ended.stdout + ended.stderr)
    if summary is None or (_DONE not in ended.stdout and summary[1] == "0"):
        log = "\n".join((ended.stdout, ended.stderr))
        why = Ended(ended.returncode, "", log).reason()
        raise EngineError(f"it did not come to its end: {why}")
    if summary[1] != "0" or ended.returncode:
        first = next((line for line in ended.stdout.splitlines() if "=========     " in line), "")
        raise EngineError(f"{summary[1]} reported: {first.strip('= ')}; all are in the log")
    count = len(DTYPES) * len(cases_of(operator, full=False))
    return Passed(f"{count} calls, nothing reported")


def _find_sanitizer() -> str:
    """compute-sanitizer on the PATH, beside nvcc, or where NVIDIA's packages put it.

    Raises:
        NotRunError: it is not there.
    """
    folders = [os.environ.get("PATH", ""), *map(str, TOOLKITS.glob("cuda*/bin"))]
    with suppress(EngineError):
        folders.append(str(find_nvcc().resolve().parent))
    path = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if path is None:
        where = f"the PATH, beside nvcc or in {TOOLKITS}/cuda*/bin"
        raise NotRunError(f"no compute-sanitizer on {where}", SANITIZER_LINE)
    return path


def _for_each(run: Callable[[str, Context], Passed], prefix: str = "") -> dict[str, CheckFunction]:
    return {f"{prefix}{name}": partial(run, name) for name in kernels.OPERATORS}


BUILD: dict[str, CheckFunction] = {
    "GPU library": build_library,
    **_for_each(build_for_cpu, "g++ "),
    **_for_each(build_for_cuda, "nvcc "),
}
COMPARE: dict[str, CheckFunction] = {
    f"{name} {dtype}": partial(compare, name, dtype)
    for name in kernels.OPERATORS
    for dtype in DTYPES
}
REPLAY: dict[str, CheckFunction] = _for_each(replay)
SANITIZE: dict[str, CheckFunction] = {
    **_for_each(detect, "detector "),
    **{
        f"{tool} {name}": partial(sanitize, tool, name)
        for tool in SANITIZERS
        for name in kernels.OPERATORS
    },
}
