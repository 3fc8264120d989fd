"""Checks in processes of their own: whatever ends one is its verdict, and the others follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import validation_steps
from support.validation_steps import TABLE

from dbsam_deploy.validation.children import Deadline, run_checks
from dbsam_deploy.validation.verdicts import Context, Judgement, Step, Verdict

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _children_find_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def run(
    folder: Path, name: str, budget_s: float | None = None
) -> tuple[dict[str, Judgement], list[str]]:
    """Outcomes of a table's only step by check, and the checks that began."""
    step: Step = getattr(validation_steps, name)[0]
    context, begun = Context(folder / "work", None, folder), []
    found = run_checks(
        step, list(step.checks), context, Deadline(budget_s), begun.append, table=TABLE + name
    )
    outcomes = {one.check: one for one in found}
    assert list(outcomes) == list(step.checks)
    return outcomes, begun


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within five seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_whatever_ends_a_check_is_its_verdict_and_the_others_follow(tmp_path):
    outcomes, begun = run(tmp_path, "BAD")
    texts = {name: (one.verdict.value, one.text) for name, one in outcomes.items()}
    by_signal = "its process was ended by {}; its last words: last words".format
    assert texts == {
        "good": ("pass", "as it should be"),
        "lie": ("fail", "largest error 3, at most 1"),
        "bug": ("fail", "ZeroDivisionError: nobody thought of it"),
        "absent": ("not run", "it needs tensorrt, which is not installed"),
        "nothing here": ("not run", "no such thing here"),
        "memory": ("fail", "MemoryError:"),
        "segfault": ("fail", by_signal("SIGSEGV")),
        "abort": ("fail", by_signal("SIGABRT")),
        "killed": ("fail", by_signal("SIGKILL")),
        "left": ("fail", "its process ended with status 3: gone"),
        "last": ("pass", "as it should be"),
    }
    assert begun == list(outcomes)
    assert outcomes["absent"].advice == "pip install tensorrt"
    assert outcomes["nothing here"].advice == "apt-get install it"
    assert outcomes["good"].figures == {"ms": 1.5, "worst": "nan", "nodes": [3], "on": True}
    log = (tmp_path / "work" / "logs" / "bad.log").read_text()
    for words in ("on standard output", "ZeroDivisionError", "largest error 3"):
        assert words in log


def test_one_that_hangs_is_killed_with_what_it_started(tmp_path):
    outcomes, _ = run(tmp_path, "HANGS")
    assert outcomes["hang"].verdict == Verdict.FAIL
    assert outcomes["hang"].text == "no answer within 1.5 s"
    assert (tmp_path / "work" / "tidy").exists()  # it could stop a server
    assert outcomes["after"].verdict == Verdict.PASS
    for pid in (tmp_path / "work" / "pids").read_text().split():
        assert is_gone(int(pid))


def test_the_budget_ends_what_runs_and_what_follows(tmp_path):
    start = time.monotonic()
    outcomes, begun = run(tmp_path, "NAPS", budget_s=2.0)
    assert 1.4 < time.monotonic() - start < 4
    verdicts = [one.verdict for one in outcomes.values()]
    passed = verdicts.count(Verdict.PASS)
    assert 1 <= passed <= 5
    assert verdicts == [Verdict.PASS] * passed + [Verdict.OUT_OF_TIME] * (50 - passed)
    assert passed <= len(begun) <= passed + 1


def test_a_check_that_the_budget_cuts_has_not_failed(tmp_path):
    outcomes, _ = run(tmp_path, "PATIENT", budget_s=1.5)
    assert outcomes["hang"].verdict == Verdict.OUT_OF_TIME


def test_without_time_nothing_begins(tmp_path):
    outcomes, begun = run(tmp_path, "NAPS", budget_s=0.0)
    assert begun == []
    assert {(one.verdict, one.text) for one in outcomes.values()} == {
        (Verdict.OUT_OF_TIME, "not begun")
    }


def test_checks_end_when_the_one_that_waits_is_killed(tmp_path):
    code = (
        "from test_children import run; from pathlib import Path; import sys; "
        "run(Path(sys.argv[1]), 'PATIENT')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{Path(__file__).parent}:{TESTS.parent}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment) as parent:
        pids = tmp_path / "work" / "pids"
        for _ in range(200):
            if pids.exists() and len(pids.read_text().split()) == 2:
                break
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    for pid in pids.read_text().split():
        assert is_gone(int(pid))
