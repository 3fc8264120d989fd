"""Reports: whole after whatever ends the command, gone on from, and never better than the truth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.validation_steps import TABLE

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.validation import run as running
from dbsam_deploy.validation.record import PAGE_NAME, REPORT_NAME, WORK_NAME, Findings, read_inputs
from dbsam_deploy.validation.run import Plan, Watcher, parse_budget, validate

TESTS = Path(__file__).resolve().parents[1]
NEW = Findings({"machine": "a", "code": "1"}, {"processor": "played", "GPU": "none"}, "none")
COMMAND = (
    "import sys; from pathlib import Path; from test_run import NEW; "
    "from dbsam_deploy.validation.run import Plan, Watcher, validate; "
    "validate(Plan(Path(sys.argv[1]), table=sys.argv[2]), NEW, Watcher(say=print))"
)


@pytest.fixture(autouse=True)
def _children_find_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{Path(__file__).parent}:{TESTS.parent}")


def read(folder: Path) -> dict[str, Any]:
    """The report as anybody reads it."""
    page = (folder / PAGE_NAME).read_text()
    assert page.endswith("</html>")
    body: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
    return body


def verdicts(folder: Path) -> dict[str, str]:
    return {one["check"]: one["verdict"] for one in read(folder)["outcomes"]}


def test_a_report_is_whole_wherever_the_command_was_killed_and_is_gone_on_from(tmp_path):
    """Three of five checks kill it, each once: as the second, first and only one of a step."""
    begun = ["first / b", "second / c", "third / e"]
    passed = [{"a"}, {"a", "b"}, {"a", "b", "c", "d"}]
    command = [sys.executable, "-c", COMMAND, str(tmp_path), TABLE + "DEADLY"]
    for running_then, kept, on_page in zip(begun, passed, (0, 2, 4), strict=True):
        assert subprocess.run(command).returncode == -signal.SIGKILL
        body = read(tmp_path)
        assert body["running"] == running_then
        assert {one["check"] for one in body["outcomes"]} == kept
        assert running_then in body["left"]
        assert (tmp_path / PAGE_NAME).read_text().count('<td class="verdict') == on_page
        assert len(body["left"]) + len(kept) == 5
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 verdicts of" in done.stdout
    body = read(tmp_path)
    assert (body["left"], body["running"]) == ([], "")
    assert verdicts(tmp_path) == dict.fromkeys("abcde", "pass")


def test_a_second_run_does_what_could_not_run_and_keeps_the_rest(tmp_path):
    plan, done, said = Plan(tmp_path, table=TABLE + "LATER"), [], []
    watcher = Watcher(done=lambda one: done.append(one.check), say=said.append)
    first = validate(plan, NEW, watcher)
    assert verdicts(tmp_path) == {"a": "pass", "b": "not run", "c": "fail", "d": "not run"}
    assert first.counts() == {"pass": 1, "fail": 1, "not run": 2, "out of time": 0}
    assert (done, said) == (["a", "b", "c", "d"], [])
    done.clear()
    validate(plan, NEW, watcher)
    assert done == ["b", "d"]
    assert verdicts(tmp_path) == {"a": "pass", "b": "pass", "c": "fail", "d": "not run"}
    assert list(verdicts(tmp_path)) == ["a", "b", "c", "d"]  # in the order of the steps
    assert "2 verdicts of" in said.pop()
    done.clear()
    validate(replace(plan, only=("two",)), NEW, watcher)
    assert done == ["c", "d"]
    done.clear()
    said.clear()
    validate(plan, replace(NEW, inputs={"machine": "b", "code": "1"}), watcher)
    assert done == ["a", "b", "c", "d"]
    assert "starts anew; changed: machine (a, now b)" in said[0]
    assert verdicts(tmp_path)["b"] == "not run"  # what the checks had made is gone as well


OURS = '{"format": 1, "seal": "", "outcomes": [], "verdict": "fail"}'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("fail", "pass"), "was edited"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "another manifest format"),
    ],
    ids=["edited", "later"],
)
def test_a_report_that_was_changed_is_not_gone_on_from(tmp_path, change, said, monkeypatch):
    asked: list[list[str]] = []

    def none(step, names, *rest, **more):
        asked.append(names)
        return iter(())

    (tmp_path / REPORT_NAME).write_text(change(OURS))
    (tmp_path / WORK_NAME).mkdir()
    (tmp_path / WORK_NAME / "old").touch()
    monkeypatch.setattr(running, "run_checks", none)
    told: list[str] = []
    validate(Plan(tmp_path, table=TABLE + "LATER"), NEW, Watcher(say=told.append))
    assert asked == [["a", "b"], ["c", "d"]]
    assert said in told[0]
    assert "starts anew" in told[0]
    assert read(tmp_path)["left"] == ["one / a", "one / b", "two / c", "two / d"]
    assert not (tmp_path / WORK_NAME / "old").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (REPORT_NAME, '{"tests": 3}'),
        (REPORT_NAME, OURS[:20]),
        (REPORT_NAME, "[" * 10**5),
        (PAGE_NAME, "<html>"),
        (f"{WORK_NAME}/thesis.tex", "years"),
    ],
    ids=["another's", "cut", "deep", "a page", "a folder"],
)
def test_what_is_of_no_validation_is_not_replaced(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    for again in (False, True):
        with pytest.raises(InputError, match="is of no validation, and would be replaced"):
            validate(Plan(tmp_path, again=again, table=TABLE + "LATER"), NEW, Watcher())
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("8m", 480), ("1.5h", 5400), ("1", 1)]
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "8 minutes", "0", "0.5s", "-8m", "m", "nan", "1e3", "9999h"])
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match="expected a time"):
        parse_budget(text)


def test_a_step_that_is_none(tmp_path):
    with pytest.raises(InputError, match="expected some of one, two"):
        Plan(tmp_path, only=("three",), table=TABLE + "LATER")


def test_verdicts_hold_for_machine_code_kernels_versions_and_export(tiny_artefact, tmp_path):
    inputs = read_inputs(None)
    assert {"machine", "driver", "code", "kernels", "export", "python", "numpy"} <= set(inputs)
    other = read_inputs(tiny_artefact.folder)
    assert {name for name in inputs if other[name] != inputs[name]} == {"export"}
    with pytest.raises(InputError, match=r"no manifest\.json in"):
        read_inputs(tmp_path)
