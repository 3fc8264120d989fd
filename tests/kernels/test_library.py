"""Building and loading the kernels: signatures, the cache, nvcc for every architecture, errors."""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.kernels import build as kernel_build
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels import toolkit
from dbsam_deploy.kernels.plugin_build import PluginLibrary
from dbsam_deploy.resources import resource_dir

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
FLAGS = ("-x", "c++", "-fPIC", "-shared")

C_TYPES = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "size_t": ctypes.c_size_t,
    "const int*": ctypes.POINTER(ctypes.c_int),
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def no_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernel_build._compiler.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "TOOLKITS", tmp_path)
    yield
    kernel_build._compiler.cache_clear()


def test_signatures_are_those_of_the_header() -> None:
    text = (resource_dir("kernels") / "entry_points.h").read_text()
    declared = {}
    for result, name, arguments in re.findall(r"DBSAM_EXPORT (\w+) (\w+)\(([^)]*)\);", text):
        types = (argument.strip().rsplit(maxsplit=1)[0] for argument in arguments.split(","))
        declared[name] = (C_TYPES[result], tuple(C_TYPES[kind] for kind in types))
    entries = [entry for op in kernels.OPERATORS.values() for entry in op.entry_points]
    assert {entry.name: (entry.result, entry.arguments) for entry in entries} == declared


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_an_operator_loads_on_the_emulation(name: str) -> None:
    library = kernels.host_library(name)
    for entry in kernels.OPERATORS[name].entry_points:
        assert getattr(library, entry.name).restype is entry.result


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_every_included_file_counts(name: str) -> None:
    names = [path.name for path in kernels.operator_sources(name)]
    assert names[0] == f"{name}.cu"
    assert {f"{name}.cuh", "common.cuh", "host_fibers.h", "entry_points.h"} <= set(names)
    assert len(names) == len(set(names))


def _answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def test_a_library_is_built_once(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    written = first.stat().st_ino
    assert kernel_build.build_library("answer", "g++", [source], FLAGS, cache) == first
    assert first.stat().st_ino == written
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert _answer(first) == 42


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_library_is_built_again(source: Path, tmp_path: Path, keep: int) -> None:
    """Loading a truncated one ends the process with SIGBUS, so its hash is checked before."""
    cache = tmp_path / "cache"
    first = kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    first.write_bytes(first.read_bytes()[:keep])
    again = kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    assert _answer(again) == 42
    assert list(cache.iterdir()) == [again]


def test_the_cache_is_private(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o770)
    with pytest.raises(EngineError, match=r"other users may write there; run `chmod go-w"):
        kernel_build.build_library("answer", "g++", [source], FLAGS, cache)


def test_another_users_cache_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(EngineError, match="it belongs to user"):
        kernel_build.build_library("answer", "g++", [source], FLAGS, tmp_path)


def test_a_change_of_a_header_or_a_flag_makes_a_new_one(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    (tmp_path / "answer.h").write_text("#define ANSWER 43\n")
    second = kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    third = kernel_build.build_library("answer", "g++", [source], (*FLAGS, "-O1"), cache)
    assert len({first, second, third}) == 3
    assert (_answer(first), _answer(second), _answer(third)) == (42, 43, 43)


def test_a_refused_source_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    source.write_text(SOURCE + "int broken( {}\n")
    cache = tmp_path / "cache"
    with pytest.raises(EngineError, match=r"g\+\+ ended with status 1") as caught:
        kernel_build.build_library("answer", "g++", [source], FLAGS, cache)
    assert any("answer.cu" in line for line in caught.value.details)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be kept in .*answer\.cu/cache: Not a dir"):
        kernel_build.build_library("answer", "g++", [source], FLAGS, source / "cache")


def test_a_missing_header_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.h").unlink()
    with pytest.raises(EngineError, match=r"answer\.h is missing: reinstall"):
        kernel_build.build_library("answer", "g++", [source], FLAGS, tmp_path)


@pytest.mark.usefixtures("no_compilers")
def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no g\+\+ on the PATH.*apt-get install g\+\+"):
        kernels.build_host_library("ms_deform_attn", tmp_path)
    with pytest.raises(EngineError, match=r"no nvcc in the PATH.*install the CUDA toolkit"):
        kernels.build_device_library(folder=tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="operator 'softmax': expected one of ms_deform_attn"):
        kernels.host_library("softmax")
    for name in ("90", "sm_90a", "sm_75"):
        with pytest.raises(InputError, match=f"architecture '{name}': expected sm_80 or later"):
            kernels.build_device_library((name,), folder=tmp_path)


def test_a_library_without_the_entry_points_is_refused(source: Path, tmp_path: Path) -> None:
    path = kernel_build.build_library("answer", "g++", [source], FLAGS, tmp_path)
    with pytest.raises(EngineError, match=r"dbsam_rel_pos_attention.*delete it"):
        kernels.load_library(path, ("rel_pos_attention",))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"kernel library .*delete it to have it rebuilt"):
        kernels.load_library(broken, ("ms_deform_attn",))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (9, r"answer: CUDA error 9 \(cudaErrorInvalidConfiguration: .*\) at the launch"),
        (
            35,
            r"CUDA error 35 \(cudaErrorInsufficientDriver: the driver is older .* none",
        ),
        (-2, r"answer refuses its arguments \(status -2\): a size is outside"),
        (-77, r"\(status -77\): a code that kernels/common\.cuh does not list"),
    ],
)
def test_a_status_becomes_an_error(source: Path, tmp_path: Path, status: int, message: str) -> None:
    source.write_text(SOURCE.replace("ANSWER", str(status)))
    path = kernel_build.build_library("answer", "g++", [source], FLAGS, tmp_path)
    with pytest.raises(EngineError, match=message):
        kernels.call(ctypes.CDLL(str(path)), "answer")


def test_every_status_of_the_sources_has_a_meaning() -> None:
    text = (resource_dir("kernels") / "common.cuh").read_text()
    codes = {int(code) for code in re.findall(r"kError\w+ = (-\d+)", text)}
    assert codes == set(kernels.STATUS)


def assert_they_fit(usages: Sequence[kernel_build.ResourceUsage]) -> None:
    assert usages
    for usage in usages:
        assert 0 < usage.registers <= 255
        # a few values around a loop may be spilled; an array in local memory is a mistake
        assert usage.spill_bytes <= 400, usage
        assert usage.stack_bytes <= 128, usage


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_nvcc_compiles_it(name: str, architecture: str) -> None:
    assert {architecture, "sm_80"} < {*kernels.ARCHITECTURES}
    assert_they_fit(kernels.resource_usage(name, architecture))


def test_nvcc_compiles_all_for_the_plugins_architecture(plugin_library: PluginLibrary) -> None:
    """The oldest, with the fewest instructions, from the log of a build that other tests need."""
    assert plugin_library.architectures == ("sm_80", "compute_80")
    (log,) = plugin_library.path.parent.glob("cmake-*/build.log")
    usages = kernel_build.parse_usage(log.read_text())
    assert_they_fit(usages)
    names = ("ms_deform_attn", "norm_conv_gelu", "attend_window", "depthwise_conv_gelu")
    for name in (*names, "windowed_attention"):
        assert any(name in usage.kernel for usage in usages), name


@pytest.mark.nvcc
def test_a_device_library_loads_without_a_gpu() -> None:
    library = kernels.device_library(("sm_90",), operators=("ms_deform_attn",))
    arguments = (16, 16, 16, 16, 1, 1, 8, 1, 1, [2, 2], 1, [2, 2])
    with pytest.raises(EngineError, match=r"status -1\): the dtype code is none of"):
        kernels.call(library, "dbsam_ms_deform_attn", *arguments, 3, None)


@pytest.mark.nvcc
def test_ptx_names_its_target_and_kernels() -> None:
    text = kernels.compile_ptx("ms_deform_attn", "sm_90")
    assert re.search(r"^\.target sm_90$", text, re.M)
    # float, half and bfloat16
    assert len(re.findall(r"^\.visible \.entry \w*ms_deform_attn_kernel\w*\(", text, re.M)) == 3
