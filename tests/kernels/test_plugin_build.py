"""Compiling the TensorRT plugins, and what the library then says of itself."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.kernels import plugin_build
from dbsam_deploy.kernels.headers import Headers
from dbsam_deploy.kernels.plugin_build import (
    PluginLibrary,
    build_plugins,
    read_library,
)
from dbsam_deploy.resources import resource_dir

ENTRY_POINTS = {
    "dbsam_ms_deform_attn",
    "dbsam_channel_attention",
    "dbsam_channel_attention_workspace",
    "dbsam_rel_pos_attention",
    "dbsam_rel_pos_attention_compact",
    "dbsam_depthwise_conv_gelu",
    "dbsam_windowed_attention",
}


def test_the_library_says_what_it_is(
    plugin_library: PluginLibrary, tensorrt_headers: Headers
) -> None:
    assert plugin_library.path.name == "libdbsam_plugins.so"
    assert plugin_library.architectures == ("sm_80", "compute_80")
    assert plugin_library.tensorrt_headers == tensorrt_headers.version
    assert re.fullmatch(r"\d+\.\d+\.\d+", plugin_library.cuda)
    assert read_library(plugin_library.path) == plugin_library
    manifest = json.loads((plugin_library.path.parent / "libdbsam_plugins.json").read_text())
    assert manifest["sha256"] == plugin_library.sha256
    assert manifest["architectures"] == ["sm_80", "compute_80"]


def test_the_library_offers_its_functions_and_needs_no_tensorrt(
    plugin_library: PluginLibrary,
) -> None:
    def lines(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )

    names = {
        line.split()[-1]
        for line in lines("nm", "-D", "--defined-only", plugin_library.path)
        if line
    }
    assert names == ENTRY_POINTS | {"getCreators", "setLoggerFinder", "dbsam_plugins_build"}
    needed = {
        m[1]
        for line in lines("readelf", "-d", plugin_library.path)
        if (m := re.search(r"NEEDED.*\[(.+)\]", line))
    }
    assert needed
    assert not [name for name in needed if re.match(r"lib(nv|cud)", name)]


def test_a_second_build_compiles_nothing(
    plugin_library: PluginLibrary, tensorrt_headers: Headers
) -> None:
    lines: list[str] = []
    again = build_plugins(
        plugin_library.path.parent,
        tensorrt_include=tensorrt_headers.folder,
        architectures=("sm_80",),
        report=lines.append,
    )
    assert again == plugin_library
    assert not [line for line in lines if "Building" in line]


def test_a_changed_library_is_refused(plugin_library: PluginLibrary, tmp_path: Path) -> None:
    for name in ("libdbsam_plugins.so", "libdbsam_plugins.json"):
        shutil.copy(plugin_library.path.parent / name, tmp_path)
    changed = tmp_path / "libdbsam_plugins.so"
    with changed.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(EngineError, match="the manifest beside it says"):
        read_library(changed)
    (tmp_path / "libdbsam_plugins.json").write_text("{}")
    with pytest.raises(EngineError, match="is no manifest"):
        read_library(changed)
    (tmp_path / "libdbsam_plugins.json").unlink()
    assert read_library(changed).sha256 != plugin_library.sha256


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF"])
def test_what_is_no_library_of_ours_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "libdbsam_plugins.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=r"no plugin library.*plugins build"):
        read_library(path)


def test_a_missing_cmake_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"no cmake on the PATH.*install"):
        build_plugins(tmp_path)


@pytest.mark.usefixtures("plugin_library")
def test_headers_of_another_major_version_are_refused_before_anything_is_compiled(
    tensorrt_headers: Headers, tmp_path: Path
) -> None:
    output, lines = tmp_path / "plugins", []
    with pytest.raises(EngineError, match=r"does not run in TensorRT 99\.1: get .* -b v99\.1 "):
        build_plugins(
            output, tensorrt_include=tensorrt_headers.folder, tensorrt="99.1", report=lines.append
        )
    assert not output.exists()
    assert lines == []


def test_cmake_alone_asks_for_the_headers(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the PATH")
    command = ["cmake", "-S", str(resource_dir("kernels")), "-B", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    said = " ".join(result.stderr.split())
    assert 'TENSORRT_INCLUDE_DIR is "", which has no NvInferRuntime.h. Give the folder' in said


def test_an_architecture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected sm_80 or later"):
        build_plugins(tmp_path, architectures=("sm_70",))


def test_ptx_serves_the_gpus_after_ours() -> None:
    assert plugin_build._cmake_architectures(["80", "90", "120"]) == "80-real;90;120"
    assert plugin_build._cmake_architectures(["80", "86"]) == "80-real;86"


def test_a_failed_build_shows_the_lines_about_errors(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    script = "print('[1/2] one'); print('x.cu(3): error: no such thing'); raise SystemExit(3)"
    shown: list[str] = []
    with pytest.raises(EngineError, match=rf"status 3; the whole log is {log}") as caught:
        plugin_build._run([sys.executable, "-c", script], log, shown.append)
    assert caught.value.details == ("x.cu(3): error: no such thing",)
    assert shown == ["      [1/2] one"]
    assert "[1/2] one\nx.cu(3): error: no such thing\n" in log.read_text()
