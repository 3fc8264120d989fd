"""CPU time of a process and of all below it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.loadtesting.cpu_time import cpu_seconds


def write(proc, pid, parent, *ticks):
    (proc / str(pid)).mkdir()
    fields = ["S", parent, *[0] * 9, *ticks, *[0] * 20]
    text = f"{pid} (a name) with) {' '.join(map(str, fields))}\n"
    (proc / str(pid) / "stat").write_text(text)


def test_processes_below_count_and_others_do_not(tmp_path):
    write(tmp_path, 10, 1, 100, 50, 0, 0)
    write(tmp_path, 11, 10, 20, 0, 7, 3)
    write(tmp_path, 12, 11, 5, 5, 0, 0)
    write(tmp_path, 13, 1, 999, 999, 0, 0)
    ticks = os.sysconf("SC_CLK_TCK")
    assert cpu_seconds(10, tmp_path) == pytest.approx((150 + 30 + 10) / ticks)
    assert cpu_seconds(12, tmp_path) == pytest.approx(10 / ticks)
    with pytest.raises(InputError, match="no such process"):
        cpu_seconds(14, tmp_path)


def test_a_busy_child_is_seen():
    code = "import time\nwhile time.process_time() < 0.1: pass\nprint('x', flush=True); input()"
    command = [sys.executable, "-c", code]
    before = cpu_seconds(os.getpid())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert cpu_seconds(os.getpid()) - before >= 0.08
        assert 0.08 <= cpu_seconds(child.pid) < 5
        child.communicate(b"\n")
