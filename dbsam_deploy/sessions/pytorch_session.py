"""The reference: SAM's own modules in PyTorch, behind the interface of the graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.contract import (
    BOXES,
    HAS_MASK_INPUT,
    IMAGE,
    IMAGE_EMBEDDINGS,
    MASK_INPUT,
    POINT_COORDS,
    POINT_LABELS,
    graph_specs,
)
from ..core.errors import EngineError, InputError
from ..core.imaging import FloatArray
from ..core.prompts import BOTTOM_RIGHT, NO_POINT, TOP_LEFT
from ..extras import TORCH_GPU_LINE
from .session import Feed, check_feed

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import DbSam


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
                outputs = list(self._model.features(inputs[IMAGE]))
            else:
                rows = [self._decode(graph, inputs, i) for i in range(len(feed[IMAGE_EMBEDDINGS]))]
                outputs = [torch.stack(column) for column in zip(*rows, strict=True)]
        arrays = (tensor.cpu().numpy() for tensor in outputs)
        return dict(zip(spec.output_names, arrays, strict=True))

    def _decode(self, graph: str, inputs: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
        """Masks (N, M, 4G, 4G) and IoU (N, M) of image `index`."""
        import torch

        names = self._specs["encoder"].output_names
        features = [inputs[name][index : index + 1] for name in names]
        if graph == "decoder":
            return self._model.decode(*features, boxes=inputs[BOXES][index])
        prompts = zip(
            inputs[POINT_COORDS][index],
            inputs[POINT_LABELS][index],
            inputs[MASK_INPUT][index],
            inputs[HAS_MASK_INPUT][index],
            strict=True,
        )
        rows = [self._decode_prompt(features, *prompt) for prompt in prompts]
        masks, iou = (torch.cat(column) for column in zip(*rows, strict=True))
        return masks, iou

    def _decode_prompt(
        self,
        features: list[Tensor],
        coords: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """All four mask tokens of one prompt set, through SAM's own prompt encoder."""
        if labels[-3:].tolist() == [TOP_LEFT, BOTTOM_RIGHT, NO_POINT]:
            coords, labels = coords[:-1], labels[:-1]  # SAM 2's model adds the closing point itself
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
        return self._model.decode(
            *features, boxes=boxes, points=points, masks=masks, multimask=None
        )
