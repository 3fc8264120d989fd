"""Stands in for Triton's C++ `openvino` backend where only its Python backend is installed.

It runs the models that a local session on OpenVINO has compiled (`sessions.openvino_session`), so
what is served is what is computed locally. They lie beside `parts.json`, which
`serving.compiled` writes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import onnxruntime_standin
import triton_python_backend_utils as pb_utils
from compiled_parts import run_parts
from privacy import switch_off


class _CompiledGraph:
    """A graph on OpenVINO, see `_OnnxGraph` of the other stand-in."""

    def __init__(self, path: Path) -> None:
        """Open the compiled models.

        Raises:
            TritonModelException: another OpenVINO compiled them.
        """
        switch_off()
        import openvino

        told = json.loads(path.read_text())
        if told["openvino"] != openvino.__version__:
            raise pb_utils.TritonModelException(
                f"OpenVINO {openvino.__version__} cannot run what {told['openvino']} compiled"
            )
        self.inputs, self.outputs = told["inputs"], told["outputs"]
        core = openvino.Core()
        self._parts = [
            core.import_model(
                io.BytesIO(path.with_name(part["file"]).read_bytes()), "CPU", part["settings"]
            )
            for part in told["parts"]
        ]

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        """Outputs by their names."""
        found = run_parts(self._parts, feed, names)
        return [found[name] for name in names]


class TritonPythonModel(onnxruntime_standin.TritonPythonModel):
    """One instance of a model that names this backend."""

    graph_file = "parts.json"
    notice = "a stand-in for Triton's openvino backend runs {path} on the CPU from Python"

    def open(self, path: Path, parameters: dict[str, Any]) -> Any:
        """See `TritonPythonModel` of the other stand-in."""
        return _CompiledGraph(path)

    def _run(self, feeds: list[dict[str, Any]]) -> list[Any]:
        """One request after another: what was compiled takes one image."""
        run = super()._run
        return [answer for feed in feeds for answer in run([feed])]
