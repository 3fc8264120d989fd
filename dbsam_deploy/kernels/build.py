"""Compiles the sources of `kernels/` with g++ or nvcc; libraries go to a per-user cache.

A library's name holds a hash of every source, of the flags and of the compiler's version, so that a
change of any of them makes a new one, and the hash of its own content: a damaged one, which would
end the process that loads it, is built again.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EngineError, InputError
from ..files.private import cache_folder, find_kept, keep, private_folder
from .toolkit import find_nvcc


@dataclass(frozen=True)
class ResourceUsage:
    """What ptxas reports of one kernel.

    Attributes:
        kernel: demangled name where `c++filt` is installed, else the symbol.
        registers: 32-bit registers a thread.
        stack_bytes: local memory a thread.
        spill_bytes: stores and loads of spilled registers, together.
        shared_bytes: static shared memory a block.
    """

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def source_files(source: Path) -> tuple[Path, ...]:
    """A source and everything it includes from its own folder, itself first.

    Raises:
        EngineError: one of them is missing.
    """
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        if not path.is_file():
            raise EngineError(f"kernel source {path} is missing: reinstall dbsam-deploy")
        found.append(path)
        names = re.findall(r'^#include "([^"]+)"', path.read_text(), re.M)
        waiting += [path.parent / name for name in names]
    return tuple(found)


@functools.cache
def _compiler(name: str) -> tuple[str, str]:
    """Path and version text of a compiler."""
    path = str(find_nvcc()) if name == "nvcc" else shutil.which(name)
    if path is None:
        raise EngineError(
            f"no {name} on the PATH, which builds the kernels: install a C++17 compiler (Debian: "
            "apt-get install g++)"
        )
    return path, _run([path, "--version"])


def _run(command: Sequence[str]) -> str:
    """Output of a compiler, both streams.

    Raises:
        EngineError: it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise EngineError(
            f"{Path(command[0]).name} ended with status {result.returncode}: {' '.join(command)}",
            *lines[:20],
        )
    return result.stdout + result.stderr


def digest_of(files: Sequence[Path], flags: Sequence[str], version: str) -> str:
    """Hash of sources, flags and a compiler's version, for the name of what is made of them."""
    state = hashlib.sha256("\0".join((*flags, version)).encode())
    for path in files:
        data = path.read_bytes()
        state.update(f"\0{path.name}\0{len(data)}\0".encode())
        state.update(data)
    return state.hexdigest()[:20]


def build_library(
    stem: str, compiler: str, sources: Sequence[Path], flags: Sequence[str], folder: Path | None
) -> Path:
    """Compile sources to a shared library, unless the cache has it.

    Args:
        stem: start of the library's name.
        compiler: "g++" or "nvcc".
        sources: translation units; what they include counts for the hash.
        flags: for the compiler.
        folder: cache to use instead of the user's.

    Raises:
        EngineError: no such compiler, a missing source, the compiler refuses one, or the cache is
            not this user's alone.
    """
    folder = private_folder(folder or cache_folder("kernels"), "kernels")
    path, version = _compiler(compiler)
    files = tuple(dict.fromkeys(file for source in sources for file in source_files(source)))
    name = f"{stem}-{digest_of(files, flags, version)}"
    if found := find_kept(folder, name, ".so"):
        return found[0]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, "library.so")
            _run([path, *flags, *(str(source) for source in sources), "-o", str(built)])
            return keep(folder, name, ".so", built.read_bytes())
    except OSError as error:
        raise EngineError(f"kernels cannot be kept in {folder}: {error.strerror}") from None


def architecture_number(name: str) -> str:
    """Digits of an architecture's name, "90" of "sm_90".

    Raises:
        InputError: it is not spelled so, or is older than the kernels support.
    """
    found = re.fullmatch(r"sm_(\d+)", name)
    if found is None or int(found[1]) < 80:
        raise InputError(f"architecture {name!r}: expected sm_80 or later, such as sm_90")
    return found[1]


def ptx_text(source: Path, architecture: str) -> str:
    """PTX of a source's kernels.

    Raises:
        InputError: unknown architecture.
        EngineError: no nvcc, or it refuses the source.
    """
    number = architecture_number(architecture)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.ptx")
        command = (_compiler("nvcc")[0], "-std=c++17", "-O3", "-ptx", f"-arch=compute_{number}")
        _run((*command, str(source), "-o", str(target)))
        return target.read_text()


_USAGE = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def usage_of(source: Path, architecture: str) -> tuple[ResourceUsage, ...]:
    """Registers, spills and shared memory of a source's kernels, as ptxas counts them.

    Raises:
        InputError: unknown architecture.
        EngineError: no nvcc, or it refuses the source.
    """
    number = architecture_number(architecture)
    with tempfile.TemporaryDirectory() as folder:
        command = (_compiler("nvcc")[0], "-std=c++17", "-O3", "-cubin", f"-arch=sm_{number}")
        text = _run((*command, "-Xptxas=-v", str(source), "-o", str(Path(folder, "kernels.cubin"))))
    return tuple(parse_usage(text))


def parse_usage(text: str) -> list[ResourceUsage]:
    """What `ptxas -v` says of each kernel."""
    matches = list(_USAGE.finditer(text))
    names = [match["symbol"] for match in matches]
    if names and shutil.which("c++filt"):
        names = _run(("c++filt", *names)).splitlines()
    usages = []
    for name, match in zip(names, matches, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        usages.append(
            ResourceUsage(
                kernel=name,
                registers=int(match["registers"]),
                stack_bytes=int(match["stack"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return usages
