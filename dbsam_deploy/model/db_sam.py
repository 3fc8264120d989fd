"""The reference model: image encoder with adapter, SAM's prompt encoder and mask decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from .adapter import FourBranchAdapter, RunBlocks, TwoBranchAdapter
from .block_adapter import add_adapters
from .config import FourBranchConfig, Fusion, ModelConfig, TwoBranchConfig, variant_config
from .efficient_vit import EfficientVit
from .hiera import Features, Hiera, HieraEncoder
from .sam import build_mask_decoder, build_prompt_encoder, build_vit, set_decoder_eps
from .sam2_decoder import build_sam2_decoder, decode_masks, encode_prompts
from .tiny_vit import TinyVit

WITHOUT_VIT = (TinyVit, EfficientVit)
"""Image encoders in place of SAM's ViT, which run themselves."""


class DbSam(nn.Module):
    """A SAM-type model; `image_encoder.adapter` is absent in `sam_vit_b`.

    `encode` and `decode` run SAM's own modules, so that the deployed graphs are compared with an
    independent reference.

    Args:
        config: see `dbsam_deploy.model.config`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Any: SAM's modules carry no usable types.
        self.image_encoder: Any = _build_encoder(config)
        if config.block_adapters:
            add_adapters(self.image_encoder, config.embed_dim)
        if isinstance(config.adapter, TwoBranchConfig):
            self.image_encoder.adapter = TwoBranchAdapter(config.embed_dim, config.adapter)
        elif isinstance(config.adapter, FourBranchConfig):
            self.image_encoder.adapter = FourBranchAdapter(config.embed_dim, config.adapter)
        self.prompt_encoder: Any = build_prompt_encoder(config)
        self.mask_decoder: Any = (
            build_sam2_decoder(config) if config.hiera else build_mask_decoder(config)
        )

    def set_decoder_norm_eps(self, eps: float) -> None:
        """Compute with another `decoder_norm_eps`, which the configuration then has."""
        self.config = replace(self.config, decoder_norm_eps=eps)
        set_decoder_eps(self.mask_decoder, eps)

    def encode(self, image: Tensor) -> Tensor:
        """Encoder + fusion.

        Args:
            image: (B, 3, S, S) float32, model frame, see `dbsam_deploy.core.imaging.preprocess`.

        Returns:
            image_embeddings (B, 256, G, G).
        """
        return self.features(image)[0]

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """All that decoders take of an image, in the contract's order; see `encode`."""
        if self.config.hiera:
            found: Features = self.image_encoder(image)
            return found
        return (encode_with(self.image_encoder, self.config.stage_depth, image),)

    def trunk(self, image: Tensor) -> Tensor:
        """All of the encoder but its neck, for training what comes after it.

        Args:
            image: (B, 3, S, S) float32, model frame.

        Returns:
            (B, C, G, G); `image_encoder.neck` makes `encode`'s embeddings of it.

        Raises:
            InputError: an encoder that is no ViT of SAM's.
        """
        if self.config.hiera or isinstance(self.image_encoder, WITHOUT_VIT):
            raise InputError(
                f"{type(self.image_encoder).__name__}: expected a ViT encoder with SAM's neck, "
                "which alone can be trained without what is before it"
            )
        return trunk_with(self.image_encoder, self.config.stage_depth, image)

    def decode(
        self,
        image_embeddings: Tensor,
        *finer: Tensor,
        boxes: Tensor | None = None,
        points: tuple[Tensor, Tensor] | None = None,
        masks: Tensor | None = None,
        multimask: bool | None = False,
    ) -> tuple[Tensor, Tensor]:
        """SAM's prompt encoder and mask decoder for one image.

        Args:
            image_embeddings: (1, 256, G, G).
            *finer: the other `features`, where there are any.
            boxes: (N, 4) x0, y0, x1, y1 in the model frame.
            points: coordinates (N, P, 2) in the model frame and labels (N, P).
            masks: (N, 1, 4G, 4G) logits.
            multimask: three masks instead of the single one; None for all four, that one first.

        Returns:
            low_res_masks (N, M, 4G, 4G) and iou_predictions (N, M), M = 3, 1 or 4.
        """
        if self.config.hiera:
            return decode_masks(
                self.mask_decoder,
                (image_embeddings, *finer),
                self.prompt_encoder.get_dense_pe(),
                encode_prompts(self.prompt_encoder, points, boxes, masks),
                multimask=multimask,
            )
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        asked = dict(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        if multimask is None:
            return self.mask_decoder.predict_masks(**asked)
        return self.mask_decoder(**asked, multimask_output=multimask)

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the same number of boxes each, as in training.

        Args:
            image: (B, 3, S, S) float32, model frame.
            boxes: (B, N, 4) model frame.

        Returns:
            low_res_masks (B, N, 1, 4G, 4G) and iou_predictions (B, N, 1).
        """
        features = self.features(image)
        pairs = [
            self.decode(*(one[i : i + 1] for one in features), boxes=b) for i, b in enumerate(boxes)
        ]
        return torch.stack([m for m, _ in pairs]), torch.stack([iou for _, iou in pairs])


def _build_encoder(config: ModelConfig) -> nn.Module:
    if config.hiera is not None:
        return HieraEncoder(Hiera(config.hiera, config.image_size))
    if config.tiny_vit is not None:
        return TinyVit(config.tiny_vit, config.image_size)
    if config.efficient_vit is not None:
        return EfficientVit(config.efficient_vit, config.frame.grid)
    return build_vit(config)


def encode_with(encoder: Any, stage_depth: int, image: Tensor) -> Tensor:
    """Run an image encoder, with its adapter where it has one.

    Args:
        encoder: one of `WITHOUT_VIT`, SAM's `ImageEncoderViT`, or one with its blocks replaced, as
            the graphs do.
        stage_depth: blocks in a stage.
        image: (B, 3, S, S).
    """
    if isinstance(encoder, WITHOUT_VIT):
        return encoder(image)
    return encoder.neck(trunk_with(encoder, stage_depth, image))


def trunk_with(encoder: Any, stage_depth: int, image: Tensor) -> Tensor:
    """All of a ViT encoder but its neck; see `encode_with`.

    Returns:
        (B, C, G, G), which the neck takes.
    """
    x = encoder.patch_embed(image) + encoder.pos_embed
    blocks = list(encoder.blocks)
    stages: list[RunBlocks] = [
        nn.Sequential(*blocks[i : i + stage_depth]) for i in range(0, len(blocks), stage_depth)
    ]
    adapter = getattr(encoder, "adapter", None)
    if adapter is not None:
        return adapter(x, image, stages)
    for stage in stages:
        x = stage(x)
    return x.permute(0, 3, 1, 2)


def build_model(
    variant: str, *, image_size: int | None = None, fusion: Fusion | None = None
) -> DbSam:
    """Build a variant with fresh weights, in evaluation mode.

    Args:
        variant: a name in `VARIANTS`.
        image_size: side of the model frame; the variant's own by default.
        fusion: another fusion block for a two-branch variant.

    Raises:
        InputError: unknown variant, size or fusion.
    """
    model = DbSam(variant_config(variant, image_size=image_size, fusion=fusion))
    _init_frozen_vit(model)
    return model.eval()


def _init_frozen_vit(model: DbSam) -> None:
    """Normal(0, 0.02) for what SAM's constructor leaves at zero, so that fresh weights differ."""
    encoder = model.image_encoder
    if isinstance(encoder, WITHOUT_VIT):
        return
    if isinstance(encoder, HieraEncoder):
        for name, parameter in encoder.named_parameters():
            if "_embed" in name and "patch" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)
        return
    with torch.no_grad():
        for parameter in (
            encoder.pos_embed,
            *(p for n, p in encoder.blocks.named_parameters() if "rel_pos" in n),
        ):
            nn.init.trunc_normal_(parameter, std=0.02)
