"""What this machine is and has: versions, backends, and the GPU as its driver reports it.

Nothing here changes anything: clocks, power limits and MIG stay as they are.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from ..core.errors import EngineError
from ..diagnosis.inspections import inspect_runtime
from ..diagnosis.probes import BACKEND_PROBES
from ..engines.device import Gpu, find_gpu
from ..machine.hardware import describe_hardware, installed_versions, memory_gib
from .verdicts import CheckFunction, Context, NotRunError, Passed

NO_GPU = "no NVIDIA GPU, or no driver for it"
BUSY_PERCENT = 10
TOOL_TIMEOUT_S = 30.0
STATE = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("clocks.max.mem", "temperature.gpu", "power.draw", "power.limit", "memory.total"),
    *("memory.used", "utilization.gpu", "mig.mode.current", "persistence_mode"),
)
"""What `nvidia-smi --query-gpu` is asked for."""


def need_gpu() -> Gpu:
    """The first GPU.

    Raises:
        NotRunError: there is none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise NotRunError(NO_GPU)
    return gpu


def versions(context: Context) -> Passed:
    """Python, this library and every package that can change a number."""
    hardware, found = describe_hardware(), installed_versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    figures = {**found, "memory_gib": memory_gib(), "cores": hardware.cores}
    return Passed(f"{hardware.cpu}, {hardware.cores} cores; {text}", figures)


def backends(context: Context) -> Passed:
    """Which backends can be used, by the doctor's probes.

    Raises:
        EngineError: none can.
    """
    ask = functools.cache(inspect_runtime)
    with ThreadPoolExecutor(2) as pool:
        findings = dict(
            zip(BACKEND_PROBES, pool.map(lambda p: p(ask), BACKEND_PROBES.values()), strict=True)
        )
    usable = [f"{n} ({', '.join(f.devices)})" for n, f in findings.items() if f.usable]
    absent = [name for name, finding in findings.items() if not finding.usable]
    if not usable:
        raise EngineError("no backend can be used: see `python -m dbsam_deploy.doctor`")
    text = f"usable: {', '.join(usable)}"
    if absent:
        text += f"; not: {', '.join(absent)} (`python -m dbsam_deploy.doctor` says why)"
    return Passed(text, {name: asdict(finding) for name, finding in findings.items()})


def gpu_state(context: Context) -> Passed:
    """Clocks, power, memory and load of the first GPU, and whether others use it.

    Raises:
        NotRunError: no GPU, or no nvidia-smi.
        EngineError: nvidia-smi does not answer.
    """
    gpu = need_gpu()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise NotRunError(f"{gpu.name} is there, and no nvidia-smi on the PATH to ask about it")
    command = [tool, f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"nvidia-smi does not answer: {error}") from error
    if answer.returncode or not answer.stdout.strip():
        raise EngineError(f"nvidia-smi fails: {answer.stdout.strip() or answer.stderr.strip()}")
    values = [word.strip() for word in answer.stdout.splitlines()[0].split(",")]
    state = dict(zip(STATE, values, strict=False))
    busy = state.get("utilization.gpu", "")
    note = ""
    if busy.isdigit() and int(busy) > BUSY_PERCENT:
        note = f"; something else keeps it {busy} % busy, so times are not to be trusted"
    return Passed(
        f"{gpu.name} ({gpu.target}), CUDA up to {gpu.cuda}, driver "
        f"{state.get('driver_version')}, {state.get('clocks.sm')} of "
        f"{state.get('clocks.max.sm')} MHz, {state.get('power.draw')} of "
        f"{state.get('power.limit')} W, {state.get('memory.used')} of "
        f"{state.get('memory.total')} MiB used, {state.get('temperature.gpu')} °C, "
        f"MIG {state.get('mig.mode.current')}{note}",
        {**asdict(gpu), **state},
    )


CHECKS: dict[str, CheckFunction] = {"versions": versions, "gpu": gpu_state, "backends": backends}
