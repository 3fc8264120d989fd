"""The graphs as Triton models, called from another model (business logic scripting)."""

from __future__ import annotations

import os
import re
import threading
from typing import Any

import numpy as np

from .contract import IMAGE, IMAGE_EMBEDDINGS, IOU_PREDICTIONS, LOW_RES_MASKS, graph_specs
from .errors import EngineError
from .imaging import Arrays, FloatArray, Preprocessing
from .refusal import RefusedError

MODEL_STEM = "dbsam_"
"""First part of the name of a graph's Triton model; the graph's name follows."""
STAGES_VARIABLE = "DBSAM_STAGES"
"""Environment variable with what follows the graph's name, see `public_name`; absent for nothing.

No client sees it, so no client can ask a stage without the front.
"""
_ENDING = re.compile(r"-[0-9a-f]{16}$")
_RESTARTS = ("is not healthy", "no available versions", "is not ready", "is not found")
"""Texts of Triton about a model whose process ended, or which is being loaded again."""
_ITEM_BYTES = 4


def public_name(model: str) -> str:
    """The name of a stage without its secret ending, other names as they are."""
    return _ENDING.sub("", model)


class BlsGraphs:
    """`interactive.Graphs` on Triton models.

    Args:
        triton: `triton_python_backend_utils`.
        how: mode and sizes of the model.
    """

    def __init__(self, triton: Any, how: Preprocessing) -> None:
        self._triton = triton
        self._last = threading.local()
        self._ending = os.environ.get(STAGES_VARIABLE, "")
        (embeddings,) = graph_specs(how)["encoder"].outputs
        sizes = [axis for axis in embeddings.axes if isinstance(axis, int)]
        self._embedding_bytes = int(np.prod(sizes)) * _ITEM_BYTES

    def encode(self, image: FloatArray) -> tuple[Any, int]:
        """See `interactive.Graphs`; a tensor on a GPU stays there, as Triton's tensor.

        On a CPU Triton's tensor is an array and the same again in shared memory: the array is kept.
        """
        pb = self._triton
        (embedding,) = self._run("encoder", [pb.Tensor(IMAGE, image)], [IMAGE_EMBEDDINGS])
        return embedding.as_numpy() if embedding.is_cpu() else embedding, self._embedding_bytes

    def decode(self, graph: str, embedding: Any, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """See `interactive.Graphs`."""
        pb = self._triton
        if isinstance(embedding, np.ndarray):
            embedding = self._shared(embedding)
        tensors = [pb.Tensor(name, np.ascontiguousarray(feed[name][None])) for name in feed]
        outputs = [LOW_RES_MASKS, IOU_PREDICTIONS]
        cpu = pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0)
        low, iou = self._run(graph, [embedding, *tensors], outputs, preferred_memory=cpu)
        return low.as_numpy()[0], iou.as_numpy()[0]

    def _shared(self, embedding: FloatArray) -> Any:
        """An embedding as Triton's tensor; its copy in shared memory is there for the next click.

        Each thread keeps one: 4 MiB at 1024 pixels. Two threads must not share a tensor, as Triton
        copies it when it is first sent.
        """
        kept = getattr(self._last, "kept", None)
        if kept is None or kept[0] is not embedding:
            kept = self._last.kept = (embedding, self._triton.Tensor(IMAGE_EMBEDDINGS, embedding))
        return kept[1]

    def _run(self, graph: str, tensors: list[Any], outputs: list[str], **options: Any) -> list[Any]:
        """Raises EngineError, or RefusedError where the model is not there for the moment."""
        pb, name = self._triton, MODEL_STEM + graph
        model = name + self._ending
        request = pb.InferenceRequest(
            model_name=model, requested_output_names=outputs, inputs=tensors, **options
        )
        response = request.exec()
        if response.has_error():
            text = response.error().message().replace(model, name)
            if any(part in text for part in _RESTARTS):
                raise RefusedError(f"{name} is being restarted ({text}); retry", "UNAVAILABLE")
            raise EngineError(f"{name} failed: {text}")
        found = {tensor.name(): tensor for tensor in response.output_tensors()}
        return [found[name] for name in outputs]
