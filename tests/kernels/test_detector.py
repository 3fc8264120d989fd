"""The detector of races and stray accesses: what it finds, and that the kernels are free of it."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.kernel_calls import RAGGED, rel_pos
from support.kernel_faults import FAULTS, QUICK, WRONG_VALUES, Fault

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import detector
from dbsam_deploy.kernels.build import build_library, source_files
from dbsam_deploy.kernels.detector import FLAGS, detecting_library
from dbsam_deploy.kernels.library import OPERATORS
from dbsam_deploy.resources import resource_dir

PROBE = Path(__file__).with_name("detector_probe.cu")
COUNT = 128
"""Elements of the probe's tensors: 64 for each of two blocks."""

MARGIN = 64

RULES = {
    "a neighbour's value, with nothing between": (0, "race: read by one thread, written by ano"),
    "after a shuffle, which orders nothing": (1, "race: read by one thread, written by another"),
    "after __syncwarp": (2, None),
    "another warp's after __syncthreads": (3, None),
    "another warp's after __syncwarp": (4, "race: read by one thread, written by another"),
    "written after another warp read it": (5, "race: written by one thread, read by another"),
    "written after another lane read it": (6, "race: written by one thread, read by another"),
    "written by all threads": (7, "race: written by two threads: byte 0 of static shared"),
    "written by two blocks": (8, "race: written by two blocks: byte 252 of out"),
    "read after another block wrote": (9, "race: written by another block of the launch"),
    "written after another block read": (10, "race: read by another block of the launch"),
    "an input is written": (11, "an input is written: byte 0 of in"),
    "an output is read": (12, "read although nobody wrote it: byte 0 of out"),
    "dynamic shared memory nobody wrote": (13, "read although nobody wrote it: .* dynamic sh"),
    "behind the end of an input": (14, r"read out of bounds: byte 512 of in \(block 0 0 0, th"),
    "before an input": (15, "read out of bounds: byte -4 of in"),
    "behind the end of an output": (16, r"written out of bounds: byte 512 of out \(block 1"),
    "behind dynamic shared memory": (17, "written out of bounds: byte 256 of dynamic shared"),
    "behind static shared memory": (18, "written out of bounds: byte 256 of static shared"),
    "a copy that nobody waited for": (19, "touched before the wait for its asynchronous copy"),
    "a copy that its thread waited for": (20, None),
    "a copy that another thread waited for": (21, "race: read by one thread, written by ano"),
    "__syncwarp of half a warp": (22, r"knows __syncwarp\(\) of whole warps only"),
    "a barrier that one thread misses": (23, "deadlock: 63 of 64 live threads wait"),
    "nothing wrong": (24, None),
}
"""What the probe does → the number of its case, and what is found."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("probe")
    for source in (PROBE, *source_files(resource_dir("kernels") / "common.cuh")):
        shutil.copy(source, folder)
    flags = (*FLAGS, "-Werror")
    library = ctypes.CDLL(str(build_library("probe", "g++", [folder / PROBE.name], flags, None)))
    library.dbsam_detect_findings.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(("case", "message"), RULES.values(), ids=RULES)
def test_a_rule(probe: ctypes.CDLL, case: int, message: str | None) -> None:
    memory = torch.rand(2, COUNT + 2 * MARGIN)
    tensors = [ctypes.c_void_p(row[MARGIN:].data_ptr()) for row in memory]
    probe.dbsam_detect_begin()
    for name, tensor in zip((b"in", b"out"), tensors, strict=True):
        size = ctypes.c_size_t(COUNT * 4)
        probe.dbsam_detect_allow(name, tensor, size, name == b"out")
    if case == 10:
        assert probe.probe(24, *tensors) == 0  # writes all
    assert probe.probe(case, *tensors) == 0
    found = probe.dbsam_detect_findings().decode()
    assert bool(found) == bool(message), found
    assert re.search(message or "^$", found), found


DTYPES = {
    "ms_deform_attn": "float32",
    "channel_attention": "float16",
    "rel_pos_attention": "float16",
    "depthwise_conv_gelu": "float16",
    "windowed_attention": "float16",
}
"""What every run of the tests looks at; the others are slow."""


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_found_in_the_kernels(operator: str) -> None:
    dtype = DTYPES[operator]
    call, every_size = RAGGED[operator]
    library = detecting_library(operator, dtype=dtype)
    for sizes in every_size:
        call(library, dtype, *sizes)


def test_a_kernel_whose_tensors_are_unknown_is_not_run_unwatched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = detecting_library("ms_deform_attn", dtype=DTYPES["ms_deform_attn"])
    monkeypatch.setattr(detector, "_TENSORS", {})
    with pytest.raises(EngineError, match="dbsam_ms_deform_attn: the detector does not know"):
        _ = library.dbsam_ms_deform_attn


@pytest.mark.slow
def test_nothing_is_found_in_the_compact_form() -> None:
    library = detecting_library("rel_pos_attention", dtype=DTYPES["rel_pos_attention"])
    rel_pos(library, "float16", 1, 33, 1, "_compact")


@pytest.fixture
def findings_of(tmp_path: Path) -> Callable[[Fault], list[str]]:
    def run(fault: Fault) -> list[str]:
        source = fault.plant(tmp_path)
        library = detecting_library(fault.operator, dtype=fault.dtype, source=source)
        call, every_size = RAGGED[fault.operator]
        found: list[str] = []
        for sizes in (fault.sizes,) if fault.sizes else every_size:
            try:
                call(library, fault.dtype, *sizes)
            except EngineError as error:
                found += error.details
        return found

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAULTS]
)
def test_a_fault_is_found(findings_of: Callable[[Fault], list[str]], name: str) -> None:
    found = findings_of(FAULTS[name])
    assert any(re.search(FAULTS[name].message, line) for line in found), found
    files = (FAULTS[name].operator, FAULTS[name].file)
    assert all(any(f in line for f in files) for line in found if " at " in line), found


def test_every_fault_still_has_its_place() -> None:
    for fault in (*FAULTS.values(), *WRONG_VALUES.values()):
        assert fault.new in fault.text()


def test_a_fault_whose_text_is_gone_is_named() -> None:
    fault = Fault("ms_deform_attn", "common.cuh", "no such text", "", "race")
    with pytest.raises(ValueError, match=r"common\.cuh has 'no such text' 0 times, expected once"):
        fault.text()


def _run_tests(operator: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.other_kernels"]
    paths = os.pathsep.join((str(tests.parent.parent), str(tests.parent)))
    return subprocess.run(
        [*command, str(tests / f"test_{operator}.py")],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_found_in_any_comparison(operator: str) -> None:
    result = _run_tests(operator)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_fail_a_comparison(name: str) -> None:
    result = _run_tests(WRONG_VALUES[name].operator, OTHER_KERNELS=name)
    assert re.search(rf"^FAILED .*test_{WRONG_VALUES[name].operator}", result.stdout, re.M), (
        result.stdout
    )
