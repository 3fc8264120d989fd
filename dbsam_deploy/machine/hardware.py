"""What this machine is: a short key, and the facts that belong beside every measured number.

Run it to see both::

    python -m dbsam_deploy.machine.hardware
    python -m dbsam_deploy.machine.hardware --key
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .. import cli
from .cores import usable_cores

CPUINFO = Path("/proc/cpuinfo")
DRIVER_LIBRARY = "libcuda.so.1"
"""What NVIDIA's driver puts on every machine with a GPU."""
VERSIONED_PACKAGES = (
    "dbsam-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Hardware:
    """One machine as measurements see it; two machines with the same `key` are comparable.

    Attributes:
        key: file-name-safe name, built from the other fields.
        cpu: model name as the system gives it, with family and model number where known (virtual
            machines often hide the rest).
        cores: logical cores this process may use, within a container's share.
        gpu: name of the first NVIDIA GPU, or "" without one.
        driver: its driver version, or "".
    """

    key: str
    cpu: str
    cores: int
    gpu: str = ""
    driver: str = ""


def hardware_key(cpu: str, cores: int, gpu: str = "") -> str:
    """Normalise names to a key for a file name.

    >>> hardware_key("AMD EPYC 9B14 (family 25, model 17)", 2)
    'amd-epyc-9b14-family-25-model-17-2-cores'
    >>> hardware_key("Intel(R) Xeon(R) CPU @ 2.20GHz", 8, "NVIDIA L4")
    'intel-xeon-cpu-2-20ghz-8-cores-nvidia-l4'
    """
    text = f"{cpu} {cores} cores {gpu}".lower()
    text = re.sub(r"\((r|tm|c)\)", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def cpuinfo() -> str:
    """The text of `/proc/cpuinfo`; "" where there is none."""
    return CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else ""


def processor(cpuinfo: str) -> str:
    """What the processor is and can do, without what changes while it runs.

    Args:
        cpuinfo: text of `/proc/cpuinfo`.
    """
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in cpuinfo.splitlines() if line.startswith(telling)}))


def has_vnni(cpuinfo: str) -> bool:
    """Whether x86 adds four products of 8-bit numbers to 32 bits at once.

    Args:
        cpuinfo: text of `/proc/cpuinfo`.
    """
    return bool({"avx512_vnni", "avx_vnni"} & set(cpuinfo.split()))


INSTRUCTIONS = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX512-bf16": ("avx512_bf16",),
    "AMX-bf16": ("amx_bf16",),
    "AMX-int8": ("amx_int8",),
}
"""What speeds int8 and bfloat16 up on x86 → the flags that stand for it."""


def instruction_sets(cpuinfo: str) -> dict[str, bool]:
    """Which of `INSTRUCTIONS` a processor has.

    Args:
        cpuinfo: text of `/proc/cpuinfo`.
    """
    flags = set(cpuinfo.split())
    return {name: not flags.isdisjoint(names) for name, names in INSTRUCTIONS.items()}


def has_bfloat16(cpuinfo: str) -> bool:
    """Whether a processor multiplies bfloat16 numbers itself.

    Args:
        cpuinfo: text of `/proc/cpuinfo`.
    """
    found = instruction_sets(cpuinfo)
    return found["AVX512-bf16"] or found["AMX-bf16"]


def cpu_name(cpuinfo: str) -> str:
    """CPU model out of the text of `/proc/cpuinfo`, or "" if it names none (some ARM kernels)."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, found, value = line.partition(":")
        if found:
            fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name", "")
    if model and "cpu family" in fields and "model" in fields:
        return f"{model} (family {fields['cpu family']}, model {fields['model']})"
    return model


def describe_hardware() -> Hardware:
    """Look at this machine. A CPU that names itself nowhere is called by its architecture."""
    cpu = cpu_name(CPUINFO.read_text()) if CPUINFO.is_file() else platform.processor()
    cpu = cpu or platform.machine() or "unknown-cpu"
    cores = usable_cores()
    gpu, driver = _first_gpu()
    return Hardware(hardware_key(cpu, cores, gpu), cpu, cores, gpu, driver)


def memory_gib() -> float:
    """Main memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0


def _first_gpu() -> tuple[str, str]:
    """Name and driver version of the first NVIDIA GPU, or two empty strings."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "", ""  # the tool is installed but no driver answers: no GPU to use
    lines = answer.stdout.splitlines()
    name, _, driver = (lines[0] if lines else "").partition(",")
    return name.strip(), driver.strip()


def installed_versions(packages: Iterable[str] = VERSIONED_PACKAGES) -> dict[str, str]:
    """Version of Python and of each of these packages that is installed.

    Args:
        packages: names for pip; by default all that can change a number somewhere.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def main(argv: list[str] | None = None) -> int:
    """Print the hardware facts; returns 0."""
    parser = cli.Parser(
        prog="python -m dbsam_deploy.machine.hardware",
        description=(
            "Show what this machine is: the key that names its benchmark baseline\n"
            "(benchmarks/baselines/<key>.json), and the versions stored beside figures.\n\n"
            "examples:\n"
            "  python -m dbsam_deploy.machine.hardware          everything, as JSON\n"
            "  python -m dbsam_deploy.machine.hardware --key    only the key, for scripts"
        ),
        formatter_class=cli.HelpFormatter,
    )
    parser.add_argument("--key", action="store_true", help="print only the key")
    options = parser.parse_args(argv)
    hardware = describe_hardware()
    if options.key:
        print(hardware.key)
    else:
        print(json.dumps({**asdict(hardware), "versions": installed_versions()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
