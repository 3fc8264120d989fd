"""`python -m dbsam_deploy.doctor`: what can be used on this machine, and how to get the rest."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli import HelpFormatter, Parser, as_called, run, table_console
from .core.errors import DbsamError, EngineError, InputError
from .diagnosis.inspections import EXTRA_PREFIX, Answer, inspect_runtime
from .diagnosis.probes import BACKEND_PROBES, Ask, Finding, Probe
from .extras import (
    EXTRAS,
    GXX_LINE,
    HEADERS_LINE,
    NVCC_LINE,
    NVRTC_LINE,
    Extra,
    headers_line,
    pip_line,
)
from .kernels.headers import find_headers, installed_tensorrt, numbers_of
from .kernels.library import ARCHITECTURES
from .kernels.nvrtc import compile_source, find_nvrtc
from .kernels.plugin_build import DEFAULT_OUTPUT, LIBRARY_NAME, read_library
from .kernels.toolkit import find_nvcc
from .machine.hardware import (
    Hardware,
    cpuinfo,
    describe_hardware,
    instruction_sets,
    memory_gib,
)
from .serving.environment import DEFAULT_FOLDER, WHEEL, find_environment, install_hint
from .sessions.backends import LOCAL_BACKENDS

WORKERS = 4
TOOL_TIMEOUT_S = 20.0
RUNTIME_EXTRAS = ("cpu", "gpu", "nvrtc", "openvino", "rtx")
"""Extras that have no row of their own: those of backends and tools say more."""
PLUGINS_LINE = "python -m dbsam_deploy.plugins build"

DESCRIPTION = """\
Show which backends, build tools and optional parts can be used on this machine, what is missing,
and the commands that install it. Every check tries: it imports, compiles or runs something small.

With --backend only that one is checked: exit status 0 if it can be used, 1 if not, with the reason
in one line. With --artefact the runtimes of the CPU are tried on an export instead: how fast they
are, which keep its gate, and which `--backend auto` takes.

examples:
  python -m dbsam_deploy.doctor
  python -m dbsam_deploy.doctor --json > machine.json
  python -m dbsam_deploy.doctor --backend tensorrt && echo engines run here
  python -m dbsam_deploy.doctor --backend onnxruntime --device cuda
  python -m dbsam_deploy.doctor --artefact build/fp16
"""


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: of the backend, tool or part.
        kind: `backend`, `build`, `serving` or `extra`.
        probe: finds out whether it can be used.
        purpose: what it is for, where the name does not say.
    """

    name: str
    kind: str
    probe: Probe
    purpose: str = ""

    @property
    def title(self) -> str:
        """Name and purpose."""
        return f"{self.name} ({self.purpose})" if self.purpose else self.name


class Inspector:
    """Puts each question once, whoever asks, and a few at a time.

    Args:
        pool: where the questions are asked.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._lock = pool, threading.Lock()
        self._answers: dict[str, Future[Answer]] = {}

    def __call__(self, question: str) -> Answer:
        """The answer of `inspect_runtime`, waited for."""
        with self._lock:
            if question not in self._answers:
                self._answers[question] = self._pool.submit(inspect_runtime, question)
        return self._answers[question].result()


def _tool(name: str, *options: str, text: str = "") -> str:
    """What a program prints; `text` is its standard input.

    Raises:
        EngineError: it is not there, or it fails.
    """
    path = shutil.which(name) if name != "nvcc" else str(find_nvcc())
    if path is None:
        raise EngineError(f"no {name} on the PATH")
    result = subprocess.run(
        [path, *options], input=text, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        told = next((line for line in lines if "error" in line), lines[-1])
        raise EngineError(f"{name} does not work: {told.strip()}")
    return result.stdout


def probe_gxx(ask: Ask) -> Finding:
    """The C++ compiler, which builds kernels for the CPU (their tests)."""
    version = re.search(r"\d+\.\d+[.\d]*\s*$", _tool("g++", "--version").splitlines()[0])
    _tool("g++", "-std=c++17", "-x", "c++", "-fsyntax-only", "-", text="int main() { return 0; }")
    return Finding(True, version.group().strip() if version else "")


def probe_nvcc(ask: Ask) -> Finding:
    """The CUDA compiler, with the GPUs that it compiles for."""
    version = re.search(r"release (\d+\.\d+)", _tool("nvcc", "--version"))
    codes = _tool("nvcc", "--list-gpu-code").split()
    lacking = [name for name in ARCHITECTURES if name not in codes]
    name = version.group(1) if version else ""
    if lacking:
        reason = f"nvcc {name} does not compile for {', '.join(lacking)}: 12.8 or later is needed"
        return Finding(False, name, missing=reason, install=NVCC_LINE)
    return Finding(True, f"{name} ({', '.join(ARCHITECTURES)})" + _elsewhere())


def probe_nvrtc(ask: Ask) -> Finding:
    """NVRTC, which compiles the kernels of PyTorch and quick plugins where there is no nvcc."""
    found = find_nvrtc()
    compile_source('extern "C" __global__ void kernel() {}', ARCHITECTURES[0])
    return Finding(True, f"{found.version}, {found.path}")


def _elsewhere() -> str:
    """Where nvcc is, if the PATH does not say so."""
    path = find_nvcc()
    return "" if shutil.which("nvcc") == str(path) else f", {path}"


def probe_headers(ask: Ask) -> Finding:
    """TensorRT's C++ headers, which the plugins are compiled with: those of the runtime."""
    runtime = installed_tensorrt()
    try:
        found = find_headers(runtime=runtime)
    except EngineError as error:
        line = headers_line(runtime) if runtime else HEADERS_LINE
        return Finding(False, missing=error.message, install=line)
    whose = f", for TensorRT {runtime}" if runtime else ""
    return Finding(True, f"{found.version} in {found.folder}{whose}")


def probe_plugins(ask: Ask) -> Finding:
    """The compiled plugin library."""
    library, runtime = read_library(DEFAULT_OUTPUT / LIBRARY_NAME), installed_tensorrt()
    if runtime and numbers_of(runtime)[0] != numbers_of(library.tensorrt_headers)[0]:
        reason = f"{library.path} is for TensorRT {library.tensorrt_headers}, this is {runtime}"
        return Finding(False, missing=reason, install=PLUGINS_LINE)
    architectures = ", ".join(library.architectures)
    return Finding(True, f"{library.path}, TensorRT {library.tensorrt_headers}, {architectures}")


def probe_server(ask: Ask) -> Finding:
    """The Triton server's own environment."""
    environment = find_environment(DEFAULT_FOLDER)
    openvino = f", with OpenVINO {environment.openvino}" if environment.openvino else ""
    return Finding(True, f"{WHEEL} in {environment.folder}{openvino}")


def probe_extra(extra: Extra, ask: Ask) -> Finding:
    """An optional extra: its modules, imported."""
    answer = ask(EXTRA_PREFIX + extra.name)
    if answer.error:
        return Finding(False, missing=answer.error, install=pip_line(extra.name))
    versions = answer.facts["versions"]
    return Finding(True, ", ".join(f"{name} {version}" for name, version in versions.items()))


CHECKS = (
    *(Check(name, "backend", BACKEND_PROBES[name]) for name in LOCAL_BACKENDS),
    Check("g++", "build", probe_gxx, "kernels on the CPU"),
    Check("nvcc", "build", probe_nvcc, "kernels and plugins on CUDA"),
    Check("NVRTC", "build", probe_nvrtc, "kernels on CUDA without nvcc"),
    Check("TensorRT headers", "build", probe_headers, "to compile plugins"),
    Check("plugin library", "build", probe_plugins, "fused operators in TensorRT"),
    Check("Triton server", "serving", probe_server, "a server on this machine"),
    *(
        Check(extra.name, "extra", partial(probe_extra, extra), extra.purpose)
        for extra in EXTRAS
        if extra.name not in RUNTIME_EXTRAS
    ),
)
"""Every row, in order."""

INSTALL_LINES = {
    "g++": GXX_LINE,
    "nvcc": NVCC_LINE,
    "NVRTC": NVRTC_LINE,
    "plugin library": PLUGINS_LINE,
    "Triton server": install_hint(DEFAULT_FOLDER),
}
"""Check → its command, for the checks whose failure is an error with a text of its own."""


def examine(checks: tuple[Check, ...], ask: Ask | None = None) -> list[Finding]:
    """The finding of each check, side by side.

    Args:
        checks: the rows.
        ask: answers the probes' questions; by default `inspect_runtime`, each question once.
    """
    with ThreadPoolExecutor(WORKERS) as questions, ThreadPoolExecutor(len(checks)) as rows:
        chosen = Inspector(questions) if ask is None else ask
        return list(rows.map(lambda check: _examine(check, chosen), checks))


def _examine(check: Check, ask: Ask) -> Finding:
    try:
        finding = check.probe(ask)
    except DbsamError as error:
        finding = Finding(False, missing=error.message)
    except (OSError, subprocess.SubprocessError) as error:
        finding = Finding(False, missing=f"the check failed: {error}")
    line = "" if finding.usable else finding.install or INSTALL_LINES.get(check.name, "")
    return replace(
        finding, missing=" ".join(finding.missing.split()), install=line or finding.install
    )


def machine_facts() -> dict[str, Any]:
    """CPU, memory, GPU, driver and Python of this machine."""
    hardware: Hardware = describe_hardware()
    return {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "instructions": [name for name, here in instruction_sets(cpuinfo()).items() if here],
        "memory_gib": round(memory_gib(), 1),
        "gpu": hardware.gpu,
        "driver": hardware.driver,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def as_dict(check: Check, finding: Finding) -> dict[str, Any]:
    """One row for `--json`."""
    return {"name": check.name, "kind": check.kind, "purpose": check.purpose, **asdict(finding)}


def _machine_line(facts: dict[str, Any]) -> str:
    gpu = f"{facts['gpu']} (driver {facts['driver']})" if facts["gpu"] else "no NVIDIA GPU"
    more = f" with {', '.join(facts['instructions'])}" if facts["instructions"] else ""
    return (
        f"machine: {facts['cpu']}{more}, {facts['cores']} cores, {facts['memory_gib']} GiB, {gpu}, "
        f"Python {facts['python']}, {facts['system']}"
    )


def print_findings(
    console: Console, checks: tuple[Check, ...], findings: list[Finding], facts: dict[str, Any]
) -> None:
    """The machine, a table of all rows, and the commands that get what is missing, unbroken."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(_machine_line(facts))
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("usable", no_wrap=True)
    table.add_column("version and devices")
    table.add_column("missing")
    lines: dict[str, list[str]] = {}
    for index, (check, finding) in enumerate(zip(checks, findings, strict=True)):
        if index and check.kind != checks[index - 1].kind:
            table.add_section()
        usable = "yes" if finding.usable else "no"
        here = f"{finding.version} on {', '.join(finding.devices)}".removesuffix(" on ")
        table.add_row(check.name, usable, Text(here), Text(as_called(finding.missing)))
        if finding.install:
            lines.setdefault(finding.install, []).append(check.title)
    console.print(table)
    for line, titles in lines.items():
        say(f"for {', '.join(titles)}:\n  {as_called(line)}")


def _report_one(check: Check, finding: Finding, device: str | None, *, as_json: bool) -> int:
    """Print one backend's line; 0 if it can be used (on `device`), else 1."""
    usable = finding.usable if device is None else device in finding.devices
    if as_json:
        print(json.dumps(as_dict(check, finding), indent=2))
    elif usable:
        print(f"{check.name} {finding.version}: usable on {', '.join(finding.devices)}")
    else:
        where = f" on {device}" if device else ""
        why = finding.missing.removeprefix(f"{device}: ")
        line = f": {finding.install}" if finding.install else ""
        print(f"{check.name}: not usable{where}: {why}{line}")
    return 0 if usable else 1


def _report_trials(folder: Path, *, again: bool, as_json: bool) -> int:
    """Try the CPU's runtimes on an export, and print what was found."""
    from .diagnosis.tried import trials_facts, trials_table, tried_runtimes

    record, facts = tried_runtimes(folder, again=again), machine_facts()
    if as_json:
        print(json.dumps({"machine": facts, **trials_facts(record)}, indent=2))
        return 0
    print(_machine_line(facts))
    table_console().print(trials_table(record))
    print(f"`--backend auto` takes {record.chosen.name} for {folder}")
    return 0


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.doctor",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--backend", choices=LOCAL_BACKENDS, help="check only this one")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="with --backend: it must be usable on this device"
    )
    parser.add_argument(
        "--artefact", type=Path, metavar="DIR", help="try the CPU's runtimes on this export"
    )
    parser.add_argument(
        "--retry", action="store_true", help="with --artefact: also where they were tried before"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.device is not None and args.backend is None:
        raise InputError("--device goes with --backend NAME")
    if args.retry and args.artefact is None:
        raise InputError("--retry goes with --artefact DIR")
    if args.artefact is not None:
        return _report_trials(args.artefact, again=args.retry, as_json=args.json)
    if args.backend is not None:
        (check,) = (c for c in CHECKS if (c.kind, c.name) == ("backend", args.backend))
        (finding,) = examine((check,))
        return _report_one(check, finding, args.device, as_json=args.json)
    findings, facts = examine(CHECKS), machine_facts()
    if args.json:
        rows = [as_dict(check, finding) for check, finding in zip(CHECKS, findings, strict=True)]
        print(json.dumps({"machine": facts, "checks": rows}, indent=2))
    else:
        print_findings(table_console(), CHECKS, findings, facts)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
