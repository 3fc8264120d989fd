"""Runtimes behind one interface: tensors of the contract in, tensors of the contract out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .artefact import Artefact
from .contract import GraphSpec, graph_specs
from .errors import EngineError, InputError
from .extras import TORCH_GPU_LINE
from .onnxruntime_providers import (
    CPU,
    PROVIDERS,
    import_onnxruntime,
    open_session,
    require_provider,
)
from .prompts import BOTTOM_RIGHT, NO_POINT, TOP_LEFT

if TYPE_CHECKING:
    from torch import Tensor

    from .model import DbSam

FloatArray = npt.NDArray[np.float32]
Feed = dict[str, npt.NDArray[Any]]
IMAGE_EMBEDDINGS = "image_embeddings"


class Session(Protocol):
    """Runs the graphs of one model; `backend` names the runtime."""

    backend: str

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """Run `graph` (`encoder`, `decoder`, `prompt_decoder`) on arrays named by its contract."""
        ...


def check_feed(spec: GraphSpec, feed: Feed) -> None:
    """Compare a feed with the contract before a runtime sees it.

    Raises:
        InputError: a missing or unknown name, another dtype, or a shape that does not fit.
    """
    if set(feed) != set(spec.input_names):
        raise InputError(f"{spec.name}: got inputs {sorted(feed)}, expected {spec.input_names}")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = feed[tensor.name]
        if array.dtype != tensor.dtype:
            raise InputError(f"{tensor.name}: dtype {array.dtype}, expected {tensor.dtype}")
        fits = array.ndim == len(tensor.axes) and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis) and size > 0
            for size, axis in zip(array.shape, tensor.axes, strict=True)
        )
        if not fits:
            raise InputError(f"{tensor.name}: shape {array.shape}, expected {tensor.axes}")


class OnnxRuntimeSession:
    """The exported graphs on ONNX Runtime; graphs are loaded when first used.

    Args:
        artefact: a published export.
        device: `cpu` or `cuda`.
        threads: intra-op threads, 0 for one per core.

    Raises:
        EngineError: onnxruntime or the device's provider is missing or incomplete. A session never
            runs on another device than the one it was asked for.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, artefact: Artefact, *, device: str = "cpu", threads: int = 0) -> None:
        if device not in self.devices:
            raise InputError(f"device {device!r}: expected {' or '.join(self.devices)}")
        self._runtime, self._provider = import_onnxruntime(), PROVIDERS[device]
        require_provider(self._runtime, self._provider)
        self.backend = f"onnxruntime-{device}"
        self._artefact, self._threads = artefact, threads
        self._specs = graph_specs(artefact.preprocessing)
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        if graph not in self._sessions:
            self._sessions[graph] = open_session(
                self._runtime,
                self._model(graph),
                self._provider,
                threads=self._threads,
                options=self._options(spec),
            )
        outputs = self._sessions[graph].run(spec.output_names, feed)
        return dict(zip(spec.output_names, outputs, strict=True))

    def _model(self, graph: str) -> str | bytes:
        """The file, or what stands for it on the CPU."""
        path = self._artefact.path(graph)
        if self._provider is CPU and graph in self._artefact.quantization.get("graphs", ()):
            from .cpu_graph import read_cpu_graph  # onnx takes a while to import

            return read_cpu_graph(path)
        return str(path)

    def _options(self, spec: GraphSpec) -> dict[str, str]:
        """Provider options of one graph's session."""
        return {}


class PytorchSession:
    """The reference: SAM's own modules in PyTorch, not the graphs, prompt set by prompt set.

    Args:
        model: a built model, see `dbsam_deploy.model.build_model`.
        device: `cpu` or `cuda`.

    Raises:
        EngineError: `cuda` on a machine without it.
    """

    def __init__(self, model: DbSam, *, device: str = "cpu") -> None:
        import torch

        if device not in ("cpu", "cuda"):
            raise InputError(f"device {device!r}: expected cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"device cuda: this torch {torch.__version__} sees no CUDA device; use --device "
                f"cpu, or, where there is a GPU, {TORCH_GPU_LINE}"
            )
        self.backend = f"pytorch-{device}"
        self._model = model.to(device).eval()
        self._device = device
        self._specs = graph_specs(model.config.frame)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        import torch

        spec = self._specs[graph]
        check_feed(spec, feed)
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in feed.items()}
        with torch.inference_mode():
            if graph == "encoder":
                outputs = [self._model.encode(inputs["image"])]
            else:
                rows = [self._decode(graph, inputs, i) for i in range(len(feed[IMAGE_EMBEDDINGS]))]
                outputs = [torch.stack(column) for column in zip(*rows, strict=True)]
        arrays = (tensor.cpu().numpy() for tensor in outputs)
        return dict(zip(spec.output_names, arrays, strict=True))

    def _decode(self, graph: str, inputs: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
        """Masks (N, M, 4G, 4G) and IoU (N, M) of image `index`."""
        import torch

        embeddings = inputs[IMAGE_EMBEDDINGS][index : index + 1]
        if graph == "decoder":
            return self._model.decode(embeddings, boxes=inputs["boxes"][index])
        prompts = zip(
            inputs["point_coords"][index],
            inputs["point_labels"][index],
            inputs["mask_input"][index],
            inputs["has_mask_input"][index],
            strict=True,
        )
        rows = [self._decode_prompt(embeddings, *prompt) for prompt in prompts]
        masks, iou = (torch.cat(column) for column in zip(*rows, strict=True))
        return masks, iou

    def _decode_prompt(
        self, embeddings: Tensor, coords: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All four mask tokens of one prompt set, through SAM's own prompt encoder."""
        import torch

        ending = labels[-2:].tolist()
        if ending == [TOP_LEFT, BOTTOM_RIGHT]:
            boxes, count = coords[-2:].reshape(1, 4), len(labels) - 2
        elif ending[-1:] == [NO_POINT]:
            boxes, count = None, len(labels) - 1  # SAM adds the closing point itself
        else:
            raise InputError(
                f"point_labels end with {ending}: expected a box's corners (2, 3) or -1"
            )
        points = (coords[None, :count], labels[None, :count]) if count else None
        masks = mask[None] if float(has_mask) else None
        parts = [
            self._model.decode(
                embeddings, boxes=boxes, points=points, masks=masks, multimask=multimask
            )
            for multimask in (False, True)
        ]
        return torch.cat([m for m, _ in parts], 1), torch.cat([iou for _, iou in parts], 1)
