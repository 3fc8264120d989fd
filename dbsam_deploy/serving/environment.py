"""The Triton server's own virtual environment: where it is, what it must hold, how to make it.

The server comes from the `nvidia-pytriton` wheel, which carries the real `tritonserver` with its
Python backend. It needs NumPy 1 (with NumPy 2 its Python models answer empty arrays), so it never
shares an environment with this library. In NVIDIA's container it is NVIDIA's own installation,
with all backends, and this library's Python.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EngineError
from ..machine.child_process import run_python

DEFAULT_FOLDER = Path(".triton-server")
WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"
# scikit-image is MedSAM's preprocessing; there so that nobody has to know the mode beforehand.
SERVER_PACKAGES = (NUMPY, "onnxruntime==1.32.0", "pillow==13.0.0", "scikit-image==0.26.0")
OPENVINO = "openvino==2026.4.1"
"""Installed only where it is asked for: 180 MB. What it needs besides NumPy sends usage data."""
PYTHONS = ("3.11", "3.12")
LOCK = Path(__file__).with_name("server-requirements.txt")
"""Version and SHA-256 of every file that pip may install for all of these."""
# Where this library's own environment has one of these, the server gets the same version, so that
# local and served masks are computed by the same code.
_SHARED = ("onnxruntime", "openvino", "pillow")

_INSPECT = """
import importlib.metadata, importlib.util, json, sys, sysconfig
def at(name):
    found = importlib.util.find_spec(name)
    return found and found.submodule_search_locations and found.submodule_search_locations[0]
numpy = at("numpy") and __import__("numpy").__version__
print(json.dumps({"wheel": at("pytriton"), "numpy": numpy, "onnxruntime": at("onnxruntime"),
    "PIL": at("PIL"), "skimage": at("skimage"), "libdir": sysconfig.get_config_var("LIBDIR"),
    "openvino": at("openvino") and importlib.metadata.version("openvino"),
    "python": "%d.%d" % sys.version_info[:2]}))
"""


@dataclass(frozen=True)
class ServerEnvironment:
    """A checked server environment.

    Attributes:
        folder: the virtual environment, or NVIDIA's installation.
        root: the folder with `bin/tritonserver`.
        stub: the Python backend's process for this Python version.
        library_path: folders for LD_LIBRARY_PATH.
        is_installation: NVIDIA's, with its own backends; else this library's stand-ins serve.
        openvino: version of the OpenVINO that is installed in it, "" without one.
    """

    folder: Path
    root: Path
    stub: Path
    library_path: tuple[Path, ...]
    is_installation: bool = False
    openvino: str = ""

    @property
    def binary(self) -> Path:
        """The server's executable."""
        return self.root / "bin" / "tritonserver"


def install_hint(folder: Path, *, openvino: bool = False) -> str:
    """The command that makes the environment."""
    backend = " --backend openvino" if openvino else ""
    place = "" if folder == DEFAULT_FOLDER else f" --server-env {folder}"
    return f"python -m dbsam_deploy.serve --install{backend}{place}"


def check_openvino(environment: ServerEnvironment) -> None:
    """Check that a server has the OpenVINO of this Python, which compiles what it runs.

    Raises:
        EngineError: none, or another version; or NVIDIA's server, which has backends of its own.
    """
    if environment.is_installation:
        raise EngineError(
            f"OpenVINO is for the server on a CPU machine; {environment.folder} is NVIDIA's, which "
            "runs what the repository says: drop --backend"
        )
    hint = install_hint(environment.folder, openvino=True)
    if not environment.openvino:
        raise EngineError(
            f"the server environment {environment.folder} lacks openvino: run `{hint}` (180 MB)"
        )
    mine = importlib.metadata.version("openvino")
    if environment.openvino != mine:
        raise EngineError(
            f"the server environment {environment.folder} has openvino {environment.openvino}, and "
            f"this Python {mine}, which cannot compile for it: run `{hint}`"
        )


def find_environment(
    folder: Path = DEFAULT_FOLDER, *, medsam: bool = False, openvino: bool = False
) -> ServerEnvironment:
    """Check the server environment in `folder`.

    Args:
        folder: virtual environment made by `install_environment`, or an installation of NVIDIA's
            (`/opt/tritonserver`).
        medsam: the repository uses MedSAM's preprocessing, which needs scikit-image.
        openvino: where an installation is advised, it is one with OpenVINO; see `check_openvino`.

    Raises:
        EngineError: not Linux, or it is missing, incomplete, with NumPy 2 or no fitting stub.
    """
    if (folder / "bin" / "tritonserver").is_file():
        return _installation(folder, medsam=medsam)
    _check_system()
    python, hint = folder / "bin" / "python3", install_hint(folder, openvino=openvino)
    if not python.is_file():
        raise EngineError(
            f"no Triton server environment in {folder}: run `{hint}` "
            f"(about {730 if openvino else 550} MB on disk), or name another one with --server-env"
        )
    try:
        found = json.loads(run_python(["-I", "-c", _INSPECT], python=str(python)).output)
    except (EngineError, ValueError) as error:
        raise EngineError(
            f"the Python in {folder} does not run ({error}): delete the folder and run `{hint}`"
        ) from error
    needed = {"wheel": WHEEL, "numpy": NUMPY, "onnxruntime": "onnxruntime", "PIL": "pillow"}
    if medsam:
        needed["skimage"] = "scikit-image"
    missing = [package for key, package in needed.items() if not found[key]]
    if missing:
        names = ", ".join(missing)
        raise EngineError(f"the server environment {folder} lacks {names}: run `{hint}`")
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
    return ServerEnvironment(folder, root, stub, libraries, openvino=found.get("openvino") or "")


def _installation(folder: Path, *, medsam: bool) -> ServerEnvironment:
    """NVIDIA's own server, whose Python models run with the packages of this process."""
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    if not stub.is_file():
        raise EngineError(
            f"{folder} has tritonserver and no Python backend: take an image with all backends "
            "(its tag ends with -py3)"
        )
    if medsam and importlib.util.find_spec("skimage") is None:
        raise EngineError(
            "this Python lacks scikit-image, which the repository's preprocessing (medsam) needs: "
            "build the image with deployment/Dockerfile"
        )
    return ServerEnvironment(folder, folder, stub, (), is_installation=True)


def install_environment(
    folder: Path = DEFAULT_FOLDER,
    *,
    openvino: bool = False,
    report: Callable[[str], None] = print,
) -> ServerEnvironment:
    """Make the server environment in `folder`, or complete the one that is there.

    Args:
        folder: virtual environment to make; an existing folder that is not one is refused.
        openvino: with OpenVINO.
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
    locked = locked_requirements(openvino=openvino)
    others = _other_versions(locked)
    known = [text for name, text in locked.items() if name not in {*others, _name(WHEEL)}]
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    packages = (*SERVER_PACKAGES, OPENVINO) if openvino else SERVER_PACKAGES
    report(f"[2/3] pip install {' '.join(packages)}   (every file by its SHA-256)")
    _install_locked(python, known, "installing the server's packages")
    if others:
        versions = [f"{name}=={version}" for name, version in others.items()]
        report(
            f"      pip install {' '.join(versions)}   (this environment's versions, which were "
            "not tested and are taken without a known SHA-256)"
        )
        _call(str(python), [*pip, *versions, NUMPY], "installing this environment's versions")
    report(f"[3/3] pip install --no-deps {WHEEL}   (145 MB, the Triton server itself)")
    _install_locked(python, [locked[_name(WHEEL)]], f"installing {WHEEL}")
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


def locked_requirements(*, openvino: bool = True) -> dict[str, str]:
    """Package → its lines in `LOCK`: exact version and the hashes of its files.

    Args:
        openvino: with it.
    """
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    entries = "\n".join(lines).replace("\\\n", " ").splitlines()
    found = {_name(entry): " ".join(entry.split()) for entry in entries}
    return {name: text for name, text in found.items() if openvino or name != _name(OPENVINO)}


def _other_versions(locked: dict[str, str]) -> dict[str, str]:
    """Shared package → version installed beside this library, where that is not the locked one."""
    found = {}
    for name in _SHARED:
        if name not in locked:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not locked[name].startswith(f"{name}=={version} "):
            found[name] = version
    return found


def _name(requirement: str) -> str:
    return requirement.split("==")[0]


def _install_locked(python: Path, requirements: list[str], what: str) -> None:
    """Install exactly these files; pip refuses any other, and looks for nothing beside them."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(requirements) + "\n")
        pip = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        _call(str(python), [*pip, "--require-hashes", "-r", str(listed)], what)


def _call(python: str, arguments: list[str], what: str) -> None:
    ended = run_python(arguments, python=python)
    if ended.status:
        command = " ".join([python, *arguments])
        raise EngineError(f"{what} failed: {ended.reason()} (command: {command})")
