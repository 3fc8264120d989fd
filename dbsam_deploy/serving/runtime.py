"""The folder that a server runs from: backends, its copy of the repository, its control folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from ..core import allocation, array_guard, compiled_parts, widening
from ..core.errors import ServingError
from ..core.front import CONTROL_VARIABLE
from ..files.atomic import is_file_at, locked
from ..machine import cores, privacy
from .environment import ServerEnvironment

STANDINS = Path(__file__).parent / "standin_backends"
SHARED = tuple(
    Path(str(module.__file__))
    for module in (array_guard, allocation, compiled_parts, cores, privacy, widening)
)
"""Modules that the stand-ins import, as the front model does."""
MODELS, CONTROL = "models", "control"
"""Names in the folder: the repository's copy, and where the front looks for orders."""

# Triton passes paths to a shell and to a command line without quoting them.
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
_PLACES = ("/var/tmp", "/tmp", "/run")  # noqa: S108 - a folder of our own is made in one of them
_PREFIX, _LOCK = "dbsam-triton-", "lock"


def make_runtime() -> tuple[Path, int]:
    """A new folder for this user alone, below the system's folder for temporary files.

    Returns:
        The folder, and the handle of its lock: it is in use until that is closed.

    Raises:
        ServingError: there is no place for it whose path has only plain characters.
    """
    for place in (tempfile.gettempdir(), *_PLACES):
        if _PLAIN.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            while True:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
                handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                if locked(handle) and is_file_at(handle, folder / _LOCK):
                    return folder, handle
                os.close(handle)  # `remove_left_runtimes` of another start was quicker
    raise ServingError(
        f"no place for the server's files: the path of TMPDIR ({tempfile.gettempdir()}) has blanks "
        "or other characters that Triton does not take; set it to a plain one"
    )


def remove_left_runtimes() -> list[Path]:
    """Remove the folders of servers that were killed together with what would have done it.

    Returns:
        The folders found; another user's, and one that is in use, are left alone.
    """
    found = []
    for place in dict.fromkeys((tempfile.gettempdir(), *_PLACES)):
        for lock in Path(place).glob(f"{_PREFIX}*/{_LOCK}"):
            try:
                handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                if os.fstat(handle).st_uid == os.geteuid() and locked(handle):
                    shutil.rmtree(lock.parent, ignore_errors=True)
                    found.append(lock.parent)
            finally:
                os.close(handle)
    return found


def lay_out(environment: ServerEnvironment, folder: Path) -> None:
    """Copy the Python backend and the stand-ins; Triton refuses links that leave the folder.

    An installation has backends of its own, see `backends`.
    """
    (folder / CONTROL).mkdir(mode=0o700)
    if environment.is_installation:
        return
    python = folder / "python"
    python.mkdir()
    source = environment.root / "backends" / "python"
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(source / name, python / name)
    shutil.copy2(environment.stub, python / environment.stub.name)
    for standin in sorted(STANDINS.iterdir()):
        target = folder / standin.name
        target.mkdir()
        for file in (standin / "model.py", *SHARED):
            shutil.copyfile(file, target / file.name)
        # The others are this one with another graph or text.
        shutil.copyfile(STANDINS / "onnxruntime" / "model.py", target / "onnxruntime_standin.py")


def backends(environment: ServerEnvironment, folder: Path) -> Path:
    """Where the server finds its backends."""
    return environment.root / "backends" if environment.is_installation else folder


def server_variables(environment: ServerEnvironment, folder: Path) -> dict[str, str]:
    """Changes of the environment: the server's own libraries and interpreter."""
    ours = {
        "PYTHONSAFEPATH": "1",  # nothing is imported from the working folder
        CONTROL_VARIABLE: str(folder / CONTROL),
        # gRPC sends large answers in pieces of 1 MiB; glibc would keep them for ever.
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        **privacy.VARIABLES,
    }
    # The stub embeds an isolated Python: it reads no variable of Python's, and takes its prefix,
    # with all packages, from the first python3 on the path.
    installed = environment.is_installation
    binaries = Path(sys.executable).parent if installed else environment.folder / "bin"
    ours["PATH"] = ":".join([str(binaries.absolute()), os.environ.get("PATH", os.defpath)])
    if installed:
        return ours
    libraries = [str(path) for path in environment.library_path]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    ours["LD_LIBRARY_PATH"] = ":".join([*libraries, *([inherited] if inherited else [])])
    return ours
