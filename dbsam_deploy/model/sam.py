"""The one place that imports SAM's modules, without SAM's top-level package.

`import segment_anything` needs torchvision (for its predictor), which has no CPU build for every
torch. The `modeling` sub-package needs only torch, so it is loaded by path under a private name.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contract import EMBEDDING_CHANNELS, PATCH_SIZE
from ..core.errors import EngineError, MissingError
from ..extras import pip_line
from .config import ModelConfig

_PRIVATE_NAME = "dbsam_deploy.model._segment_anything_modeling"


def _load_modeling() -> ModuleType:
    if _PRIVATE_NAME in sys.modules:
        return sys.modules[_PRIVATE_NAME]
    found = importlib.util.find_spec("segment_anything")
    if found is None or not found.submodule_search_locations:
        raise MissingError(
            "the model needs segment_anything, which is not installed", pip_line("export")
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "modeling"
    spec = importlib.util.spec_from_file_location(
        _PRIVATE_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise EngineError(f"segment-anything in {folder.parent} has no modeling package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PRIVATE_NAME] = module
    spec.loader.exec_module(module)
    return module


_modeling = _load_modeling()

ImageEncoderViT: Any = _modeling.ImageEncoderViT
PromptEncoder: Any = _modeling.PromptEncoder
MaskDecoder: Any = _modeling.MaskDecoder
TwoWayTransformer: Any = _modeling.TwoWayTransformer
LayerNorm2d: Any = sys.modules[f"{_PRIVATE_NAME}.common"].LayerNorm2d
MLPBlock: Any = sys.modules[f"{_PRIVATE_NAME}.common"].MLPBlock
_image_encoder: Any = sys.modules[f"{_PRIVATE_NAME}.image_encoder"]
ViTBlock: Any = _image_encoder.Block
get_rel_pos: Any = _image_encoder.get_rel_pos
SCORES_BYTES = 4 << 20
"""How much of its attention a block of SAM's ViT has at once: what a processor's cache holds."""


class ViTAttention(_image_encoder.Attention):
    """SAM's, some queries at a time, so that its scores never lie in memory as a whole.

    At 1024 pixels SAM's own has 12 heads of 4096 × 4096, three times over. Added in place and in
    the order of `add_decomposed_rel_pos`, they are the same numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        batch, height, width, channels = x.shape
        tokens, sides = height * width, (height, width)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (part.flatten(0, 1) for part in qkv)
        grid = q.view(-1, *sides, q.shape[-1])
        table_h, table_w = map(get_rel_pos, sides, sides, (self.rel_pos_h, self.rel_pos_w))
        bias_h = torch.einsum("nhwc,hkc->nhwk", grid, table_h).flatten(1, 2)[..., None]
        bias_w = torch.einsum("nhwc,wkc->nhwk", grid, table_w).flatten(1, 2)[..., None, :]
        most = max(1, SCORES_BYTES // (tokens * x.element_size()))  # queries
        heads, queries = max(1, most // tokens), min(most, tokens)
        found = []
        by_head = (y.split(heads) for y in (q * self.scale, bias_h, bias_w, k, v))
        for *asked, keys, values in zip(*by_head, strict=True):
            parts = zip(*(y.split(queries, 1) for y in asked), strict=True)
            found.append(torch.cat([self._attend(part, keys, values) for part in parts], 1))
        out = torch.cat(found).view(batch, self.num_heads, height, width, -1)
        projected: Tensor = self.proj(out.permute(0, 2, 3, 1, 4).reshape(batch, *sides, channels))
        return projected

    @staticmethod
    def _attend(asked: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        """(N, Q, D) of scaled queries, with (N, Q, H, 1) and (N, Q, 1, W) for their scores."""
        q, bias_h, bias_w = asked
        scores = q @ k.transpose(1, 2)
        maps = scores.view(*scores.shape[:2], bias_h.shape[2], bias_w.shape[3])
        maps += bias_h
        maps += bias_w
        return scores.softmax(-1) @ v


_image_encoder.Attention = ViTAttention  # of which its blocks are made


def build_vit(config: ModelConfig) -> nn.Module:
    """SAM's `ImageEncoderViT` (patch embedding, blocks, neck) at the variant's width and depth."""
    stage = config.stage_depth
    return ImageEncoderViT(
        img_size=config.image_size,
        patch_size=PATCH_SIZE,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        out_chans=EMBEDDING_CHANNELS,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        use_rel_pos=True,
        window_size=config.window_size,
        global_attn_indexes=tuple(range(stage - 1, config.depth, stage)),
    )


def build_prompt_encoder(config: ModelConfig) -> nn.Module:
    """SAM's `PromptEncoder` for the variant's image size."""
    grid = config.frame.grid
    return PromptEncoder(
        embed_dim=EMBEDDING_CHANNELS,
        image_embedding_size=(grid, grid),
        input_image_size=(config.frame.frame_side, config.frame.frame_side),
        mask_in_chans=16,
    )


def build_mask_decoder(config: ModelConfig) -> nn.Module:
    """SAM's `MaskDecoder` with its two-way transformer, as in ViT-B."""
    decoder: nn.Module = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=EMBEDDING_CHANNELS, mlp_dim=2048, num_heads=8
        ),
        transformer_dim=EMBEDDING_CHANNELS,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    set_decoder_eps(decoder, config.decoder_norm_eps)
    final: Any = decoder.get_submodule("transformer.norm_final_attn")
    final.eps = config.final_norm_eps
    return decoder


def set_decoder_eps(decoder: nn.Module, eps: float) -> None:
    """Set `eps` of the LayerNorms within the blocks of a mask decoder."""
    for module in decoder.get_submodule("transformer.layers").modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
