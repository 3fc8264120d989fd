"""The server's environment: every way in which it can be unusable is named before the start."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.serving import environment as server_env
from dbsam_deploy.serving.environment import (
    find_environment,
    install_environment,
    install_hint,
    locked_requirements,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(tmp_path):
    """Makes an environment whose interpreter prints what it is told to."""

    def make(*, stub: bool = True, **changes) -> Path:
        folder = tmp_path / "env"
        wheel = folder / "lib" / "pytriton"
        found = {
            "wheel": str(wheel),
            "numpy": "1.26.4",
            "onnxruntime": "/x",
            "PIL": "/x",
            "skimage": None,
            "libdir": "/lib",
            "python": "3.11",
        }
        text = json.dumps(found | changes)
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin" / "python3"
        python.write_text(f"#!/bin/sh\necho '{text}'\n")
        python.chmod(0o755)
        if stub:
            path = wheel / "tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"
            path.parent.mkdir(parents=True)
            path.touch()
        return folder

    return make


def test_a_complete_environment_is_found(fake):
    folder = fake()
    environment = find_environment(folder)
    assert environment.binary == folder / "lib/pytriton/tritonserver/bin/tritonserver"
    assert environment.library_path[0] == folder / "lib/nvidia_pytriton.libs"


def test_a_missing_environment_names_the_command(tmp_path):
    with pytest.raises(EngineError, match=r"serve --install --server-env .*nowhere"):
        find_environment(tmp_path / "nowhere")
    assert install_hint(server_env.DEFAULT_FOLDER) == "python -m dbsam_deploy.serve --install"


def test_one_command_is_enough_for_openvino_too(tmp_path, fake):
    """Where nothing is installed, and where an installation is not complete."""
    command = "`python -m dbsam_deploy.serve --install --backend openvino --server-env "
    with pytest.raises(EngineError, match=re.escape(command)):
        find_environment(tmp_path / "none", openvino=True)
    with pytest.raises(EngineError, match=re.escape(command)):
        find_environment(fake(PIL=None), openvino=True)


def test_numpy_2_is_refused(fake):
    with pytest.raises(EngineError, match=r"has numpy 2\.1\.0.*empty arrays.*numpy==1\.26\.4"):
        find_environment(fake(numpy="2.1.0"))


@pytest.mark.parametrize(
    ("key", "package"),
    [("wheel", "nvidia-pytriton"), ("numpy", "numpy"), ("onnxruntime", "onnx"), ("PIL", "pillow")],
)
def test_missing_packages_are_named(fake, key, package):
    with pytest.raises(EngineError, match=f"lacks {package}"):
        find_environment(fake(**{key: None}))


def test_medsam_needs_scikit_image(fake):
    folder = fake()
    with pytest.raises(EngineError, match=r"lacks scikit-image.*--install"):
        find_environment(folder, medsam=True)


def test_a_python_without_a_stub_is_refused(fake):
    with pytest.raises(EngineError, match=r"no Python backend for Python 3\.11"):
        find_environment(fake(stub=False))


def test_a_broken_interpreter_is_refused(fake):
    folder = fake()
    (folder / "bin" / "python3").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(EngineError, match="does not run"):
        find_environment(folder)


def test_installing_never_touches_another_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(EngineError, match="not a virtual environment"):
        install_environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_installing_says_where_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EngineError, match="--docker"):
        install_environment(tmp_path / "env")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(EngineError, match=r"Python 3\.11 or 3\.12"):
        install_environment(tmp_path / "env")
    assert not (tmp_path / "env").exists()


@pytest.fixture
def pip(monkeypatch):
    """Keeps each command of an installation, and the requirements that pip would have read."""
    seen: list[tuple[list[str], str]] = []

    def call(python, arguments, what):
        listed = Path(arguments[-1])
        seen.append((arguments, listed.read_text() if listed.name == "requirements.txt" else ""))
        if "nvidia-pytriton" in seen[-1][1]:
            raise EngineError("installing failed: no matching distribution")

    monkeypatch.setattr(server_env, "_call", call)
    return seen


def test_installing_takes_only_files_whose_hash_is_known(pip, tmp_path):
    lines = []
    with pytest.raises(EngineError, match="no matching distribution"):
        install_environment(tmp_path / "env", report=lines.append)
    (venv, _), (packages, listed), (server, wheel) = pip
    assert venv[:3] == ["-P", "-m", "venv"]
    for arguments in (packages, server):
        assert {"--no-deps", "--require-hashes"} <= set(arguments)
    requirements = listed.splitlines()
    assert any(line.startswith("numpy==1.26.4 --hash=sha256:") for line in requirements)
    assert any(line.startswith("protobuf==") for line in requirements)
    assert all(re.fullmatch(r"\S+==\S+( --hash=sha256:[0-9a-f]{64})+", r) for r in requirements)
    assert wheel.startswith("nvidia-pytriton==0.7.0 --hash=sha256:")
    assert "openvino" not in listed, "nobody asked for it"
    assert [line[:5] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]


def test_openvino_is_installed_where_it_is_asked_for(pip, tmp_path):
    with pytest.raises(EngineError, match="no matching distribution"):
        install_environment(tmp_path / "env", openvino=True, report=lambda line: None)
    listed = pip[1][1].splitlines()
    assert any(line.startswith(f"{server_env.OPENVINO} --hash=sha256:") for line in listed)
    assert not any(line.startswith("openvino-telemetry") for line in listed)


def test_other_versions_than_the_tested_ones_are_said(pip, tmp_path, monkeypatch):
    known = importlib.metadata.version
    versions = {"onnxruntime": "1.99.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, known(name)))
    lines = []
    with pytest.raises(EngineError):
        install_environment(tmp_path / "env", report=lines.append)
    assert "onnxruntime" not in pip[1][1]
    assert "onnxruntime==1.99.0" in pip[2][0]
    assert "--no-deps" not in pip[2][0]
    (said,) = [line for line in lines if "onnxruntime==1.99.0" in line]
    assert "without a known SHA-256" in said


def test_the_lock_is_complete_and_what_was_tested():
    """The server computes with the versions of constraints.txt, so that masks are the same."""
    locked = locked_requirements()
    for line in (*server_env.SERVER_PACKAGES, server_env.OPENVINO, server_env.WHEEL):
        assert locked[line.split("==")[0]].startswith(f"{line} --hash=sha256:")
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("onnxruntime", "openvino", "pillow", "scikit-image", "scipy"):
        assert locked[name].split(" ")[0] in constraints


def test_a_failing_command_ends_in_its_last_line():
    code = "import sys; print('noise', file=sys.stderr); sys.exit('the reason')"
    with pytest.raises(EngineError, match=r"trying failed: .*status 1: the reason"):
        server_env._call(sys.executable, ["-c", code], "trying")


def test_both_sides_compute_with_the_same_versions():
    import PIL

    changed = {name: line.replace("==", "==0+") for name, line in locked_requirements().items()}
    assert server_env._other_versions(changed)["pillow"] == PIL.__version__
