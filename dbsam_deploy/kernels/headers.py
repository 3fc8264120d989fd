"""TensorRT's C++ headers: found, and those taken that match the TensorRT that runs the plugins."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..core.errors import EngineError, InputError
from ..extras import HEADERS_LINE, headers_line

HEADER = "NvInferRuntime.h"
VARIABLE = "TENSORRT_INCLUDE_DIR"
OLDEST_MAJOR = 10
"""The first with IPluginV3."""
_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_FETCHED = Path("build")
"""Where `headers_line` puts what it gets."""
_OF_ARCHIVES = ("/usr/local", "/opt")
"""Where containers and users unpack TensorRT's archive."""


@dataclass(frozen=True)
class Headers:
    """TensorRT's C++ headers.

    Attributes:
        folder: holds NvInferRuntime.h.
        version: "10.14.1".
    """

    folder: Path
    version: str


def installed_tensorrt() -> str:
    """Version of the TensorRT in this Python ("11.4.0.106"), "" without one; imports nothing."""
    for name in _PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def find_headers(given: Path | None = None, runtime: str | None = None) -> Headers:
    """Find the headers that match a TensorRT.

    Args:
        given: the only folder to look into; by default that of TENSORRT_INCLUDE_DIR, or else what
            `headers_line` got, the system's, those of unpacked archives, the `kernel-lens` wheel's.
        runtime: version of the TensorRT that is to run what is compiled ("11.4"); by default the
            one installed here. "" for any, where the first headers found are taken.

    Raises:
        InputError: `runtime` is no version.
        EngineError: there are none, none of the runtime's major version, or they are from before
            TensorRT 10, which has no IPluginV3.
    """
    wanted = installed_tensorrt() if runtime is None else runtime
    if not re.fullmatch(r"(\d+\.\d+.*)?", wanted):
        raise InputError(f"TensorRT {wanted!r}: expected a version such as 11.4")
    named = os.environ.get(VARIABLE)
    if given is None and named:
        given = Path(named)
    folders = [given] if given is not None else list(_usual_folders())
    found = [folder for folder in folders if (folder / HEADER).is_file()]
    if not found:
        where = f"in {given}" if given is not None else "on this machine"
        raise EngineError(f"no TensorRT headers ({HEADER}) {where}: {headers_help(wanted)}")
    headers = [Headers(folder.resolve(), _version(folder, wanted)) for folder in found]
    return _matching(headers, wanted) if wanted else _new_enough(headers[0], wanted)


def headers_help(runtime: str) -> str:
    """What to do about missing headers; `runtime` as for `find_headers`."""
    line = headers_line(runtime) if runtime else HEADERS_LINE
    which = f"those of TensorRT {runtime}" if runtime else "TensorRT 10.14's"
    return (
        f"get {which}: `{line}`; or give --tensorrt-include DIR or set {VARIABLE} to the `include` "
        "folder of TensorRT's archive; or `apt install libnvinfer-headers-dev`"
    )


def numbers_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version, 0 for what it lacks.

    >>> numbers_of("11.4.0.106"), numbers_of("10")
    ((11, 4), (10, 0))
    """
    parts = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return (*parts, 0, 0)[0], (*parts, 0, 0)[1]


def _matching(headers: list[Headers], runtime: str) -> Headers:
    """Of the runtime's major version, the nearest that is not newer; else the nearest newer one."""
    major, minor = numbers_of(runtime)
    same = [one for one in headers if numbers_of(one.version)[0] == major]
    if not same:
        there = ", ".join(f"{one.version} in {one.folder}" for one in headers)
        raise EngineError(
            f"the TensorRT headers here are {there}, and a plugin library of another major version "
            f"does not run in TensorRT {runtime}: {headers_help(runtime)}; for another TensorRT "
            "than this one, give --tensorrt VERSION"
        )

    def distance(one: Headers) -> tuple[bool, int]:
        own = numbers_of(one.version)[1]
        return own > minor, abs(own - minor)

    return _new_enough(min(same, key=distance), runtime)


def _new_enough(headers: Headers, runtime: str) -> Headers:
    if numbers_of(headers.version)[0] < OLDEST_MAJOR:
        raise EngineError(
            f"the TensorRT headers in {headers.folder} are of version {headers.version}, expected "
            f"{OLDEST_MAJOR} or later: {headers_help(runtime)}"
        )
    return headers


def _usual_folders() -> Iterable[Path]:
    yield from sorted(_FETCHED.glob("tensorrt-*/include"), reverse=True)
    system = Path("/usr/include")
    yield from (system / f"{platform.machine()}-linux-gnu", system)
    for place in _OF_ARCHIVES:
        for pattern in ("tensorrt*", "TensorRT*"):
            yield from sorted(Path(place).glob(f"{pattern}/include"), reverse=True)
    wheel = importlib.util.find_spec("kernel_lens")
    for name in (wheel.submodule_search_locations or []) if wheel else []:
        yield from sorted(path.parent for path in Path(name).rglob(HEADER))


def _version(folder: Path, runtime: str) -> str:
    """Version that NvInferVersion.h defines, through one level of names.

    Raises:
        EngineError: it defines none.
    """
    path = folder / "NvInferVersion.h"
    text = path.read_text(errors="replace") if path.is_file() else ""
    names: dict[str, str] = dict(re.findall(r"^#define (\w+) (\w+)", text, re.M))
    values = [names.get(f"NV_TENSORRT_{p}", "") for p in ("MAJOR", "MINOR", "PATCH")]
    parts = [names.get(value, value) for value in values]
    if not all(part.isdigit() for part in parts):
        raise EngineError(f"{path} does not say TensorRT's version: {headers_help(runtime)}")
    return ".".join(parts)
