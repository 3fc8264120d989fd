"""Stands in for Triton's `tensorrt` backend on a machine that cannot run the plan.

It serves the ONNX graph beside `model.plan` under the unchanged configuration. That proves the
wiring (names, shapes, batching, ensemble), never the engine.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime_standin


class TritonPythonModel(onnxruntime_standin.TritonPythonModel):
    """One instance of a model whose platform is `tensorrt_plan`."""

    notice = (
        "a stand-in for Triton's tensorrt backend runs {path}, the graph the plan was built from, "
        "on the CPU; this proves the wiring, never the engine: model.plan itself is NOT run"
    )

    def missing(self, path: Path) -> str:
        """Text for a graph file that is not there."""
        return (
            f"a CPU machine cannot run model.plan, and the graph it was built from is not beside "
            f"it ({path}): keep the .onnx beside the .plan for the repository, or use a GPU"
        )
