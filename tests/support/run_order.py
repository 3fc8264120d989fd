"""Plugin: which test files begin, and what is done before and after they are loaded."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from pathlib import Path

import pytest

gc.disable()  # until all is loaded, when a search for cyclic garbage finds none

# jsonschema, which MONAI loads, takes it for a format that nothing here checks: a second.
sys.modules.setdefault("rfc3987_syntax", None)

TESTS = Path(__file__).resolve().parents[1]

LONG = (
    "test_export.py",
    "test_export_int8.py",
    "fusions/test_fusions.py",
    "kernels/test_library.py",
    "engines/test_build.py",
    "training/test_loop.py",
    "viewer/test_page.py",
    "kernels/test_plugin_calls.py",
    "serving/test_server.py",
    "quantization/test_qdq.py",
    "timing/test_compare_cpu.py",
    "quantization/test_put_back.py",
    "test_export_faults.py",
    "model/test_shipped_checkpoint.py",
    "sessions/test_openvino_session.py",
    "test_runtime.py",
    "serving/test_faults.py",
    "timing/test_benchmark_gate.py",
    "kernels/test_rel_pos_attention.py",
    "test_engine.py",
    "model/test_lite_medsam.py",
    "serving/test_supervisor.py",
    "test_batch.py",
    "test_doctor.py",
    "quantization/test_quantizer.py",
    "quantization/test_rounding.py",
    "test_packaging.py",
    "graphs/test_onnx_export.py",
    "timing/test_gpu.py",
)
"""Files that take longest. They begin, so that no worker is left with one at the end; the first two
make what many others use, each in a worker of its own."""


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist hand out the files in our order, not by the number of their tests."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        gc.enable()  # the process that hands them out loads none
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONG, then those with the most tests; within a file as it is."""
    counts = Counter(item.path for item in items)
    place = {TESTS / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda i: (place.get(i.path, len(LONG)), -counts[i.path], i.path))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Take what is loaded by now out of every search for cyclic garbage, which now begin.

    They are seldom: with Python's own thresholds they took 6 % of the processor's time.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()
