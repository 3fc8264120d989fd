"""The server's environment: every way in which it can be unusable is named before the start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.serving import environment as server_env
from dbsam_deploy.serving.environment import find_environment, install_environment, install_hint


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


def test_installing_reports_steps_and_the_failing_command(tmp_path, monkeypatch):
    commands, lines = [], []

    def call(python, arguments, what):
        command = [python, *arguments]
        commands.append(command)
        if "--no-deps" in command:
            raise EngineError("installing failed: no matching distribution")

    monkeypatch.setattr(server_env, "_call", call)
    with pytest.raises(EngineError, match="no matching distribution"):
        install_environment(tmp_path / "env", report=lines.append)
    assert commands[0][1:3] == ["-m", "venv"]
    assert "numpy==1.26.4" in commands[1]
    assert any(item.startswith("scikit-image") for item in commands[1])
    assert commands[2][-2:] == ["--no-deps", "nvidia-pytriton==0.7.0"]
    assert [line[:5] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]


def test_a_failing_command_ends_in_its_last_line():
    code = "import sys; print('noise', file=sys.stderr); sys.exit('the reason')"
    with pytest.raises(EngineError, match=r"trying failed: .*status 1: the reason"):
        server_env._call(sys.executable, ["-c", code], "trying")


def test_both_sides_compute_with_the_same_versions():
    import PIL

    assert server_env._version("pillow") == PIL.__version__
