"""The graphs as Triton models, called from another model (business logic scripting)."""

from __future__ import annotations

import math
import os
import re
import threading
from typing import Any

import numpy as np

from .contract import IOU_PREDICTIONS, LOW_RES_MASKS, MASK_BITS, encoder_spec
from .errors import EngineError
from .imaging import Arrays, ByteArray, FloatArray, Preprocessing
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
        self._encoder = encoder_spec(how)
        sizes = [
            math.prod(axis for axis in tensor.axes if isinstance(axis, int))
            for tensor in self._encoder.outputs
        ]
        self._embedding_bytes = sum(sizes) * _ITEM_BYTES

    def encode(self, feed: Arrays) -> tuple[Any, int]:
        """See `interactive.Graphs`; a tensor on a GPU stays there, as Triton's tensor.

        On a CPU Triton's tensor is an array and the same again in shared memory: the array is kept.
        """
        pb, spec = self._triton, self._encoder
        tensors = [pb.Tensor(name, np.ascontiguousarray(feed[name])) for name in spec.input_names]
        found = self._run(spec.name, tensors, spec.output_names)
        kept = [tensor.as_numpy() if tensor.is_cpu() else tensor for tensor in found]
        return tuple(kept), self._embedding_bytes

    def decode(self, graph: str, embedding: Any, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """See `interactive.Graphs`."""
        pb = self._triton
        if any(isinstance(one, np.ndarray) for one in embedding):
            embedding = self._shared(embedding)
        tensors = [pb.Tensor(name, np.ascontiguousarray(feed[name][None])) for name in feed]
        outputs = [LOW_RES_MASKS, IOU_PREDICTIONS]
        low, iou = self._run(graph, [*embedding, *tensors], outputs, preferred_memory=self._cpu())
        return low.as_numpy()[0], iou.as_numpy()[0]

    def mask_bits(self, feed: Arrays) -> ByteArray:
        """See `interactive.Graphs`."""
        tensors = [self._triton.Tensor(name, np.ascontiguousarray(feed[name])) for name in feed]
        (bits,) = self._run(MASK_BITS, tensors, [MASK_BITS], preferred_memory=self._cpu())
        found: ByteArray = bits.as_numpy()
        return found

    def _cpu(self) -> Any:
        return self._triton.PreferredMemory(self._triton.TRITONSERVER_MEMORY_CPU, 0)

    def _shared(self, embedding: tuple[Any, ...]) -> list[Any]:
        """An embedding as Triton's tensors; its copy in shared memory is there for the next click.

        Each thread keeps one: 4 MiB at 1024 pixels, 16 of SAM 2. Two threads must not share a
        tensor, as Triton copies it when it is first sent.
        """
        kept = getattr(self._last, "kept", None)
        if kept is None or kept[0] is not embedding:
            pb, names = self._triton, self._encoder.output_names
            tensors = [
                pb.Tensor(name, one) if isinstance(one, np.ndarray) else one
                for name, one in zip(names, embedding, strict=True)
            ]
            kept = self._last.kept = (embedding, tensors)
        found: list[Any] = kept[1]
        return found

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
