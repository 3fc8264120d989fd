"""The deployed graphs' form of a decoder on a model's own weights, so that it can be trained.

It computes what SAM's modules do in half the time, and encodes prompts in float32: under autocast
SAM's own code rounds them to bfloat16, which moves them as far as one pixel of 1024 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs.prompt_decoder import PromptMaskGraph, image_tokens
from ..model import DbSam


@dataclass(frozen=True)
class GivenPrompts:
    """What the prompt encoder takes of N objects of one image; see `DbSam.decode`."""

    boxes: Tensor | None = None
    points: tuple[Tensor, Tensor] | None = None
    masks: Tensor | None = None

    def corners_and_points(self) -> tuple[Tensor, Tensor]:
        """Coordinates (1, N, P, 2) and labels (1, N, P) in SAM's order and with its filling."""
        places: list[Tensor] = []
        labels: list[Tensor] = []
        if self.points is not None:
            places.append(self.points[0])
            labels.append(self.points[1])
        if self.boxes is not None:
            places.append(self.boxes.unflatten(-1, (2, 2)))
            labels.append(torch.tensor([2, 3], device=self.boxes.device).expand(len(self.boxes), 2))
        else:
            places.append(torch.zeros_like(places[0][:, :1]))
            labels.append(torch.full_like(labels[0][:, :1], -1))
        return torch.cat(places, 1)[None], torch.cat(labels, 1)[None]


class LiveDecoder(nn.Module):
    """All four masks of prompts of any kind, with the weights of a model and their gradients.

    Args:
        model: its prompt encoder and decoder are used, not copied.
    """

    def __init__(self, model: DbSam) -> None:
        super().__init__()
        self._of_image = _Live(model, shared=True)
        self._of_prompt = _Live(model, shared=False)

    def forward(self, embeddings: Tensor, prompts: GivenPrompts) -> tuple[Tensor, Tensor]:
        """As `DbSam.decode` with `multimask=None`.

        Args:
            embeddings: (1, 256, G, G).
            prompts: of N objects.

        Returns:
            low_res_masks (N, 4, 4G, 4G) and iou_predictions (N, 4), float32.
        """
        graph = self._of_image if prompts.masks is None else self._of_prompt
        masks, iou = graph(embeddings, prompts)
        return masks[0].float(), iou[0].float()


class _Live(PromptMaskGraph):
    """A graph whose weights are the model's."""

    def __init__(self, model: DbSam, *, shared: bool) -> None:
        super().__init__(model, shared=shared, copied=False)
        upscale = self.decoder.output_upscaling
        self.up1, self.up2 = _LiveUpscale(upscale[0]), _LiveUpscale(upscale[3])

    def forward(self, embeddings: Tensor, prompts: GivenPrompts) -> tuple[Tensor, Tensor]:
        """See `LiveDecoder.forward`; with a leading axis of 1."""
        with torch.autocast(embeddings.device.type, enabled=False):
            sparse = self.point_tokens(*prompts.corners_and_points())
        tokens = image_tokens(embeddings)
        if prompts.masks is None:
            tokens = tokens + self.prompt.no_mask_embed.weight
        else:
            tokens = tokens + self.dense_tokens(prompts.masks[None])
        return self.predict(tokens, sparse)


class _LiveUpscale(nn.Module):
    """`_Upscale` of a convolution that changes."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, P, C) → (B, N, P·4, C'): for each pixel its four, rows first."""
        own = self.convolution
        weight = own.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return F.linear(x, weight, own.bias.repeat(4)).unflatten(-1, (4, -1)).flatten(2, 3)
