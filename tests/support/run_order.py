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
    "serving/test_server.py",
    "fusions/test_fusions.py",
    "engines/test_build.py",
    "training/test_loop.py",
    "serving/test_supervisor.py",
    "quantization/test_qdq.py",
    "timing/test_compare_cpu.py",
    "viewer/test_page.py",
    "quantization/test_put_back.py",
    "test_export_faults.py",
    "serving/test_faults.py",
    "test_engine.py",
    "model/test_lite_medsam.py",
    "graphs/test_encoder_decoder.py",
    "sessions/test_openvino_session.py",
    "viewer/test_wrong_input.py",
    "kernels/test_rel_pos_attention.py",
    "training/test_refine.py",
    "test_doctor.py",
    "timing/test_gpu.py",
    "viewer/test_client.py",
    "fusions/test_rel_pos_attention.py",
    "graphs/test_onnx_export.py",
    "test_serve.py",
    "test_runtime.py",
    "test_batch.py",
    "viewer/test_page_routes.py",
    "quantization/test_quantizer.py",
    "quantization/test_rounding.py",
    "model/test_weights.py",
    "model/test_lora.py",
    "sessions/test_fused_model.py",
    "test_packaging.py",
    "test_evaluate.py",
    "pacs/test_untrusted.py",
    "serving/test_interactive.py",
    "serving/test_images_in_graph.py",
    "test_output_faults.py",
)
"""Files that take longest. They begin, so that no worker is left with one at the end; the first two
make what many others use, each in a worker of its own. Those that wait for a server or a browser
stand apart, so that no two of them leave a core without work."""


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
