"""SAM 2's model in image mode as graphs, with the finer maps that the decoders take.

What follows from weights alone is computed beforehand: the table of positions, and each pair of
1×1 convolutions that a finer map goes through as one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contract import NUM_MASK_TOKENS
from ..model import DbSam
from ..model.hiera import Features, Hiera
from ..model.sam2_decoder import MASK_LIMIT, STABLE_DELTA, STABLE_PART
from .prompt_decoder import MaskGraph, PromptMaskGraph, image_tokens


class Sam2EncoderGraph(nn.Module):
    """`encoder`: image (B, 3, S, S) → image_embeddings, high_res_feats_0, high_res_feats_1.

    Args:
        model: reference model; it is copied, not changed.
    """

    positions: Tensor

    def __init__(self, model: DbSam) -> None:
        super().__init__()
        encoder: Any = copy.deepcopy(model.image_encoder).eval()
        self.trunk: Hiera = encoder.trunk
        self.register_buffer("positions", encoder.trunk.positions().detach())
        coarse, middle, finer, finest = (stage.conv for stage in encoder.neck.convs)
        with torch.no_grad():
            middle.bias += encoder.no_mem_embed.reshape(-1)
        self.coarse, self.middle = coarse, middle
        self.finer, self.finest = _joined(finer, encoder.conv_s1), _joined(finest, encoder.conv_s0)

    def forward(self, image: Tensor) -> Features:
        """See the class; float32 in and out, whatever dtype the weights have."""
        finest, finer, middle, coarse = self.trunk(image.to(self.positions.dtype), self.positions)
        embedding = self.middle(middle) + _doubled(self.coarse(coarse))
        return embedding.float(), self.finest(finest).float(), self.finer(finer).float()


def _joined(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Two 1×1 convolutions that follow each other as one."""
    joined = nn.Conv2d(first.in_channels, second.out_channels, 1)
    outer = second.weight[:, :, 0, 0].double()
    bias = outer @ _bias(first).double() + _bias(second).double()
    with torch.no_grad():
        joined.weight.copy_((outer @ first.weight[:, :, 0, 0].double())[:, :, None, None])
        _bias(joined).copy_(bias)
    return joined


def _bias(convolution: nn.Conv2d) -> Tensor:
    bias: Any = convolution.bias
    found: Tensor = bias
    return found


def _doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, 2H, 2W), each cell four times."""
    x = torch.stack((x, x), -1).flatten(-2)
    return torch.stack((x, x), -2).flatten(2, 3)


class Sam2DecoderGraph(MaskGraph):
    """`decoder` of SAM 2: boxes → one mask each."""

    def __init__(self, model: DbSam) -> None:
        super().__init__(model, mask_tokens=NUM_MASK_TOKENS, shared=True)

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        boxes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """low_res_masks (B, N, 1, 4G, 4G), iou_predictions (B, N, 1)."""
        empty = self.prompt.no_mask_embed.weight
        tokens = image_tokens(image_embeddings.to(empty.dtype)) + empty
        corners = self.corner_tokens(boxes)
        closing = self.prompt.not_a_point_embed.weight + corners[:, :, :1] * 0
        sparse = torch.cat((corners, closing), 2)
        finer = (high_res_feats_0.to(empty.dtype), high_res_feats_1.to(empty.dtype))
        masks, iou = single_mask(*self.predict(tokens, sparse, finer))
        return masks.float(), iou.float()


class Sam2PromptDecoderGraph(PromptMaskGraph):
    """`prompt_decoder` of SAM 2: sets that end with a point labelled -1 → all four masks."""

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """low_res_masks (B, N, 4, 4G, 4G), iou_predictions (B, N, 4)."""
        sparse = self.point_tokens(point_coords, point_labels)
        earlier = mask_input.to(sparse.dtype).clamp(-MASK_LIMIT, MASK_LIMIT)
        tokens = self.prompted_tokens(image_embeddings, earlier, has_mask_input)
        finer = (high_res_feats_0.to(sparse.dtype), high_res_feats_1.to(sparse.dtype))
        masks, iou = self.predict(tokens, sparse, finer)
        single, score = single_mask(masks, iou)
        masks, iou = torch.cat((single, masks[:, :, 1:]), 2), torch.cat((score, iou[:, :, 1:]), 2)
        return masks.float(), iou.float()


def single_mask(masks: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """Mask token 0 where it is stable, else the alternative of the highest IoU estimate.

    Pixels are counted as whole numbers: there may be more than half precision can count.

    Args:
        masks: (B, N, 4, 4G, 4G) logits.
        iou: (B, N, 4).

    Returns:
        (B, N, 1, 4G, 4G) and (B, N, 1).
    """
    inside, around = (
        (masks[:, :, 0] > edge).to(torch.int32).sum((2, 3), dtype=torch.int32)
        for edge in (STABLE_DELTA, -STABLE_DELTA)
    )
    stable = (STABLE_PART[1] * inside >= STABLE_PART[0] * around)[..., None]
    best, score = masks[:, :, 1:2], iou[:, :, 1:2]
    for token in range(2, NUM_MASK_TOKENS):
        better = iou[:, :, token : token + 1] > score
        best = torch.where(better[..., None, None], masks[:, :, token : token + 1], best)
        score = torch.where(better, iou[:, :, token : token + 1], score)
    first = torch.where(stable[..., None, None], masks[:, :, :1], best)
    return first, torch.where(stable, iou[:, :, :1], score)
