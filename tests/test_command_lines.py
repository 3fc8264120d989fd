"""Every command line: help that teaches, and mistakes that end in one line with status 2."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dbsam_deploy import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dbsam_deploy"

COMMANDS = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if re.search(r'^if __name__ == "__main__":', path.read_text(), re.M)
    and path.name != "__main__.py"  # tests/test_main.py
)
"""Modules that `python -m` runs, below `dbsam_deploy`."""


def check_refusal(status: int, out: str, err: str) -> None:
    assert status == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert out == ""


def test_the_commands_are_found() -> None:
    assert {"export", "predict", "serving.repository", "engines.worker"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"dbsam_deploy.{name}").main
    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    usage, _, rest = out.partition("\n\n")
    assert usage.startswith(f"usage: python -m dbsam_deploy.{name}")
    assert re.search(r"^examples?:", rest, re.M)
    assert f"python -m dbsam_deploy.{name} " in rest
    assert not re.search(r"\(default:\s+(True|False|None|\[\]|\(\)|\))|\)\s+\(default: ", rest)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_python_m_ends_in_one_line_and_status_2(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m` runs it, but for a process of its own, which one command has below."""
    monkeypatch.setattr(sys, "argv", [name, "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"dbsam_deploy.{name}", run_name="__main__", alter_sys=True)
    assert isinstance(ended.value.code, int)
    check_refusal(ended.value.code, *capsys.readouterr())


def test_a_process_ends_in_one_line_and_status_2() -> None:
    command = [sys.executable, "-m", "dbsam_deploy.predict", "--no-such-option"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    check_refusal(done.returncode, done.stdout, done.stderr)


MISTAKES = [
    ("export", "--precision", "fp13"),
    ("export", "--precision", "fp32", "--variant", "db_sam_huge"),
    ("export", "--precision", "fp32", "--image-size", "100"),
    ("export", "--precision", "fp32", "--image-size", "big"),
    ("export", "--precision", "fp32", "--checkpoint", "missing.pth"),
    ("predict", "missing.png", "--box", "1", "2", "3", "4"),
    ("serve", "--repository", "missing-folder"),
    ("client", "missing.png", "--box", "1", "2", "3", "4"),
    ("loadtest", "--url", "localhost"),
    ("loadtest", "--concurrency", "0"),
    ("loadtest", "--rate", "-1"),
    ("loadtest", "--image", "missing.png"),
    ("loadtest", "--seconds", "0"),
    ("loadtest", "--server-pid", "999999999"),
    ("loadtest", "--box", "5", "5", "1", "1"),
    ("evaluate", "--data", "missing-folder"),
    ("evaluate",),
    ("batch",),
    ("batch", "missing.csv"),
    ("batch", ".", "--workers", "0"),
    ("plugins", "info", "missing.so"),
    ("plugins", "build", "--arch", "90"),
    ("plugins", "build", "--tensorrt-include", "missing-folder"),
    ("plugins",),
    ("engine",),
    ("engine", "build", "--artefact", "missing-folder"),
    ("engine", "inspect", "--artefact", "missing-folder"),
    ("export", "--precision", "fp32", "--engine", "tensorrt-rtx", "--target", "ada"),
    ("train", "--recipe", "db_sam_huge"),
    ("train",),
    ("export", "--precision", "int8"),
    ("sensitivity",),
    ("doctor", "--backend", "tensorrt9"),
    ("doctor", "--device", "cuda"),
    ("validate",),
    ("validate", "--report", "out", "--budget", "soon"),
    ("validate", "--report", "out", "--only", "everything"),
    ("validate", "--report", "out", "--artefact", "missing"),
]
"""Commands with what a user might mistype, each refused in one line with status 2."""


@pytest.mark.parametrize("case", MISTAKES, ids=" ".join)
def test_a_mistake_ends_in_one_line_and_status_2(
    case: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"dbsam_deploy.{case[0]}").main
    check_refusal(cli.run(main, list(case[1:])), *capsys.readouterr())
    assert not list(tmp_path.iterdir())
