"""Where the CUDA toolkit's nvcc is: what the environment names, the PATH, its usual folders."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..core.errors import EngineError

TOOLKITS = Path("/usr/local")
"""NVIDIA's packages install to `cuda-13.0` and the like below it, and put nothing on the PATH."""
_VARIABLES = ("CUDA_HOME", "CUDA_PATH")


def find_nvcc() -> Path:
    """The CUDA compiler.

    Looked for in CUDA_HOME and CUDA_PATH, then on the PATH, then in `/usr/local/cuda*/bin`, the
    newest release first.

    Raises:
        EngineError: it is in none of them; the message names each.
    """
    homes = _named()
    for _, home in homes:
        if there := _in(Path(home, "bin")):
            return there
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    for folder in _installed():
        if there := _in(folder / "bin"):
            return there
    looked = [f"{name} ({Path(home, 'bin')})" for name, home in homes]
    raise EngineError(
        f"no nvcc in {', '.join([*looked, 'the PATH'])} or {TOOLKITS}/cuda*/bin, which builds the "
        "kernels: install the CUDA toolkit 12.8 or later, or set CUDA_HOME to the folder that "
        "holds bin/nvcc"
    )


def toolkit_folders() -> list[Path]:
    """Folders of CUDA toolkits: those that the environment names, then the installed ones."""
    return [*(Path(home) for _, home in _named()), *_installed()]


def _named() -> list[tuple[str, str]]:
    return [(name, os.environ[name]) for name in _VARIABLES if os.environ.get(name)]


def _in(folder: Path) -> Path | None:
    found = shutil.which("nvcc", path=str(folder))
    return None if found is None else Path(found)


def _installed() -> list[Path]:
    """Folders of toolkits, the newest first; `cuda`, which names one of them, at the end."""

    def release(folder: Path) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", folder.name))

    return sorted(TOOLKITS.glob("cuda*"), key=release, reverse=True)
