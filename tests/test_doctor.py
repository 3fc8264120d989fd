"""The doctor has a row for everything, tries it, and says what is missing and how to get it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.commands import loaded

from dbsam_deploy import doctor
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.diagnosis import probes
from dbsam_deploy.diagnosis.inspections import Answer
from dbsam_deploy.diagnosis.probes import BACKEND_PROBES, Finding
from dbsam_deploy.doctor import CHECKS, INSTALL_LINES, Check, examine
from dbsam_deploy.engines.device import find_gpu
from dbsam_deploy.extras import EXTRAS, headers_line
from dbsam_deploy.kernels import toolkit
from dbsam_deploy.kernels.library import ARCHITECTURES
from dbsam_deploy.kernels.plugin_build import PluginLibrary
from dbsam_deploy.machine.hardware import has_bfloat16, instruction_sets, memory_gib
from dbsam_deploy.sessions.backends import LOCAL_BACKENDS
from dbsam_deploy.sessions.trial_records import OUT_OF_TIME, Record, Trial, keep_record
from dbsam_deploy.verification import runtimes

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("backend", "build", "serving", "extra")
MACHINE = {
    "cpu": str, "cores": int, "instructions": list, "memory_gib": float, "gpu": str, "driver": str,
    "python": str, "system": str,
}  # fmt: skip
ROW = {
    "name": str, "kind": str, "purpose": str, "usable": bool, "version": str, "devices": list,
    "missing": str, "install": str,
}  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: status, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        status = run(doctor.main, list(words))
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What runtimes say in the test; no process is started, and what is not set is absent."""
    said: dict[str, Answer] = {}
    nothing = Answer(error="nothing here", absent="nothing")
    monkeypatch.setattr(doctor, "inspect_runtime", lambda name: said.get(name, nothing))
    return said


def test_every_backend_has_a_row_and_every_row_a_backend() -> None:
    rows = [check for check in CHECKS if check.kind == "backend"]
    assert [check.name for check in rows] == list(LOCAL_BACKENDS)
    assert {check.name: check.probe for check in rows} == BACKEND_PROBES
    assert len({check.probe for check in rows}) == len(LOCAL_BACKENDS)


def test_every_extra_for_users_has_a_row() -> None:
    rows = {check.name for check in CHECKS if check.kind == "extra"}
    assert rows == {extra.name for extra in EXTRAS} - set(doctor.RUNTIME_EXTRAS)
    assert {"eval", "train", "dicom", "nifti", "client"} <= rows


def test_names_and_kinds() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    assert list(dict.fromkeys(check.kind for check in CHECKS)) == list(KINDS)
    assert set(INSTALL_LINES) <= set(names)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the command says of this machine, run once as a user runs it."""
    command = [sys.executable, "-m", "dbsam_deploy.doctor", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    body: dict[str, Any] = json.loads(result.stdout)
    return body


def test_json_schema(report: dict[str, Any]) -> None:
    assert set(report) == {"machine", "checks"}
    assert {name: type(value) for name, value in report["machine"].items()} == MACHINE
    assert [row["name"] for row in report["checks"]] == [check.name for check in CHECKS]
    for row in report["checks"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["kind"] in KINDS
        assert set(row["devices"]) <= {"cpu", "cuda"}
        assert "\n" not in row["missing"] + row["install"]
        if row["usable"]:
            assert row["version"]
            assert row["kind"] != "backend" or row["devices"]
        else:
            assert row["missing"]
            assert row["devices"] == []


def test_this_machine_runs_pytorch_and_onnxruntime(report: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime")
    rows = {row["name"]: row for row in report["checks"]}
    for name in ("pytorch", "onnxruntime"):
        assert rows[name]["usable"], rows[name]
        assert "cpu" in rows[name]["devices"]


@pytest.mark.parametrize(
    "name", ["onnxruntime-tensorrt", "pytorch-fused", "tensorrt", "tensorrt-rtx"]
)
def test_without_a_gpu_there_are_no_gpu_backends(report: dict[str, Any], name: str) -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    (row,) = (row for row in report["checks"] if row["name"] == name)
    assert not row["usable"]
    assert "no NVIDIA GPU" in row["missing"]


def test_tools_of_this_machine(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["checks"]}
    for tool in ("g++", "nvcc"):
        if rows[tool]["usable"]:
            assert re.match(r"\d+\.\d+", rows[tool]["version"])
        else:
            assert rows[tool]["missing"].startswith(f"no {tool} ")
            assert rows[tool]["install"] == INSTALL_LINES[tool]
    assert report["machine"]["memory_gib"] == round(memory_gib(), 1) > 0


def pip_requirements(line: str) -> list[str]:
    return re.findall(r'"([^"]+)"', line) if "pip install" in line else []


def test_every_pip_line_of_a_backend_or_extra_names_an_extra_of_pyproject(
    answers: dict[str, Answer],
) -> None:
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(offered["optional-dependencies"])
    checks = tuple(check for check in CHECKS if check.kind in ("backend", "extra"))
    for check, finding in zip(checks, examine(checks), strict=True):
        assert not finding.usable
        assert "pip install" in finding.install, check.name
        named = [re.fullmatch(r"\S*\[(\w[\w-]*)\]", r) for r in pip_requirements(finding.install)]
        (extra,) = (match.group(1) for match in named if match)
        assert extra in extras


def test_a_machine_without_anything(
    answers: dict[str, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Run
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "find_headers", lambda runtime: raise_engine_error("no headers"))
    monkeypatch.setattr(toolkit, "TOOLKITS", tmp_path)
    monkeypatch.setattr(doctor, "find_nvrtc", lambda: raise_engine_error("no NVRTC"))
    status, out, err = shell("--json")
    assert (status, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)["checks"]}
    assert not any(row["usable"] for row in rows.values())
    assert all(row["install"] for row in rows.values())
    assert rows["g++"]["missing"] == "no g++ on the PATH"
    assert rows["NVRTC"]["install"] == INSTALL_LINES["NVRTC"]
    assert rows["plugin library"]["install"] == "python -m dbsam_deploy.plugins build"
    assert rows["Triton server"]["install"] == "python -m dbsam_deploy.serve --install"


def raise_engine_error(text: str) -> None:
    raise EngineError(text)


def fake_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def find(name: str) -> Finding:
    (check,) = (check for check in CHECKS if check.name == name)
    (finding,) = examine((check,))
    return finding


def test_an_nvcc_that_knows_no_blackwell(tools: Path) -> None:
    fake_tool(
        tools,
        "nvcc",
        '[ "$1" = --version ] && echo "Cuda compilation tools, release 11.8, V11.8.89" '
        "|| printf 'sm_75\\nsm_80\\nsm_90\\n'",
    )
    finding = find("nvcc")
    assert (finding.usable, finding.version) == (False, "11.8")
    assert finding.missing == "nvcc 11.8 does not compile for sm_120: 12.8 or later is needed"
    assert finding.install == INSTALL_LINES["nvcc"]


def test_an_nvcc_beside_the_path_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    codes = "\\n".join(ARCHITECTURES)
    fake_tool(
        tmp_path / "bin",
        "nvcc",
        f'[ "$1" = --version ] && echo "release 13.0, V13.0.88" || printf "{codes}\\n"',
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    finding = find("nvcc")
    assert finding.usable, finding
    assert finding.version == f"13.0 ({', '.join(ARCHITECTURES)}), {tmp_path}/bin/nvcc"


def test_headers_and_library_are_held_against_the_installed_tensorrt(
    plugin_library: PluginLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_tensorrt", lambda: "99.1.2.3")
    monkeypatch.setattr(doctor, "DEFAULT_OUTPUT", plugin_library.path.parent)
    finding = find("TensorRT headers")
    assert not finding.usable
    assert finding.install == headers_line("99.1")
    finding = find("plugin library")
    version = plugin_library.tensorrt_headers
    assert finding.missing == f"{plugin_library.path} is for TensorRT {version}, this is 99.1.2.3"
    assert finding.install == doctor.PLUGINS_LINE


def test_a_compiler_that_does_not_compile(tools: Path) -> None:
    fake_tool(
        tools,
        "g++",
        '[ "$1" = --version ] && echo "g++ (GCC) 4.8.5" '
        '|| { echo "unrecognized option -std=c++17" >&2; exit 1; }',
    )
    finding = find("g++")
    assert not finding.usable
    assert finding.missing == "g++ does not work: unrecognized option -std=c++17"


def test_a_tool_that_hangs_or_cannot_start(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TOOL_TIMEOUT_S", 0.2)
    fake_tool(tools, "nvcc", "sleep 5")
    started = time.monotonic()
    assert "timed out" in find("nvcc").missing
    assert time.monotonic() - started < 4
    (tools / "g++").write_text("#!/no/such/interpreter\n")
    (tools / "g++").chmod(0o755)
    assert find("g++").missing.startswith("the check failed: ")


def test_a_gpu_that_nvidia_smi_shows_is_in_the_machine_line(
    answers: dict[str, Answer], tools: Path, shell: Run
) -> None:
    fake_tool(tools, "nvidia-smi", "echo 'NVIDIA H200, 570.86.15'")
    _, out, _ = shell()
    assert "NVIDIA H200 (driver 570.86.15)" in out.splitlines()[0]


def test_a_broken_package_is_a_row(answers: dict[str, Answer], shell: Run) -> None:
    answers["tensorrt"] = Answer(error="OSError: libnvinfer.so.11: cannot open")
    status, out, err = shell("--backend", "tensorrt")
    assert (status, err) == (1, "")
    assert len(out.splitlines()) == 1
    assert "libnvinfer.so.11: cannot open" in out


def test_exit_statuses(answers: dict[str, Answer], shell: Run) -> None:
    answers["torch"] = Answer({"version": "2.13.0+cpu", "cuda": ""})
    assert shell("--backend", "pytorch") == (0, "pytorch 2.13.0+cpu: usable on cpu\n", "")
    assert shell("--backend", "pytorch", "--device", "cpu")[0] == 0
    status, out, _ = shell("--backend", "pytorch", "--device", "cuda")
    assert (status, out) == (1, "pytorch: not usable on cuda: nothing here\n")
    assert shell("--backend", "pytorch-fused")[0] == 1
    status, out, _ = shell("--backend", "tensorrt", "--json")
    assert status == 1
    assert {name: type(value) for name, value in json.loads(out).items()} == ROW
    for words in (("--backend", "tensorflow"), ("--device", "cuda")):
        status, out, err = shell(*words)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")


def test_runtimes_that_were_tried_on_an_export(
    shell: Run, make_artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    missed = Trial("openvino", "bfloat16", False, "misses its gate: boxes 0.9", (), 3.0, 1.0, 8.0)
    default = Trial("onnxruntime", None, True, "the export's own gate", (), 7.0, 2.0, 9.0)

    def play(artefact: object, place: object, *, every: bool, say: object) -> runtimes.Tried:
        asked.append(every)
        return runtimes.Tried(Record((default, missed), every, 9.5))

    monkeypatch.setattr(runtimes, "try_runtimes", play)
    artefact = make_artefact(tmp_path / "export")
    folder = artefact.folder
    late = replace(missed, verdict=OUT_OF_TIME, encoder_ms=0.0)
    keep_record(artefact, Record((default, late), False, 8.0))
    status, out, err = shell("--artefact", str(folder))
    assert (status, asked) == (0, [True])
    assert OUT_OF_TIME not in out
    assert "`--backend auto` takes onnxruntime" in out
    assert "tried in 9.5 s" in out
    assert re.search(r" 3\.0 │ +1\.0 │ +1\.0 │ no ", out)
    assert "misses its" in out
    assert "see " in err
    body = json.loads(shell("--artefact", str(folder), "--json")[1])
    assert len(asked) == 1
    assert body["chosen"] == {"backend": "onnxruntime", "runtime_precision": None}
    assert [trial["passes"] for trial in body["trials"]] == [True, False]
    shell("--artefact", str(folder), "--retry")
    assert len(asked) == 2
    assert shell("--retry")[2] == "error: --retry goes with --artefact DIR\n"


def test_instruction_sets() -> None:
    assert set(instruction_sets("flags : sse2 avx512_vnni amx_bf16").values()) == {True, False}
    assert instruction_sets("flags : avx_vnni")["VNNI"]
    assert [
        has_bfloat16(f"flags : x {name}") for name in ("avx512_bf16", "amx_bf16", "amx_int8")
    ] == [
        True,
        True,
        False,
    ]


def test_one_backend_asks_only_what_it_needs(monkeypatch: pytest.MonkeyPatch, shell: Run) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        doctor, "inspect_runtime", lambda name: asked.append(name) or Answer(error="x")
    )
    shell("--backend", "pytorch")
    assert sorted(asked) == ["driver", "torch"]
    asked.clear()
    examine(CHECKS)
    assert len(asked) == len(set(asked))


def test_the_table_keeps_commands_whole(answers: dict[str, Answer]) -> None:
    checks = (
        Check("tensorrt", "backend", probes.probe_tensorrt),
        Check("part", "extra", lambda ask: Finding(True, "1.0 [beta]", ("cpu",)), "of a whole"),
    )
    line = "pip install 'dbsam-deploy[gpu]' " + "'a-long-requirement' " * 8
    findings = [Finding(False, missing="no [gpu] here", install=line), examine(checks[1:])[0]]
    console = Console(record=True, width=70)
    doctor.print_findings(console, checks, findings, doctor.machine_facts())
    text = console.export_text()
    assert line.strip() in text
    for words in ("no [gpu] here", "1.0 [beta] on cpu", "for tensorrt:", "GiB"):
        assert words in text


def test_no_heavy_import_before_it_is_asked_for() -> None:
    heavy = {"torch", "onnxruntime", "onnx", "tensorrt", "tensorrt_rtx", "pycuda", "monai"}
    assert loaded(heavy, "import dbsam_deploy.doctor") == set()
