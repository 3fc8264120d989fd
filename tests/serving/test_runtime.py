"""The folder that a server runs from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from dbsam_deploy.serving.runtime import SHARED, STANDINS

GRAPH = '<ir_version: 8, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
OPEN_ON_ONE_CORE = """
import os, sys, types
from pathlib import Path
import onnxruntime
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
from model import _OnnxGraph
before = len(os.listdir("/proc/self/task"))
graph = _OnnxGraph(Path("graph.onnx"), 0)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_the_stand_in_starts_no_thread_for_a_core_that_is_not_ours(tmp_path: Path) -> None:
    """ONNX Runtime by itself counts the machine's."""
    for file in (STANDINS / "onnxruntime" / "model.py", *SHARED):
        shutil.copy(file, tmp_path)
    onnx.save(onnx.parser.parse_model(GRAPH.replace("[n]", "[1, n]")), tmp_path / "graph.onnx")
    command = [sys.executable, "-c", OPEN_ON_ONE_CORE]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "0\n"
