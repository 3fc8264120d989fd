"""NVRTC, CUDA's compiler as a library: kernels compiled where there is no nvcc and no C++ compiler.

PyTorch's builds for CUDA bring it; elsewhere `NVRTC_LINE` installs it. It needs no GPU. It compiles
the part of a source that runs on the GPU, so what launches a kernel is in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EngineError, MissingError
from ..extras import NVRTC_LINE
from . import toolkit
from .build import ResourceUsage, architecture_number, parse_usage, ptx_text

_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
_WHEELS = ("cu13/lib", "cuda_nvrtc/lib")
_WHEEL_HEADERS = ("cu13/include", "cuda_runtime/include")
_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")

_STANDARD_HEADERS = {
    "algorithm": """
        namespace std {
        template <class T> constexpr const T& min(const T& a, const T& b) { return b < a ? b : a; }
        template <class T> constexpr const T& max(const T& a, const T& b) { return a < b ? b : a; }
        }
    """,
    "cstddef": "#define INFINITY __int_as_float(0x7F800000)",
    "cstdint": """
        typedef signed char int8_t; typedef unsigned char uint8_t;
        typedef short int16_t; typedef unsigned short uint16_t;
        typedef int int32_t; typedef unsigned int uint32_t;
        typedef long long int64_t; typedef unsigned long long uint64_t;
        typedef unsigned long long uintptr_t;
    """,
    "type_traits": """
        namespace std {
        template <class A, class B> inline constexpr bool is_same_v = false;
        template <class A> inline constexpr bool is_same_v<A, A> = true;
        }
    """,
    "cuda_runtime.h": "",
}
"""What kernels use of headers that NVRTC does not bring."""


@dataclass(frozen=True)
class Compiled:
    """Kernels of one source.

    Attributes:
        cubin: code for the architecture.
        ptx: the same for it and later ones.
        usage: what ptxas counts, a kernel each.
    """

    cubin: bytes
    ptx: str
    usage: tuple[ResourceUsage, ...]


@dataclass(frozen=True)
class Nvrtc:
    """The library.

    Attributes:
        library: its functions.
        path: where it lies, or its name where the loader found it.
        version: "13.0".
        headers: folder with cuda_fp16.h.
    """

    library: ctypes.CDLL
    path: Path
    version: str
    headers: Path


@functools.cache
def find_nvrtc() -> Nvrtc:
    """Load NVRTC: from NVIDIA's wheels, a CUDA toolkit, or where the loader finds it.

    Raises:
        MissingError: it is not there, or CUDA's headers are not; with the line that installs both.
    """
    for path in _library_paths():
        # NVRTC opens this one by its name
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        headers = next((f for f in _header_folders() if (f / "cuda_fp16.h").is_file()), None)
        if headers is None:
            raise MissingError(f"NVRTC ({path}) is here, CUDA's cuda_fp16.h is not", NVRTC_LINE)
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return Nvrtc(library, path, f"{major.value}.{minor.value}", headers)
    raise MissingError(
        "there is no NVRTC, which compiles kernels where there is no nvcc", NVRTC_LINE
    )


def _library_paths() -> Iterator[Path]:
    for folder in _of_wheels(_WHEELS):
        yield from (folder / name for name in _LIBRARIES if (folder / name).is_file())
    for home in toolkit.toolkit_folders():
        yield from (home / "lib64" / n for n in _LIBRARIES if (home / "lib64" / n).is_file())
    yield from (Path(name) for name in _LIBRARIES)


def _header_folders() -> Iterator[Path]:
    yield from _of_wheels(_WHEEL_HEADERS)
    yield from (home / "include" for home in toolkit.toolkit_folders())


def _of_wheels(parts: tuple[str, ...]) -> Iterator[Path]:
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found else None
    for part in parts:
        yield from (Path(place, part) for place in places or ())


def compile_source(source: str, architecture: str) -> Compiled:
    """Compile a translation unit's kernels.

    Args:
        source: CUDA C++; it names what it includes by absolute paths.
        architecture: GPU that the code is for, "sm_90".

    Raises:
        InputError: unknown architecture.
        MissingError: no NVRTC.
        EngineError: it refuses the source, or does not know the architecture.
    """
    number = architecture_number(architecture)
    nvrtc = find_nvrtc()
    options = [*_OPTIONS, f"-I{nvrtc.headers}", f"-arch=sm_{number}"]
    with _program(nvrtc, source) as program:
        words = (ctypes.c_char_p * len(options))(*(word.encode() for word in options))
        status = nvrtc.library.nvrtcCompileProgram(program, len(options), words)
        log = _content(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0")
        if status:
            what = nvrtc.library.nvrtcGetErrorString(status).decode()
            lines = [line for line in log.splitlines() if line.strip()]
            raise EngineError(f"NVRTC {nvrtc.version} refuses a kernel: {what}", *lines[:20])
        cubin, ptx = _content(nvrtc, "CUBIN", program), _content(nvrtc, "PTX", program)
    return Compiled(cubin, ptx.decode().rstrip("\0"), tuple(parse_usage(log)))


@contextlib.contextmanager
def _program(nvrtc: Nvrtc, source: str) -> Iterator[ctypes.c_void_p]:
    count, strings = len(_STANDARD_HEADERS), ctypes.c_char_p * len(_STANDARD_HEADERS)
    contents = strings(*(text.encode() for text in _STANDARD_HEADERS.values()))
    names = strings(*(name.encode() for name in _STANDARD_HEADERS))
    program = ctypes.c_void_p()
    create = nvrtc.library.nvrtcCreateProgram
    if create(ctypes.byref(program), source.encode(), b"kernels.cu", count, contents, names):
        raise EngineError(f"NVRTC {nvrtc.version} takes no source")
    try:
        yield program
    finally:
        nvrtc.library.nvrtcDestroyProgram(ctypes.byref(program))


def _content(nvrtc: Nvrtc, what: str, program: ctypes.c_void_p) -> bytes:
    """What `nvrtcGet<what>` gives of a program."""
    size = ctypes.c_size_t()
    failed = getattr(nvrtc.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    if failed or getattr(nvrtc.library, f"nvrtcGet{what}")(program, content):
        raise EngineError(f"NVRTC {nvrtc.version} gives no {what}")
    return content.raw


def has_nvcc() -> bool:
    """Whether nvcc compiles the kernels on this machine; without it NVRTC does."""
    try:
        toolkit.find_nvcc()
    except EngineError:
        return False
    return True


def source_ptx(source: str, architecture: str) -> str:
    """PTX of a translation unit, by nvcc or, where there is none, by NVRTC.

    Raises:
        InputError: unknown architecture.
        EngineError: neither compiler, or it refuses the source.
    """
    if not has_nvcc():
        return compile_source(source, architecture).ptx
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quick.cu")
        path.write_text(source)
        return ptx_text(path, architecture)


def entry_names(ptx: str) -> list[str]:
    """Names of the kernels in PTX."""
    return re.findall(r"^\.visible \.entry (\w+)\(", ptx, re.M)
