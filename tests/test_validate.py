"""`dbsam validate`: its lines, its exit status, and all of it on this machine (slow)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dbsam_deploy import validate
from dbsam_deploy.cli import run
from dbsam_deploy.validation import run as running
from dbsam_deploy.validation.steps import STEPS
from dbsam_deploy.validation.verdicts import Judgement, Verdict

Shell = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Runs the command here, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        status = run(validate.main, list(words))
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Judgement]], list[str]]:
    """Verdicts of single checks; all others pass. Returns the steps that ran."""

    def put(told: dict[str, Judgement]) -> list[str]:
        ran: list[str] = []

        def checks(step, names, context, deadline, began, *, table) -> Iterator[Judgement]:
            ran.append(step.name)
            for name in names:
                began(name)
                seconds = 1.25 if step.name == "machine" else 0.25
                passed = Judgement(step.name, name, Verdict.PASS, "fine", seconds=seconds)
                yield told.get(f"{step.name}: {name}", passed)

        monkeypatch.setattr(running, "run_checks", checks)
        return ran

    return put


def test_all_pass(play, shell, tmp_path):
    ran = play({})
    status, out, err = shell("--report", "out")
    total = sum(len(step.checks) for step in STEPS)
    assert status == 0
    assert ran == [step.name for step in STEPS]
    lines = out.splitlines()
    assert len(lines) == total + 1
    assert lines[0] == "pass        machine: versions (1.2 s): fine"
    assert lines[-1] == f"{total} pass; out/report.html and out/report.json have everything"
    assert "db_sam_tiny, exported here at 256 pixels" in err
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<svg" in page
    assert "<script" not in page


def test_a_failure_is_told_and_is_status_1(play, shell):
    bad = Judgement("runtimes", "openvino", Verdict.FAIL, "misses <b>the gate</b>", seconds=2)
    play({"runtimes: openvino": bad})
    status, out, _ = shell("--report", "out")
    assert status == 1
    assert "\nfail        runtimes: openvino (2.0 s): misses <b>the gate</b>\n" in out
    assert "1 fail" in out.splitlines()[-1]
    assert "misses &lt;b&gt;the gate" in Path("out/report.html").read_text()
    status, out, _ = shell("--report", "out")  # it is not run again, and has still failed
    assert status == 1


def test_what_did_not_run_stands_in_one_line_for_a_step(play, shell):
    names = list(next(step for step in STEPS if step.name == "replay").checks)
    told = {
        f"replay: {name}": Judgement("replay", name, Verdict.NOT_RUN, "no GPU", "get one")
        for name in names
    }
    told["sanitizer: initcheck rel_pos_attention"] = Judgement(
        "sanitizer", "initcheck rel_pos_attention", Verdict.OUT_OF_TIME, "not begun"
    )
    play(told)
    status, out, _ = shell("--report", "out", "--budget", "8m")
    assert status == 0
    more = f"{names[0]} and {len(names) - 1} more"
    assert f"\nnot run     replay: {more}: no GPU: get one\n" in out
    line = "python -m dbsam_deploy.validate --report out"
    assert "\nout of time sanitizer: initcheck rel_pos_attention: not begun\n" in out
    assert out.splitlines()[-1] == f"to go on: {line}"
    assert f"{len(names)} not run, 1 out of time" in out


def test_single_steps_and_a_named_export(play, shell, tiny_artefact):
    ran = play({})
    words = ("--report", "out", "--artefact", str(tiny_artefact.folder))
    assert shell(*words, "--only", "speed", "export")[0] == 0
    assert ran == ["export", "speed"]
    body = json.loads(Path("out/report.json").read_text())
    assert body["artefact"] == str(tiny_artefact.folder)
    assert {one["step"] for one in body["outcomes"]} == {"export", "speed"}


def test_what_goes_on_names_the_export(play, shell, tiny_artefact):
    late = Judgement("server", "triton", Verdict.OUT_OF_TIME, "not begun")
    play({"server: triton": late})
    _, out, _ = shell("--report", "out", "--artefact", str(tiny_artefact.folder), "--budget", "9m")
    line = f"python -m dbsam_deploy.validate --report out --artefact {tiny_artefact.folder}"
    assert out.splitlines()[-1] == f"to go on: {line}"


def test_the_newest_export_is_taken(play, shell, tiny_artefact, tmp_path):
    play({})
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "fp16").symlink_to(tiny_artefact.folder)
    _, _, err = shell("--report", "out", "--only", "machine")
    assert "validates build/fp16; --artefact DIR names another export" in err


def test_the_steps_are_listed(shell, tmp_path):
    status, out, _ = shell("--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [step.name for step in STEPS]
    assert not list(tmp_path.iterdir())


def test_the_steps_are_those_of_the_documents():
    page = (ROOT / "docs" / "how-to" / "validate.md").read_text()
    assert re.findall(r"^\| `([a-z]+)` \| ", page, re.M)[: len(STEPS)] == [s.name for s in STEPS]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The command as a user gives it on this machine; about two minutes of CPU time."""
    folder = tmp_path_factory.mktemp("validate")
    if (ROOT / ".triton-server").exists():
        (folder / ".triton-server").symlink_to((ROOT / ".triton-server").resolve())
    command = [sys.executable, "-m", "dbsam_deploy.validate", "--report", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.openvino
@pytest.mark.rtx
@pytest.mark.triton
def test_all_of_it_on_this_machine(whole_run):
    folder, out = whole_run
    body: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    found = {(one["step"], one["check"]): one for one in body["outcomes"]}
    assert list(found) == [(step.name, check) for step in STEPS for check in step.checks]
    assert (body["left"], body["verdicts"]["fail"]) == ([], 0)
    passed = {name for name, one in found.items() if one["verdict"] == "pass"}
    assert {("runtimes", "onnxruntime"), ("server", "triton"), ("speed", "ceilings")} <= passed
    assert {name for name in found if name[0] == "operators"} <= passed
    for name in set(found) - passed:
        assert found[name]["verdict"] == "not run"
        assert found[name]["advice"], name
    assert f"{len(passed)} pass" in out
