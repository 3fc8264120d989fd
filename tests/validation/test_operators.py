"""Checks of the kernels: on the CPU's emulation, and on a GPU that PyTorch's references play."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engines import STAND_IN_GPU

from dbsam_deploy.core.errors import AccuracyError, EngineError
from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.sessions import cuda_graphs
from dbsam_deploy.sessions.cuda_graphs import Recording
from dbsam_deploy.validation import machine_state, operator_cases, operators
from dbsam_deploy.validation.machine_state import NO_GPU, gpu_state
from dbsam_deploy.validation.operators import BUILD, COMPARE, DTYPES, REPLAY, SANITIZE, sanitize
from dbsam_deploy.validation.verdicts import Context, NotRunError

CONTEXT = Context(Path("work"), None, Path())
OPERATORS = (
    *("ms_deform_attn", "channel_attention", "rel_pos_attention", "depthwise_conv_gelu"),
    "windowed_attention",
)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine_state, operators):
        monkeypatch.setattr(module, "find_gpu", lambda: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose kernels are PyTorch's references, in the small cases."""
    for module in (machine_state, operators):
        monkeypatch.setattr(module, "find_gpu", lambda: STAND_IN_GPU)
    monkeypatch.setattr(operators, "need_cuda", lambda: "cpu")
    monkeypatch.setattr(operator_cases, "FULL", {})


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script on the PATH."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return path

    return put


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_on_the_emulation_passes(name, no_gpu):
    pytest.importorskip("torch")
    dtype = "float32" if name == "ms_deform_attn" else "float16"
    found = COMPARE[f"{name} {dtype}"](CONTEXT)
    assert "on this CPU's emulation" in found.text
    shares = found.figures["share_of_bound"]
    assert set(shares) == set(operator_cases.cases_of(name, full=False))
    assert all(0 <= share <= 1 for share in shares.values())
    assert any(shares.values())


def test_every_operator_has_full_shapes_and_ragged_ones_for_a_gpu():
    for name in OPERATORS:
        full, small = (set(operator_cases.cases_of(name, full=full)) for full in (True, False))
        assert len(full - small) >= 3
        assert len(small) >= 4
    assert set(OPERATORS) == set(operator_cases.kernels.OPERATORS)
    with pytest.raises(NotRunError, match="no case of another"):
        operator_cases.cases_of("another", full=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_on_a_gpu_passes(name, gpu):
    assert "on the GPU" in COMPARE[f"{name} bfloat16"](CONTEXT).text


def _off_by_a_little(result: Any) -> Any:
    outputs = result if isinstance(result, tuple) else (result,)
    outputs[-1].view(-1)[0] += outputs[-1].abs().max() / 50
    return result


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "change",
    [
        _off_by_a_little,
        lambda result: torch.full_like(result[0] if isinstance(result, tuple) else result, 0.0),
        lambda result: (*(result if isinstance(result, tuple) else (result,)), torch.ones(1)),
    ],
    ids=["one number", "zero", "more outputs"],
)
def test_a_kernel_that_lies_fails(name, change, gpu, monkeypatch):
    true = getattr(torch_ops, f"{name}_reference")
    monkeypatch.setattr(torch_ops, name, lambda *given, **sizes: change(true(*given, **sizes)))
    with pytest.raises(AccuracyError):
        COMPARE[f"{name} float16"](CONTEXT)


def test_a_kernel_that_writes_beyond_its_output_fails(no_gpu, monkeypatch):
    case = operator_cases.SMALL["one token"]
    true = operator_cases.kernels.call

    def call(library, entry, *arguments):
        true(library, entry, *arguments)
        address = arguments[3] + 2 * 2 * 64  # behind the output, in float16
        ctypes.c_uint16.from_address(address).value = 0

    monkeypatch.setattr(operator_cases.kernels, "call", call)
    with pytest.raises(AccuracyError, match="beyond its output"):
        operator_cases.run_emulation(case, operator_cases.draw(case, "float16"))


def test_the_detector_sees_each_kernel(no_gpu, monkeypatch):
    """A kernel's calls under the detector itself: tests/kernels/test_detector.py."""
    called: list[str] = []

    def build(operator):
        library = operator_cases.kernels.host_library(operator)
        entries = {e.name: e for e in operator_cases.kernels.OPERATORS[operator].entry_points}

        def call(*arguments):
            called.append(operator)
            return getattr(library, f"dbsam_{operator}")(*arguments)

        names = {name: getattr(library, name) for name in entries}
        return SimpleNamespace(**{**names, f"dbsam_{operator}": call})

    monkeypatch.setattr(operators, "detecting_library", build)
    found = SANITIZE["detector rel_pos_attention"](CONTEXT)
    assert called == ["rel_pos_attention"] * 12
    assert found.text == "12 calls on this CPU, no race and no stray access"


class PlayedRecorder:
    """Records by keeping the function; `keeps` it with the first inputs, as a bad graph does."""

    keeps = False

    def __call__(self, function: Any, inputs: tuple[torch.Tensor, ...]) -> Recording:
        buffers = tuple(tensor.clone() for tensor in inputs)
        read = inputs if self.keeps else buffers
        outputs = tuple(tensor.clone() for tensor in function(*read))

        def replay() -> None:
            for output, value in zip(outputs, function(*read), strict=True):
                output.copy_(value)

        return Recording(buffers, outputs, replay)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_replay_follows_its_inputs(name, gpu, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaGraphRecorder", PlayedRecorder)
    assert "follow their inputs" in REPLAY[name](CONTEXT).text
    monkeypatch.setattr(PlayedRecorder, "keeps", True)
    with pytest.raises(AccuracyError):
        REPLAY[name](CONTEXT)


def test_without_a_gpu_its_checks_are_not_run(no_gpu):
    sanitizers = {name: SANITIZE[name] for name in SANITIZE if "detector" not in name}
    for checks in (REPLAY, sanitizers, {"library": BUILD["GPU library"], "state": gpu_state}):
        for check in checks.values():
            with pytest.raises(NotRunError, match=NO_GPU):
                check(CONTEXT)


def test_without_a_compiler_the_emulation_is_not_run(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (COMPARE["rel_pos_attention float32"], BUILD["g++ rel_pos_attention"]):
        with pytest.raises(NotRunError, match=r"no g\+\+") as refused:
            check(CONTEXT)
        assert refused.value.advice == "apt-get install g++"


RACES = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"
ERRORS = "========= ERROR SUMMARY: {} errors"
DONE = operators._DONE


@pytest.mark.parametrize(
    ("tool", "says", "status", "verdict"),
    [
        ("memcheck", f"echo '{DONE}'; echo '{ERRORS.format(0)}'", 0, ""),
        ("racecheck", f"echo '{DONE}'; echo '{RACES.format(0, 0)}'", 0, ""),
        ("memcheck", f"echo '{DONE}'; echo '{ERRORS.format(2)}'", 9, "2 reported"),
        ("racecheck", f"echo '{DONE}'; echo '{RACES.format(1, 1)}'", 0, "1 reported"),
        ("memcheck", f"echo '{ERRORS.format(0)}'", 0, "did not come to its end"),
        ("memcheck", f"echo '{DONE}'", 0, "did not come to its end"),
        ("initcheck", "echo 'unknown option' >&2", 1, "unknown option"),
    ],
    ids=["clean", "no race", "errors", "race", "no kernel ran", "no summary", "refused"],
)
def test_what_a_sanitizer_says(tool, says, status, verdict, gpu, program):
    program("compute-sanitizer", f'echo "$@" > "$0.words"; {says}; exit {status}')
    if verdict:
        with pytest.raises(EngineError, match=verdict):
            sanitize(tool, "rel_pos_attention", CONTEXT)
    else:
        found = sanitize(tool, "rel_pos_attention", CONTEXT)
        assert found.text == f"{4 * len(DTYPES)} calls, nothing reported"


def test_a_sanitizer_runs_our_kernels_alone(gpu, program, monkeypatch, capsys):
    path = program("compute-sanitizer", f'echo "$@" > "$0.words"; echo "{DONE}"; echo "{ERRORS}"')
    with pytest.raises(EngineError):
        sanitize("memcheck", "rel_pos_attention", CONTEXT)
    words = Path(f"{path}.words").read_text()
    assert words.startswith("--tool memcheck --error-exitcode 9 --report-api-errors no ")
    assert "run_alone('rel_pos_attention')" in words
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where: tensor)
    operators.run_alone("rel_pos_attention")
    assert capsys.readouterr().out.endswith(f"{DONE}\n")


GPU_LINE = (
    "Played, 580.1, P0, 1980, 1980, 2619, 2619, 33, 70.1, 700.0, 143771, 0, {}, Disabled, Enabled"
)


@pytest.mark.parametrize(("load", "note"), [("0", False), ("97", True), ("[N/A]", False)])
def test_the_state_of_a_gpu(load, note, gpu, program):
    path = program("nvidia-smi", f'echo "$@" > "$0.words"; echo "{GPU_LINE.format(load)}"')
    found = gpu_state(CONTEXT)
    assert "1980 of 1980 MHz, 70.1 of 700.0 W, 0 of 143771 MiB used" in found.text
    assert ("busy" in found.text) is note
    words = Path(f"{path}.words").read_text().split()
    assert [word.partition("=")[0] for word in words] == ["--query-gpu", "--format"]


def test_a_tool_that_fails_is_a_failure(gpu, program):
    program("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    with pytest.raises(EngineError, match="NVIDIA-SMI has failed"):
        gpu_state(CONTEXT)
    assert subprocess.run(["nvidia-smi"], capture_output=True).returncode == 9
