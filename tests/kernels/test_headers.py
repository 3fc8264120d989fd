"""TensorRT's headers: where they are looked for, and which of them match the runtime."""

from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.extras import HEADERS_LINE, headers_line
from dbsam_deploy.kernels import headers
from dbsam_deploy.kernels.headers import Headers, find_headers


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without TensorRT, whose usual folder of archives is `opt`."""
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(headers, "installed_tensorrt", lambda: "")
    monkeypatch.setattr(headers, "_OF_ARCHIVES", (str(tmp_path / "opt"),))
    monkeypatch.setattr(headers.platform, "machine", lambda: "none")
    monkeypatch.setattr(headers.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def install(folder: Path, version: str) -> Headers:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    major, minor, patch = version.split(".")
    (folder / "NvInferVersion.h").write_text(
        f"#define TRT_MAJOR {major}\n#define NV_TENSORRT_MAJOR TRT_MAJOR //!\n"
        f"#define NV_TENSORRT_MINOR {minor}\n#define NV_TENSORRT_PATCH {patch}\n"
    )
    return Headers(folder, version)


def test_they_are_looked_for_where_the_caller_says(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    with pytest.raises(EngineError, match=rf"NvInferRuntime.h\) in {folder}: get .*--tensorrt"):
        find_headers(folder)
    (folder / "NvInferRuntime.h").touch()
    with pytest.raises(EngineError, match="does not say TensorRT's version"):
        find_headers(folder)
    version = folder / "NvInferVersion.h"
    version.write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n")
    with pytest.raises(EngineError, match="does not say TensorRT's version"):
        find_headers(folder)
    with version.open("a") as stream:
        stream.write("#define NV_TENSORRT_PATCH 1\n")
    with pytest.raises(EngineError, match=r"version 8\.6\.1, expected 10 or later"):
        find_headers(folder)
    assert find_headers(install(tmp_path / "new", "11.4.0").folder).version == "11.4.0"


def test_those_of_the_runtimes_version_are_taken(machine: Path) -> None:
    there = {
        version: install(machine / f"opt/TensorRT-{version}/include", version)
        for version in ("10.14.1", "10.16.0", "11.1.0", "11.6.0")
    }
    for runtime, taken in {
        "10.16.1.11": "10.16.0",
        "10.15.1": "10.14.1",  # not newer than the runtime
        "10.13.3": "10.14.1",  # nothing older
        "11.4.0.106": "11.1.0",
        "11.6": "11.6.0",
    }.items():
        assert find_headers(runtime=runtime) == there[taken], runtime


def test_those_of_another_major_version_are_refused_with_the_line_that_gets_the_right_ones(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "installed_tensorrt", lambda: "11.4.0.106")
    old = install(machine / "opt/tensorrt/include", "10.14.1")
    with pytest.raises(EngineError) as caught:
        find_headers()
    assert f"the TensorRT headers here are 10.14.1 in {old.folder}" in str(caught.value)
    assert f"`{headers_line('11.4')}`" in str(caught.value)
    # that line's folder is looked into, first of all
    folder = machine / headers_line("11.4").split(" -C ")[1].split()[0]
    fetched = install(folder / "include", "11.4.0")
    assert find_headers() == fetched
    assert find_headers(runtime="10.16") == old  # for another machine


def test_the_variable_names_the_only_folder(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine / "opt/tensorrt/include", "11.4.0")
    own = install(machine / "own", "10.16.0")
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(own.folder))
    assert find_headers() == own
    with pytest.raises(EngineError, match=r"10\.16\.0 in .*own, .*does not run in TensorRT 11\.4"):
        find_headers(runtime="11.4")
    option = install(machine / "option", "11.0.0")
    assert find_headers(option.folder) == option


def test_without_a_runtime_any_will_do_and_without_any_it_says_so(machine: Path) -> None:
    with pytest.raises(EngineError, match=r"no TensorRT headers .* on this machine") as caught:
        find_headers()
    assert HEADERS_LINE in str(caught.value)
    first = install(machine / "opt/tensorrt/include", "10.14.1")
    assert find_headers() == first
    with pytest.raises(InputError, match="TensorRT 'new': expected a version such as 11"):
        find_headers(runtime="new")
