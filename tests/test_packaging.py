"""The wheel holds what it should, and wheel and checkout run the same commands."""

import email
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dbsam_deploy.extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
CUDA_PACKAGES = {"onnxruntime-gpu", "tensorrt", "pycuda"}
OPTIONAL = (
    *{module.partition(".")[0] for extra in EXTRAS for module in extra.modules},
    *("onnx_graphsurgeon", "onnxslim", "lief", "tensorrt_lean", "tensorrt_bindings"),
    *("kernel_lens", "surface_distance", "pytest"),
)
"""Packages that a plain installation has not."""
NEEDS_EXPORT = re.compile(
    r"model|graphs|fusions|files\.onnx_(files|stream)|quantization|training|export|train|sensitivity|kernels\.(torch_ops|references)"
    r"|viewer\.(application|page)|verification\.sam_files"
    r"|engines\.layers|sessions\.(fused_|cuda_graphs|cpu_graph|float_head|openvino_session)"
)
"""Modules that work on weights or graphs; all others load in a plain installation."""

IMPORT_ALL = """
import importlib, importlib.abc, pathlib, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

BLOCKED = set(sys.argv[1:])
sys.meta_path.insert(0, Block())
import dbsam_deploy, dbsam_deploy.core.errors
names = [
    ".".join(("dbsam_deploy", *path.relative_to(root).with_suffix("").parts))
    for root in map(pathlib.Path, dbsam_deploy.__path__)
    for path in sorted(root.rglob("*.py"))
    if path.name != "__init__.py" and (path.parent / "__init__.py").is_file()
]
refused = []
for name in names:
    try:
        importlib.import_module(name)
    except (ImportError, dbsam_deploy.core.errors.MissingError) as error:
        refused.append(name.removeprefix("dbsam_deploy."))
blocked = sorted(name for name in sys.modules if name.partition(".")[0] in BLOCKED)
assert not blocked, blocked
print(len(names), dbsam_deploy.__path__[0], *refused)
"""


def _run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python on `command`; `path` is where it looks for packages first."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def _checked(*command: str, cwd: Path, path: Path | None = None) -> str:
    result = _run(*command, cwd=cwd, path=path)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline with the hatchling of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    _checked(*build, str(ROOT), cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed alone into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(folder))
    _checked("-m", "pip", "install", *options, str(wheel), cwd=folder)
    return folder


def _committed(folder: Path) -> set[str]:
    """Files of `folder` relative to it, without what Python leaves behind."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    assert {root.split("-")[0] for root in roots} == {"dbsam_deploy"}
    assert [name for name in names if re.search(r"(^|/)(tests?|benchmarks)/|conftest", name)] == []
    assert [name for name in names if name.endswith((".pyc", ".plan", ".onnx", ".pt"))] == []
    assert "dbsam_deploy/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("folder", ["export", "kernels", "triton_models"])
def test_the_wheel_holds_the_shared_folder(wheel: Path, folder: str) -> None:
    prefix = f"dbsam_deploy/_share/{folder}/"
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert packed == _committed(ROOT / folder)
    assert packed


def test_every_python_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    packed = {
        name.removeprefix("dbsam_deploy/")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.startswith("dbsam_deploy/") and "/_share/" not in name
    }
    assert packed == _committed(ROOT / "dbsam_deploy")


def test_a_cpu_user_never_pulls_cuda(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    by_extra: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        package = re.split(r"[^A-Za-z0-9_.-]", line)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        by_extra.setdefault(extra.group(1) if extra else "", set()).add(package)
    assert by_extra["gpu"] == CUDA_PACKAGES
    assert by_extra["cpu"] == {"onnxruntime", "onnx"}
    assert by_extra[""] == {"numpy", "pillow", "rich"}
    assert by_extra["rtx"] == {"tensorrt-rtx-cu13", "pycuda"}
    on_a_gpu = ("gpu", "rtx")
    others = set().union(*(names for extra, names in by_extra.items() if extra not in on_a_gpu))
    assert not others & CUDA_PACKAGES
    # The extras that name this package again must not lead to `gpu`.
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert not [
        line for lines in optional.values() for line in lines if re.search(r"\[.*(gpu|rtx)", line)
    ]


def test_the_installed_wheel_runs_the_export_command(installed: Path) -> None:
    where = _checked("-c", "import dbsam_deploy; print(dbsam_deploy.__file__)", **_at(installed))
    assert Path(where.strip()).is_relative_to(installed)
    assert "--precision" in _checked("-m", "dbsam_deploy.export", "--help", **_at(installed))


def test_the_installed_wheel_finds_its_folders(installed: Path) -> None:
    code = (
        "from dbsam_deploy.resources import resource_dir\n"
        "for name in ('export', 'kernels', 'triton_models'): print(resource_dir(name))"
    )
    for line in _checked("-c", code, **_at(installed)).splitlines():
        assert Path(line).is_relative_to(installed / "dbsam_deploy" / "_share")


def _at(installed: Path) -> dict[str, Path]:
    """Run outside the checkout, with the installed wheel first on the path."""
    return {"cwd": installed, "path": installed}


def test_a_plain_checkout_runs_the_export_command() -> None:
    assert "--precision" in _checked("-m", "dbsam_deploy.export", "--help", cwd=ROOT)


def test_every_module_imports_without_any_extra_or_works_on_weights(installed: Path) -> None:
    count, where, *refused = _checked("-c", IMPORT_ALL, *OPTIONAL, **_at(installed)).split()
    assert Path(where).is_relative_to(installed)
    assert int(count) == len([p for p in _modules() if p.stem != "__init__"]) > 0
    assert [name for name in refused if not NEEDS_EXPORT.match(name)] == []
    assert {"export", "model.weights", "training.loop", "sessions.fused_session"} <= set(refused)


def test_the_import_check_notices_an_extra(tmp_path: Path) -> None:
    package = tmp_path / "dbsam_deploy"
    (package / "core").mkdir(parents=True)
    for file in ("__init__.py", "core/__init__.py"):
        (package / file).write_text("")
    (package / "core" / "errors.py").write_text("class MissingError(Exception): ...\n")
    (package / "greedy.py").write_text("import nibabel\n")
    (package / "quiet.py").write_text("")
    words = _checked("-c", IMPORT_ALL, *OPTIONAL, cwd=tmp_path, path=tmp_path).split()
    assert words[0] == "3"
    assert words[2:] == ["greedy"]


ELSEWHERE = """
import importlib, json, multiprocessing.shared_memory, os, pathlib, signal, subprocess, sys
import PIL.Image, numpy, numpy.lib.stride_tricks, rich.console, rich.progress, rich.table
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in ("fcntl", "grp", "pwd", "pty", "resource", "termios", "tty", "syslog"):
    sys.modules[name] = None
for module, names in ((os, ("fork", "getuid", "killpg", "register_at_fork", "sched_getaffinity",
        "setsid", "statvfs", "sysconf", "uname")), (signal, ("SIGKILL", "SIGHUP", "SIGALRM"))):
    for name in names:
        delattr(module, name)
sys.platform = "win32"  # not os.name, at which pathlib makes other paths
for name in json.load(sys.stdin):
    importlib.import_module(name)
from dbsam_deploy.clients.shared_memory import SharedRegion
from dbsam_deploy.core.errors import DbsamError
from dbsam_deploy.machine.hardware import describe_hardware, memory_gib
from dbsam_deploy.serving.environment import find_environment, install_environment
assert memory_gib() == 0 and describe_hardware().cores > 0
for call in (lambda: SharedRegion(1), find_environment, install_environment):
    try:
        call()
    except DbsamError as error:
        print(error)
"""


def test_nothing_of_posix_is_needed_before_it_is_used() -> None:
    """Every module loads where POSIX is missing; what is Linux's alone says so in one line."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in _modules()
        if "standin_backends" not in path.parts
    ]
    others = ("torch.utils.data", "torch.func", "onnx.inliner", "onnxscript", "safetensors.torch")
    others += ("fastapi.responses", "starlette.concurrency")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            ELSEWHERE,
            "torch.utils.data",
            "torch.func",
            "onnx.inliner",
            *others,
        ],
        cwd=ROOT,
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    region, *server = result.stdout.splitlines()
    assert region.startswith("shared memory with the server works on Linux, not on win32")
    assert len(server) == 2
    assert all(line.startswith("the Triton wheel runs on Linux x86-64") for line in server)


def test_the_wheel_is_for_every_system(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith((".so", ".pyd", ".dll", ".dylib"))] == []


def test_a_python_that_is_too_old_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    """What pip does: ask what is needed, then for the metadata. Both without hatchling."""
    code = (
        "import sys; sys.version_info = (3, 10, 13, 'final', 0); sys.modules['hatchling'] = None\n"
        "import build_backend as hooks\n"
        "print(hooks.get_requires_for_build_wheel(), hooks.get_requires_for_build_editable())\n"
        f"print(hooks.prepare_metadata_for_build_wheel({str(tmp_path)!r}))\n"
    )
    requires, folder = _checked("-c", code, cwd=ROOT).splitlines()
    assert requires == "[] []"
    found = email.message_from_string((tmp_path / folder / "METADATA").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found["Name"], found["Version"]) == (project["name"], project["version"])
    assert found["Requires-Python"] == project["requires-python"] == ">=3.11"
    assert found.get_all("Provides-Extra") == list(project["optional-dependencies"])
    assert found.get_all("Requires-Dist") is None


def test_this_python_gets_all_of_hatchling() -> None:
    code = "import build_backend as hooks; print(hooks.get_requires_for_build_wheel())"
    assert _checked("-c", code, cwd=ROOT).strip() == "['hatchling>=1.27']"


def _modules() -> list[Path]:
    """Python files of the package, without those that Triton runs alone."""
    files = (ROOT / "dbsam_deploy").rglob("*.py")
    return sorted(path for path in files if (path.parent / "__init__.py").is_file())
