"""The Triton server's own virtual environment: where it is, what it must hold, how to make it.

The server comes from the `nvidia-pytriton` wheel, which carries the real `tritonserver` with its
Python backend. It needs NumPy 1 (with NumPy 2 its Python models answer empty arrays), so it never
shares an environment with this library.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..child_process import run_python
from ..core.errors import EngineError

DEFAULT_FOLDER = Path(".triton-server")
WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"
# Where this library's own environment has one of these, the server gets the same version, so that
# local and served masks are computed by the same code.
_FALLBACKS = {"onnxruntime": "1.23.2", "pillow": "11.3.0"}
# MedSAM's preprocessing; always there, so that nobody has to know the mode before installing.
_SCIKIT_IMAGE = "scikit-image>=0.24,<0.27"

_INSPECT = """
import importlib.util, json, sys, sysconfig
def at(name):
    found = importlib.util.find_spec(name)
    return found and found.submodule_search_locations and found.submodule_search_locations[0]
numpy = at("numpy") and __import__("numpy").__version__
print(json.dumps({"wheel": at("pytriton"), "numpy": numpy, "onnxruntime": at("onnxruntime"),
    "PIL": at("PIL"), "skimage": at("skimage"), "libdir": sysconfig.get_config_var("LIBDIR"),
    "python": "%d.%d" % sys.version_info[:2]}))
"""


@dataclass(frozen=True)
class ServerEnvironment:
    """A checked server environment.

    Attributes:
        folder: the virtual environment.
        root: the wheel's `tritonserver` folder.
        stub: the Python backend's process for this Python version.
        library_path: folders for LD_LIBRARY_PATH.
    """

    folder: Path
    root: Path
    stub: Path
    library_path: tuple[Path, ...]

    @property
    def binary(self) -> Path:
        """The server's executable."""
        return self.root / "bin" / "tritonserver"


def install_hint(folder: Path) -> str:
    """The command that makes the environment."""
    place = "" if folder == DEFAULT_FOLDER else f" --server-env {folder}"
    return f"python -m dbsam_deploy.serve --install{place}"


def find_environment(folder: Path = DEFAULT_FOLDER, *, medsam: bool = False) -> ServerEnvironment:
    """Check the server environment in `folder`.

    Args:
        folder: virtual environment made by `install_environment`.
        medsam: the repository uses MedSAM's preprocessing, which needs scikit-image.

    Raises:
        EngineError: not Linux, or it is missing, incomplete, with NumPy 2 or no fitting stub.
    """
    _check_system()
    python = folder / "bin" / "python3"
    if not python.is_file():
        raise EngineError(
            f"no Triton server environment in {folder}: run `{install_hint(folder)}` "
            "(about 550 MB on disk), or name another one with --server-env"
        )
    try:
        found = json.loads(run_python(["-I", "-c", _INSPECT], python=str(python)).output)
    except (EngineError, ValueError) as error:
        raise EngineError(
            f"the Python in {folder} does not run ({error}): delete the folder and run "
            f"`{install_hint(folder)}`"
        ) from error
    needed = {"wheel": WHEEL, "numpy": NUMPY, "onnxruntime": "onnxruntime", "PIL": "pillow"}
    if medsam:
        needed["skimage"] = "scikit-image"
    missing = [package for key, package in needed.items() if not found[key]]
    if missing:
        raise EngineError(
            f"the server environment {folder} lacks {', '.join(missing)}: run "
            f"`{install_hint(folder)}`"
        )
    if int(found["numpy"].split(".")[0]) >= 2:
        raise EngineError(
            f"the server environment {folder} has numpy {found['numpy']}, with which Triton's "
            f"Python models return empty arrays: run `{python} -m pip install '{NUMPY}'`"
        )
    root = Path(found["wheel"]) / "tritonserver"
    stub = root / "python_backend_stubs" / found["python"] / "triton_python_backend_stub"
    if not stub.is_file():
        raise EngineError(
            f"{WHEEL} has no Python backend for Python {found['python']} ({folder}): make the "
            "environment with Python 3.11 or 3.12"
        )
    libraries = (root.parent.parent / "nvidia_pytriton.libs", Path(found["libdir"]))
    return ServerEnvironment(folder, root, stub, libraries)


def install_environment(
    folder: Path = DEFAULT_FOLDER,
    *,
    report: Callable[[str], None] = print,
) -> ServerEnvironment:
    """Make the server environment in `folder`, or complete the one that is there.

    Args:
        folder: virtual environment to make; an existing folder that is not one is refused.
        report: gets one line for each step.

    Raises:
        EngineError: another operating system or Python, no `venv`, or pip failed.
    """
    _check_system()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise EngineError(
            f"the server needs NumPy 1, which Python {platform.python_version()} cannot have: run "
            "this with Python 3.11 or 3.12"
        )
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        raise EngineError(f"{folder} exists and is not a virtual environment: name another folder")
    python = folder / "bin" / "python3"
    if not python.is_file():
        report(f"[1/3] virtual environment in {folder}")
        _call(sys.executable, ["-P", "-m", "venv", str(folder)], "making the virtual environment")
    else:
        report(f"[1/3] virtual environment in {folder}: there already")
    packages = [NUMPY, *(f"{name}=={_version(name)}" for name in _FALLBACKS), _SCIKIT_IMAGE]
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    report(f"[2/3] pip install {' '.join(packages)}")
    _call(str(python), [*pip, *packages], "installing the server's packages")
    report(f"[3/3] pip install --no-deps {WHEEL}   (145 MB, the Triton server itself)")
    _call(str(python), [*pip, "--no-deps", WHEEL], f"installing {WHEEL}")
    environment = find_environment(folder, medsam=True)
    report(f"ready: {environment.binary}")
    return environment


def _check_system() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EngineError(
            f"the Triton wheel runs on Linux x86-64, not {sys.platform} {platform.machine()}: use "
            "the container instead (python -m dbsam_deploy.serve --docker)"
        )


def has_gpu_driver() -> bool:
    """Whether this machine has an NVIDIA driver, so that the container is the better server."""
    return shutil.which("nvidia-smi") is not None


def _version(package: str) -> str:
    """The version installed beside this library, so that both sides compute alike."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _FALLBACKS[package]


def _call(python: str, arguments: list[str], what: str) -> None:
    ended = run_python(arguments, python=python)
    if ended.status:
        command = " ".join([python, *arguments])
        raise EngineError(f"{what} failed: {ended.reason()} (command: {command})")
