"""Whatever ends a child process becomes one line."""

import sys
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.machine.child_process import run_python

FAILURES = [
    ("print('error: no disk', file=sys.stderr); sys.exit(2)", "no disk"),
    ("raise ImportError('libx.so: cannot open')", "ImportError: libx.so: cannot open"),
    ("sys.exit(3)", "its process ended with status 3: it said nothing"),
    (
        r"print('one'); print('\x1b[31mtwo\x1b[0m ', file=sys.stderr); sys.exit(4)",
        "its process ended with status 4: two",
    ),
    ("sys.exit(0)", "its process ended with status 0: it said nothing"),
    (
        "print('no luck', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)",
        "its process was ended by SIGKILL; its last words: no luck",
    ),
]


@pytest.mark.parametrize(("code", "reason"), FAILURES)
def test_the_reason_is_one_line(code: str, reason: str) -> None:
    assert run_python(["-c", f"import os, sys; {code}"]).reason() == reason


def test_a_log_takes_both_streams_and_several_lines_can_tell(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = run_python(["-c", "for i in range(5): print(i)\nexit(1)"], log=log)
    assert (ended.status, ended.output, ended.log) == (1, "", log.read_text())
    assert ended.reason(2) == "its process ended with status 1: 3 | 4"
    assert ended.reason(telling=["1", "2"]) == "its process ended with status 1: 1 | 2"


def test_the_package_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("VALUE = 7")
    monkeypatch.chdir("/")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import dbsam_deploy, only_here; print(only_here.VALUE)"
    assert run_python(["-c", code]).output == "7\n"


@pytest.mark.parametrize("way", [["-c", "import secrets"], ["-m", "secrets"]])
def test_nothing_is_imported_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]
) -> None:
    (tmp_path / "secrets.py").write_text("print('from here')")
    monkeypatch.chdir(tmp_path)
    ended = run_python(way)
    assert (ended.status, ended.output) == (0, "")


def test_another_python_gets_no_python_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    code = "import os; print(os.environ.get('PYTHONPATH'), os.environ['MORE'])"
    ended = run_python(["-c", code], python=str(other), variables={"MORE": "x"})
    assert ended.output == "None x\n"


def test_no_end_and_no_start_are_errors(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^no answer within 0\.5 s$"):
        run_python(["-c", "import time; time.sleep(60)"], timeout_s=0.5)
    with pytest.raises(EngineError, match=r"python does not start: .*No such file"):
        run_python([], python=str(tmp_path / "python"))
