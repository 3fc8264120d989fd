"""SAM 2's mask decoder in image mode, as far as it differs from SAM's.

After `mask_decoder.py`, `prompt_encoder.py` and `sam2_image_predictor.py` of facebookresearch/sam2
(Apache-2.0): a token for "is there an object", whose answer image mode does not look at; two finer
maps of the image added while the masks are enlarged; IoU estimates through a sigmoid; and where the
single mask is not stable, the best of the three alternatives in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import EMBEDDING_CHANNELS
from .config import ModelConfig
from .sam import build_mask_decoder

MASK_LIMIT = 32.0
"""Bound of the logits that SAM 2's predictor hands out to be prompted with again."""
STABLE_DELTA, STABLE_PART = 0.05, (49, 50)
"""A mask is stable if at least 49/50 of the pixels above -delta are above delta."""


def build_sam2_decoder(config: ModelConfig) -> nn.Module:
    """SAM's mask decoder with what SAM 2 adds; run it with `decode_masks`."""
    decoder: Any = build_mask_decoder(config)
    decoder.obj_score_token = nn.Embedding(1, EMBEDDING_CHANNELS)
    decoder.iou_prediction_head.sigmoid_output = True
    found: nn.Module = decoder
    return found


def encode_prompts(
    encoder: Any,
    points: tuple[Tensor, Tensor] | None,
    boxes: Tensor | None,
    masks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """SAM's prompt encoder, with the closing "not a point" behind boxes too.

    Arguments are those of `DbSam.decode`.
    """
    earlier = None if masks is None else masks.clamp(-MASK_LIMIT, MASK_LIMIT)
    sparse, dense = encoder(points, boxes, earlier)
    if boxes is not None:
        closing = encoder.not_a_point_embed.weight.expand(len(boxes), 1, -1)
        sparse = torch.cat([sparse, closing], 1)
    return sparse, dense


def decode_masks(
    decoder: Any,
    image: tuple[Tensor, ...],
    image_pe: Tensor,
    prompts: tuple[Tensor, Tensor],
    *,
    multimask: bool | None,
) -> tuple[Tensor, Tensor]:
    """Masks of N prompt sets on one image.

    Args:
        decoder: of `build_sam2_decoder`.
        image: its `hiera.Features`, each (1, ...).
        image_pe: (1, 256, G, G).
        prompts: sparse (N, T, 256) and dense (N, 256, G, G).
        multimask: the three alternatives in place of the single mask; None for all four.

    Returns:
        low_res_masks (N, M, 4G, 4G) and iou_predictions (N, M), M = 3, 1 or 4.
    """
    (embedding, finest, finer), (sparse, dense) = image, prompts
    own = [decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens]
    fixed = torch.cat([token.weight for token in own]).expand(len(sparse), -1, -1)
    source = embedding + dense
    queries, keys = decoder.transformer(
        source, image_pe.expand(len(sparse), -1, -1, -1), torch.cat([fixed, sparse], 1)
    )
    up1, norm, _, up2, _ = decoder.output_upscaling
    features = F.gelu(norm(up1(keys.transpose(1, 2).reshape(source.shape)) + finer))
    features = F.gelu(up2(features) + finest)
    weights = torch.stack(
        [mlp(queries[:, 2 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
    )
    masks = torch.einsum("nmc,nchw->nmhw", weights, features)
    iou = decoder.iou_prediction_head(queries[:, 1])
    if multimask:
        return masks[:, 1:], iou[:, 1:]
    single = _single(masks, iou)
    if multimask is not None:
        return single
    return torch.cat([single[0], masks[:, 1:]], 1), torch.cat([single[1], iou[:, 1:]], 1)


def _single(masks: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """Mask token 0 where it is stable, else the alternative of the highest IoU estimate."""
    inside, around = ((masks[:, 0] > edge).sum((1, 2)) for edge in (STABLE_DELTA, -STABLE_DELTA))
    stable = STABLE_PART[1] * inside >= STABLE_PART[0] * around
    chosen = torch.where(stable, 0, 1 + iou[:, 1:].argmax(1))
    row = torch.arange(len(masks), device=masks.device)
    return masks[row, chosen][:, None], iou[row, chosen][:, None]
