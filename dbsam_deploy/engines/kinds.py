"""The two kinds of engine: what each is imported as, its oldest version, and how to install it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ..core.choices import choose
from ..core.errors import EngineError
from ..extras import pip_line, require


@dataclass(frozen=True)
class Kind:
    """One builder and runtime.

    Attributes:
        name: as on the command line and in a manifest.
        title: as its vendor writes it.
        module: what Python imports.
        oldest: oldest version (major, minor) whose interface and networks are ours.
        extra: extra of this package that installs it.
        ahead_of_time: builds for GPUs that are not there, and for several at once.
        takes_plugins: runs our fused operators as plugins.
        captures: its runtime captures CUDA graphs by itself.
    """

    name: str
    title: str
    module: str
    oldest: tuple[int, int]
    extra: str
    ahead_of_time: bool = False
    takes_plugins: bool = False
    captures: bool = False

    @property
    def install(self) -> str:
        """The command that installs it."""
        return pip_line(self.extra)


TENSORRT = Kind(
    "tensorrt",
    "TensorRT",
    "tensorrt",
    # 10.16 is the first release whose networks, like those of 11, take precision from the graph
    # alone and whose runtime interface is that of 11.
    oldest=(10, 16),
    extra="gpu",
    takes_plugins=True,
)
TENSORRT_RTX = Kind(
    "tensorrt-rtx",
    "TensorRT-RTX",
    "tensorrt_rtx",
    oldest=(1, 7),
    extra="rtx",
    ahead_of_time=True,
    captures=True,
)
KINDS = {kind.name: kind for kind in (TENSORRT, TENSORRT_RTX)}


def kind_named(name: str) -> Kind:
    """The kind called `name`.

    Raises:
        InputError: there is none.
    """
    return choose("engine", name, KINDS)


def import_kind(kind: Kind) -> Any:
    """The kind's module.

    Raises:
        MissingError: it is not installed or cannot be loaded.
        EngineError: it is too old.
    """
    module = require(kind.module, extra=kind.extra, what_for=f"an engine of {kind.title}")
    check_version(kind, str(module.__version__))
    return module


def check_version(kind: Kind, version: str) -> None:
    """Refuse a version older than the kind's oldest.

    Raises:
        EngineError: it is older, or is no version.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < kind.oldest:
        oldest = ".".join(map(str, kind.oldest))
        raise EngineError(
            f"{kind.title} {version} is installed, and {oldest} or newer is needed: "
            f"{kind.install} --upgrade"
        )


def cuda_of(kind: Kind) -> str:
    """CUDA major version of the installed package, from its name (`…-cu13`); "" if it has none."""
    names: Iterable[str] = metadata.packages_distributions().get(kind.module, [])
    for name in names:
        for line in [name, *(metadata.requires(name) or ())]:
            if found := re.search(r"[-_]cu(\d+)", line):
                return found.group(1)
    return ""
