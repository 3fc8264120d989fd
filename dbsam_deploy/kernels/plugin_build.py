"""Compiles `libdbsam_plugins.so` with CMake, and reads the manifest that it writes beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.errors import EngineError
from ..files.atomic import sha256_of, write_atomically
from ..resources import resource_dir
from .build import architecture_number
from .headers import find_headers, installed_tensorrt
from .toolkit import find_nvcc

LIBRARY_NAME, MANIFEST_NAME = "libdbsam_plugins.so", "libdbsam_plugins.json"
DEFAULT_OUTPUT = Path("build/plugins")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""GPUs that a library is compiled for unless the caller names others."""

_BUILD = re.compile(
    rb"dbsam_plugins_build: tensorrt=([\d.]+) cuda=([\d.]+) architectures=([\w,-]+)\0"
)
"""What kernels/plugins/library.cpp puts into every library."""

_PROGRESS = re.compile(r"\[ *\d+(%|/\d+)\] ")


@dataclass(frozen=True)
class PluginLibrary:
    """A compiled library, as it says of itself.

    Attributes:
        path: the file.
        sha256: of its content.
        architectures: GPUs it holds code for ("sm_90") or PTX for ("compute_90"), which serves
            later ones as well.
        tensorrt_headers: version of the headers it was compiled with ("10.14.1").
        cuda: version of nvcc ("13.0.88").
    """

    path: Path
    sha256: str
    architectures: tuple[str, ...]
    tensorrt_headers: str
    cuda: str


def build_plugins(
    output: Path = DEFAULT_OUTPUT,
    *,
    tensorrt_include: Path | None = None,
    tensorrt: str | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    jobs: int | None = None,
    report: Callable[[str], None] = print,
) -> PluginLibrary:
    """Compile the library; a second call compiles only what changed.

    Args:
        output: folder for the library, its manifest and CMake's files.
        tensorrt_include: folder of TensorRT's headers; by default found, see `find_headers`.
        tensorrt: version that is to run the library ("11.4"); by default the one installed here,
            or, without one, that of the headers found.
        architectures: GPUs to compile for, such as "sm_90".
        jobs: files compiled at a time; by default one for each core.
        report: gets one line for each step and each compiled file.

    Raises:
        InputError: an architecture that is not spelled so.
        EngineError: a tool or the headers are missing, or the compiler refuses a source.
    """
    numbers = [architecture_number(name) for name in architectures]
    cmake, nvcc = _cmake(), str(find_nvcc())
    runtime = installed_tensorrt() if tensorrt is None else tensorrt
    headers, cuda = find_headers(tensorrt_include, runtime), _cuda_version(nvcc)
    whose = f"TensorRT {runtime}" if runtime else f"any TensorRT {headers.version.split('.')[0]}"
    report(
        f"[1/3] for {whose}: headers {headers.version} in {headers.folder}, CUDA {cuda} ({nvcc})"
    )
    configure = [
        *(cmake, "-S", str(resource_dir("kernels"))),
        *(("-G", "Ninja") if shutil.which("ninja") else ("-G", "Unix Makefiles")),
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={_cmake_architectures(numbers)}",
        f"-DTENSORRT_INCLUDE_DIR={headers.folder}",
    ]
    # CMake refuses a folder that was configured otherwise; another command has another folder.
    digest = hashlib.sha256("\0".join(configure).encode()).hexdigest()
    folder = output / f"cmake-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    report(f"[2/3] configuring in {folder}")
    _run([*configure, "-B", str(folder)], log, None)
    report(f"[3/3] compiling for {', '.join(architectures)}")
    compile_ = [cmake, "--build", str(folder), "--parallel", str(jobs or os.cpu_count() or 1)]
    _run(compile_, log, report)
    return _publish(folder / LIBRARY_NAME, output)


def _cmake() -> str:
    """Path of cmake.

    Raises:
        EngineError: it is not on the PATH.
    """
    found = shutil.which("cmake")
    if found is None:
        raise EngineError(
            "no cmake on the PATH, which builds the plugins: install it (`pip install cmake` or "
            "`apt install cmake`; 3.24 or later)"
        )
    return found


def _cuda_version(nvcc: str) -> str:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release [\d.]+, V([\d.]+)", answer.stdout)
    if version is None:
        raise EngineError(
            f"`{nvcc} --version` does not say its version: reinstall the CUDA toolkit"
        )
    return version[1]


def _cmake_architectures(numbers: Sequence[str]) -> str:
    """Machine code for all, PTX as well for 90 (which data-centre GPUs after it need) and the last.

    >>> _cmake_architectures(["80", "90", "120"])
    '80-real;90;120'
    """
    with_ptx = {"90", numbers[-1]}
    return ";".join(n if n in with_ptx else f"{n}-real" for n in numbers)


def _run(command: Sequence[str], log: Path, report: Callable[[str], None] | None) -> None:
    """Run a step of the build, keep its output in `log`, pass its progress lines on.

    Raises:
        EngineError: it failed; the details are its lines about errors.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if report is not None and _PROGRESS.match(line):
                report(f"      {lines[-1]}")
    with log.open("a") as stream:
        stream.write("\n".join((f"$ {' '.join(command)}", *lines, "")))
    if process.returncode:
        wrong = [line for line in lines if re.search(r"\berror\b", line, re.I)] or lines[-5:]
        raise EngineError(
            f"building the plugins failed with status {process.returncode}; the whole log is {log}",
            *wrong[:10],
        )


def _publish(built: Path, output: Path) -> PluginLibrary:
    """Copy the library into place, then its manifest."""
    target, manifest = output / LIBRARY_NAME, output / MANIFEST_NAME
    manifest.unlink(missing_ok=True)
    with built.open("rb") as source, write_atomically(target) as stream:
        shutil.copyfileobj(source, stream)
    target.chmod(0o755)
    library = read_library(target)
    with write_atomically(manifest) as stream:
        fields = {**asdict(library), "path": LIBRARY_NAME}
        stream.write(json.dumps(fields, indent=2).encode() + b"\n")
    return library


def read_library(path: Path) -> PluginLibrary:
    """What a library says of itself; a manifest that lies beside it must be about this file.

    Raises:
        EngineError: no file, no library of ours, or not the one of the manifest.
    """
    hint = "run `python -m dbsam_deploy.plugins build`"
    if not path.is_file():
        raise EngineError(f"no plugin library {path}: {hint}")
    found = _BUILD.search(path.read_bytes())
    if found is None:
        raise EngineError(f"{path} is no plugin library of dbsam-deploy: {hint}")
    headers, cuda, architectures = (part.decode() for part in found.groups())
    codes = tuple(name for code in architectures.split(",") for name in _code_names(code))
    library = PluginLibrary(path, sha256_of(path), codes, headers, cuda)
    manifest = path.parent / MANIFEST_NAME
    if path.name == LIBRARY_NAME and manifest.is_file():
        _compare(library, manifest, hint)
    return library


def _code_names(code: str) -> tuple[str, ...]:
    """CMake's word for an architecture → what it makes: machine code, PTX or both.

    >>> _code_names("80-real"), _code_names("90")
    (('sm_80',), ('sm_90', 'compute_90'))
    """
    number, _, kind = code.partition("-")
    names = {"real": f"sm_{number}", "virtual": f"compute_{number}"}
    return (names[kind],) if kind else tuple(names.values())


def _compare(library: PluginLibrary, manifest: Path, hint: str) -> None:
    try:
        expected = str(json.loads(manifest.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{manifest} is no manifest of a plugin library ({error}): {hint}"
        ) from None
    if library.sha256 != expected:
        raise EngineError(
            f"{library.path} has sha256 {library.sha256[:12]}…, the manifest beside it says "
            f"{expected[:12]}…: {hint}"
        )
