"""How many cores a process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbsam_deploy.machine.cores import fewer_cores, usable_cores


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores, all of them ours."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "0"}, 8),
    ],
)
def test_a_containers_share(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path) == cores
    assert fewer_cores(tmp_path) == (0 if cores == 8 else cores)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_onnx_runtime_starts_no_thread_for_a_core_that_is_not_ours() -> None:
    """By itself it counts the machine's."""
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import onnx
from dbsam_deploy.sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
model = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
).SerializeToString()
runtime = import_onnxruntime()
before = len(os.listdir("/proc/self/task"))
session = open_session(runtime, model, CPU)
print(len(os.listdir("/proc/self/task")) - before)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "0\n"
