"""What messages tell users to install is what pyproject.toml offers."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dbsam_deploy import extras
from dbsam_deploy.core.errors import MissingError
from dbsam_deploy.core.resizing import SCIKIT_IMAGE_LINE
from dbsam_deploy.extras import EXTRAS, Extra, find_extra, pip_line, quoted, require

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dbsam_deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OFFERED: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = {"docs", "test", "dev"}
SEVERAL = {"all", *OURS}
OF_A_MACHINE = {"gpu", "nvrtc", "rtx", "modelopt", "cluster"}
"""Extras that need NVIDIA's hardware, an environment of their own, or several machines."""
PIP_ELSEWHERE = {
    "core/resizing.py": {"scikit-image"},  # a copy of this room is alone in Triton's models
    "kernels/plugin_build.py": {"cmake"},  # a program
    "validation/engine_checks.py": {"cmake"},
    "serve.py": {"--quiet"},  # inside the container
    "serving/environment.py": {"--no-deps", "{"},  # the server's own environment
}
"""Module → the packages it may install without `extras`."""
TRIES_ITSELF = {
    "extras.py",  # the helper
    "core/resizing.py",  # stands alone
    "files/atomic.py",  # Windows has no fcntl
    "quantization/modelopt_worker.py",  # run by other Pythons
    "kernels/plugin_registry.py",  # takes the first of three TensorRTs
}
"""Modules that may catch an ImportError."""


def test_every_extra_is_listed_once() -> None:
    assert [extra.name for extra in EXTRAS] == list(dict.fromkeys(e.name for e in EXTRAS))
    assert {extra.name for extra in EXTRAS} == set(OFFERED) - SEVERAL


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.name)
def test_an_extra_installs_what_it_says(extra: Extra) -> None:
    included = [f"dbsam-deploy[{','.join(extra.includes)}]"] if extra.includes else []
    assert [*extra.requirements, *included] == OFFERED[extra.name]


def test_all_is_every_extra_that_any_machine_can_have() -> None:
    (line,) = OFFERED["all"]
    named = set(line.removeprefix("dbsam-deploy[").removesuffix("]").split(","))
    assert named == set(OFFERED) - SEVERAL - OF_A_MACHINE


def test_the_base_is_small() -> None:
    names = {re.split(r"\W", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"numpy", "pillow", "rich"}


def test_constraints_pin_every_direct_dependency_that_a_plain_machine_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    direct = [*PROJECT["dependencies"]]
    for name, requirements in OFFERED.items():
        direct += [] if name in OF_A_MACHINE else requirements
    names = {re.split(r"[^\w-]", line)[0] for line in direct} - {"dbsam-deploy"}
    assert names - set(pins) == set()


def test_every_line_names_an_extra_and_comes_from_here() -> None:
    named, strays = set(), []
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        named |= set(re.findall(r"pip_line\(\s*['\"]([\w-]+)", text))
        named |= set(re.findall(r"\bextra=['\"]([\w-]+)", text))
        assert "dbsam-deploy[" not in text or name == "extras.py", name
        if name == "extras.py":
            continue
        found = re.findall(r"pip install [\"']?([\w-]+|\{)", text)
        strays += [f"{name}: {one}" for one in found if one not in PIP_ELSEWHERE.get(name, set())]
    assert strays == []
    assert {"cpu", "export", "nifti"} <= named <= set(OFFERED)


def test_the_line_in_core_is_the_extra_for_it() -> None:
    assert f'pip install "{find_extra("medsam").requirements[0]}"' == SCIKIT_IMAGE_LINE


def test_no_room_imports_an_optional_package_in_a_way_of_its_own() -> None:
    """`try: import` with a message of its own is what `require` is there for."""
    own = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and "ImportError" in ast.dump(node):
                own.append(path.relative_to(PACKAGE).as_posix())
    assert set(own) <= TRIES_ITSELF


def test_in_a_checkout_the_line_installs_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert pip_line("nifti") == 'pip install -c constraints.txt -e ".[nifti]"'
    monkeypatch.chdir(ROOT.parent)
    line = pip_line("gpu", "tensorrt<11")
    constraints = os.path.join(ROOT, "constraints.txt")
    assert line == f'pip install -c {quoted(constraints)} -e "{ROOT}[gpu]" "tensorrt<11"'


def test_from_a_wheel_the_line_installs_what_the_extra_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "_ROOT", tmp_path)
    assert pip_line("nifti") == 'pip install "nibabel>=5.2"'
    training = pip_line("train", "tensorrt<11")
    for line in ("accelerate>=1.6", "monai>=1.4", "segment-anything==1.0", "tensorrt<11"):
        assert training.count(f'"{line}"') == 1
    assert training.count("torch>=") == 1
    assert "dbsam-deploy" not in training


def test_the_line_is_one_that_pip_understands() -> None:
    """pip reads it, finds the checkout and its extra, and would install it; nothing is fetched."""
    line = pip_line("nifti").removeprefix("pip install ").replace("-e ", "")  # that needs editables
    command = f'"{sys.executable}" -m pip install --dry-run --no-deps --no-build-isolation {line}'
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=Path.cwd(), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Would install dbsam-deploy" in result.stdout
    assert "does not provide the extra" not in result.stderr


def test_words_are_quoted_for_every_shell() -> None:
    assert doctest.testmod(extras).failed == 0
    assert quoted("a folder/x[cpu]") == '"a folder/x[cpu]"'
    assert quoted("a$b[cpu]") == "'a$b[cpu]'"


def test_require_gives_the_module_or_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require("numpy.linalg", extra="cpu", what_for="a test").norm([3, 4]) == 5
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingError) as caught:
        require("nibabel", extra="nifti", what_for="a NIfTI file")
    assert caught.value.install == pip_line("nifti")
    (tmp_path / "absent_half.py").write_text("import no_such_package\n")
    (tmp_path / "broken_half.py").write_text("raise OSError('libx.so: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, state in (
        ("no_such_package", "is not installed"),
        ("absent_half", "does not load (No module named 'no_such_package')"),
        ("broken_half", "does not load (libx.so: no such file)"),
    ):
        with pytest.raises(MissingError) as caught:
            require(name, extra="nifti", what_for="a NIfTI file")
        assert caught.value.what == f"a NIfTI file needs {name}, which {state}"
