"""The wheel holds what it should, and wheel and checkout run the same commands."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_PACKAGES = {"onnxruntime-gpu", "tensorrt", "pycuda"}
EXTRAS = (
    "onnxruntime",
    "openvino",
    "modelopt",
    "onnx_graphsurgeon",
    "onnxslim",
    "lief",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_lean",
    "tensorrt_bindings",
    "kernel_lens",
    "pycuda",
    "tritonclient",
    "nibabel",
    "pydicom",
    "skimage",
    "scipy",
    "monai",
    "accelerate",
    "tensorboard",
    "matplotlib",
    "jinja2",
    "surface_distance",
    "pytest",
)

IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

BLOCKED = set(sys.argv[1:])
sys.meta_path.insert(0, Block())
import dbsam_deploy
names = [m.name for m in pkgutil.walk_packages(dbsam_deploy.__path__, "dbsam_deploy.")]
for name in names:
    importlib.import_module(name)
blocked = sorted(name for name in sys.modules if name.partition(".")[0] in BLOCKED)
assert not blocked, blocked
print(len(names), dbsam_deploy.__path__[0])
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
    assert by_extra["cpu"] == {"onnxruntime"}
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


def test_every_module_imports_without_any_extra(installed: Path) -> None:
    count, where = _checked("-c", IMPORT_ALL, *EXTRAS, **_at(installed)).split(maxsplit=1)
    assert Path(where.strip()).is_relative_to(installed)
    modules = [p for p in (ROOT / "dbsam_deploy").glob("*.py") if p.stem != "__init__"]
    assert int(count) >= len(modules) > 0


def test_the_import_check_notices_an_extra(tmp_path: Path) -> None:
    package = tmp_path / "dbsam_deploy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "greedy.py").write_text("import nibabel\n")
    result = _run("-c", IMPORT_ALL, *EXTRAS, cwd=tmp_path, path=tmp_path)
    assert result.returncode != 0
    assert "nibabel" in result.stderr
