"""Where nvcc is looked for, in which order, and what is said where there is none."""

from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import toolkit


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without CUDA; `usr/bin` in the folder is its PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "usr/bin"))
    monkeypatch.setattr(toolkit, "TOOLKITS", tmp_path / "usr/local")
    return tmp_path


def install(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_newest_of_the_usual_folders(machine: Path) -> None:
    places = {name: install(machine / "usr/local" / name / "bin") for name in ("cuda-9.2", "cuda")}
    assert toolkit.find_nvcc() == places["cuda-9.2"]
    for name in ("cuda-12.9", "cuda-13.0", "cuda-12.10"):
        places[name] = install(machine / "usr/local" / name / "bin")
    assert toolkit.find_nvcc() == places["cuda-13.0"]
    places["cuda-13.0"].chmod(0o644)  # no program
    assert toolkit.find_nvcc() == places["cuda-12.10"]


def test_what_is_named_comes_before_what_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine / "usr/local/cuda-13.0/bin")
    on_path = install(machine / "usr/bin")
    assert toolkit.find_nvcc() == on_path
    second = install(machine / "second/bin")
    monkeypatch.setenv("CUDA_PATH", str(machine / "second"))
    assert toolkit.find_nvcc() == second
    first = install(machine / "first/bin")
    monkeypatch.setenv("CUDA_HOME", str(machine / "first"))
    assert toolkit.find_nvcc() == first


def test_the_message_says_where_it_looked(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = f"{machine}/usr/local"
    with pytest.raises(EngineError, match=rf"no nvcc in the PATH or {local}/cuda\*/bin, .*install"):
        toolkit.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", "/opt/none")
    with pytest.raises(EngineError, match=r"no nvcc in CUDA_HOME \(/opt/none/bin\), the PATH or"):
        toolkit.find_nvcc()
