"""Model variants as data. A variant is a name and a frozen `ModelConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from ..core.choices import choose
from ..core.contract import PATCH_SIZE, check_image_size
from ..core.errors import InputError
from ..core.imaging import Mode, Preprocessing

PyramidKind = Literal["lfip0", "lfip6"]
Fusion = Literal["dane", "dane3", "figure"]
ChannelAttentionPosition = Literal["before", "after", "none"]
BlockKind = Literal["pair", "fused", "bottleneck", "attention"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What both adapters have.

    Attributes:
        num_heads: heads of the deformable attention.
        num_points: sampling points per head and level.
        fusion_reduction: bottleneck factor of the fusion block.
    """

    num_heads: int = 12
    num_points: int = 4
    fusion_reduction: int = 12


@dataclass(frozen=True, kw_only=True)
class TwoBranchConfig(AdapterConfig):
    """Adapter of the paper: ViT branch and convolution branch, coupled after each stage.

    Attributes:
        pyramid: convolution branch, `lfip6` (paper) or `lfip0` (repository default).
        levels: pyramid levels in use; each is one map on the ViT's grid.
        stem_channels: widths of the convolution branch before it reaches the embedding width.
        fusion: ViT-Conv fusion block: `dane` and `dane3` as coded, `figure` as in the paper.
        channel_attention: where the channel attention block stands in a stage; with `none` its
            parameters exist and are unused, as in the official code.
    """

    pyramid: PyramidKind = "lfip6"
    levels: tuple[int, ...] = (3,)
    stem_channels: tuple[int, ...] = (256, 512)
    fusion: Fusion = "dane"
    channel_attention: ChannelAttentionPosition = "before"


@dataclass(frozen=True, kw_only=True)
class FourBranchConfig(AdapterConfig):
    """Adapter of the released `db_sam_plus` configuration: five maps, joint self-attention.

    Attributes:
        levels: pyramid levels of the `lfip0` convolution branch.
        stem_channels: widths of the convolution branch.
        num_conv_gates: gates for convolution maps in the fusion; the checkpoint has one more than
            there are maps, and the last is never used.
    """

    levels: tuple[int, ...] = (1, 2, 3, 4)
    stem_channels: tuple[int, ...] = (128, 256, 512)
    num_conv_gates: int = 5


@dataclass(frozen=True)
class TinyVitConfig:
    """Image encoder of LiteMedSAM and MobileSAM, see `dbsam_deploy.model.tiny_vit`.

    Attributes, one entry a stage but for the first:
        patch_stride: of both convolutions of the patch embedding; with 1 they are 1×1, else 3×3.
        embed_dims: channels.
        depths: blocks; those of the first stage are convolutions, the others attend in windows.
        num_heads: attention heads; the first stage has none.
        window_sizes: side of the attention windows in tokens; not used in the first stage.
        strides: on the way from a stage to the next, one fewer than stages.
    """

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (0, 4, 5, 10)
    window_sizes: tuple[int, ...] = (0, 7, 14, 7)
    strides: tuple[int, ...] = (2, 2, 1)
    patch_stride: int = 1

    @property
    def embedding_stride(self) -> int:
        """Pixels a cell of the embedding."""
        return self.patch_stride**2 * math.prod(self.strides)


@dataclass(frozen=True, kw_only=True)
class EfficientVitConfig:
    """Image encoder of EfficientViT-SAM, see `dbsam_deploy.model.efficient_vit`.

    Attributes, the first five with one entry a stage:
        widths: channels.
        depths: blocks after the one that halves the size.
        kinds: of the blocks.
        expand: width inside a block, in multiples of its own; four times that where it halves.
        attention_kernel: side of the neighbourhood that the attention sums.
        head_dim: channels of an attention head.
        neck_depth: blocks of the neck.
        neck_expand: width inside them.
        frame_size: side of the model frame, whatever the image size of the encoder is: prompts and
            masks are in SAM's.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 1, 1, 4, 4)
    kinds: tuple[BlockKind, ...] = ("pair", "fused", "fused", "bottleneck", "attention")
    expand: tuple[int, ...] = (1, 4, 4, 4, 6)
    attention_kernel: int = 5
    head_dim: int = 32
    neck_depth: int = 4
    neck_expand: int = 1
    frame_size: int = 1024


@dataclass(frozen=True)
class HieraConfig:
    """Image encoder of SAM 2, see `dbsam_deploy.model.hiera`.

    Attributes:
        embed_dim: channels of the first stage, doubled by each further one.
        num_heads: its attention heads, likewise.
        depths: blocks of each stage.
        global_blocks: blocks that attend to the whole map, counted through all stages.
        window_sizes: side of each stage's attention windows in tokens.
        position_side: side of the coarse table of positions.
    """

    embed_dim: int = 96
    num_heads: int = 1
    depths: tuple[int, ...] = (1, 2, 7, 2)
    global_blocks: tuple[int, ...] = (5, 7, 9)
    window_sizes: tuple[int, ...] = (8, 4, 14, 7)
    position_side: int = 7

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The last block of each stage."""
        return tuple(end - 1 for end in accumulate(self.depths))


@dataclass(frozen=True)
class ModelConfig:
    """One variant.

    Attributes:
        name: the variant's name.
        image_size: side in pixels of the image that the encoder takes: the model frame, but for
            `efficient_vit`.
        embed_dim: ViT width.
        depth: ViT blocks; four stages of depth/4.
        num_heads: ViT heads.
        norm_eps: eps of the ViT's LayerNorms: 1e-6 in SAM, 1e-5 as DB-SAM builds its ViT.
        adapter: the branch beside the ViT, or None for plain SAM.
        preprocessing: how images enter the model, see `dbsam_deploy.core.imaging`.
        window_size: side of the windows of local attention, in tokens.
        tiny_vit: a TinyViT instead of SAM's ViT, whose fields are then not used.
        efficient_vit: an EfficientViT, likewise.
        decoder_norm_eps: eps of the LayerNorms within the mask decoder's blocks: 1e-5 in SAM, 1e-6
            in transformers' `SamModel`.
        final_norm_eps: eps of the one after them.
        block_adapters: an adapter within each ViT block, as SAM-Med2D has it.
        hiera: SAM 2's encoder instead of SAM's ViT, whose fields are then not used, and SAM 2's
            decoder.
    """

    name: str
    image_size: int = 1024
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    norm_eps: float = 1e-5
    adapter: TwoBranchConfig | FourBranchConfig | None = None
    preprocessing: Mode = "sam"
    window_size: int = 14
    tiny_vit: TinyVitConfig | None = None
    efficient_vit: EfficientVitConfig | None = None
    decoder_norm_eps: float = 1e-5
    final_norm_eps: float = 1e-5
    block_adapters: bool = False
    hiera: HieraConfig | None = None

    @property
    def frame(self) -> Preprocessing:
        """The model frame: how images enter, and the sizes of the graphs."""
        stride = self.tiny_vit.embedding_stride if self.tiny_vit else PATCH_SIZE
        own = self.efficient_vit.frame_size if self.efficient_vit else self.image_size
        return Preprocessing(
            self.image_size,
            self.preprocessing,
            embedding_stride=stride,
            frame_size=own if own != self.image_size else None,
            high_res=self.hiera is not None,
        )

    @property
    def stage_depth(self) -> int:
        """ViT blocks in each of the four stages; the last of a stage attends globally."""
        return self.depth // 4


def _efficient_vit_sam(size: str, *, image_size: int = 512, **encoder: Any) -> ModelConfig:
    """One size of EfficientViT-SAM; the arguments are those of `EfficientVitConfig`."""
    return ModelConfig(
        f"efficientvit_sam_{size}",
        image_size,
        efficient_vit=EfficientVitConfig(**encoder),
        decoder_norm_eps=1e-6,
        final_norm_eps=1e-6,
    )


def _sam2(size: str, embed_dim: int = 96, num_heads: int = 1, **trunk: Any) -> ModelConfig:
    """One size of SAM 2; the arguments are those of `HieraConfig`."""
    hiera = HieraConfig(embed_dim=embed_dim, num_heads=num_heads, **trunk)
    return ModelConfig(f"sam2_hiera_{size}", preprocessing="sam2", hiera=hiera)


_LARGEST: dict[str, Any] = {
    "image_size": 1024,
    "widths": (32, 64, 128, 256, 512, 1024),
    "kinds": ("pair", "fused", "fused", "fused", "attention", "attention"),
    "expand": (1, 4, 4, 4, 4, 6),
    "attention_kernel": 3,
    "neck_expand": 4,
}
"""What its sizes `xl0` and `xl1` have."""
_CONFIGS = (
    ModelConfig("db_sam", adapter=TwoBranchConfig()),
    ModelConfig(
        "db_sam_4level",
        adapter=TwoBranchConfig(
            pyramid="lfip0", levels=(1, 2, 3, 4), stem_channels=(128, 256, 512)
        ),
    ),
    ModelConfig("db_sam_plus", adapter=FourBranchConfig()),
    ModelConfig("sam_vit_b", norm_eps=1e-6),
    ModelConfig("sam_vit_l", embed_dim=1024, depth=24, num_heads=16, norm_eps=1e-6),
    ModelConfig("sam_vit_h", embed_dim=1280, depth=32, num_heads=16, norm_eps=1e-6),
    ModelConfig("medsam_vit_b", norm_eps=1e-6, preprocessing="medsam"),
    ModelConfig(
        "db_sam_tiny",
        embed_dim=128,
        depth=8,
        num_heads=2,
        adapter=TwoBranchConfig(stem_channels=(48, 96), num_heads=2, fusion_reduction=8),
    ),
    ModelConfig(
        "lite_medsam", image_size=256, preprocessing="lite_medsam", tiny_vit=TinyVitConfig()
    ),
    ModelConfig(
        "sam_med2d",
        image_size=256,
        norm_eps=1e-6,
        preprocessing="sam_med2d",
        block_adapters=True,
    ),
    ModelConfig("mobile_sam", tiny_vit=TinyVitConfig(patch_stride=2)),
    _efficient_vit_sam("l0"),
    _efficient_vit_sam("l1", depths=(1, 1, 1, 6, 6), neck_depth=8),
    _efficient_vit_sam("l2", depths=(1, 2, 2, 8, 8), neck_depth=12),
    _efficient_vit_sam("xl0", depths=(0, 1, 1, 2, 3, 3), neck_depth=6, **_LARGEST),
    _efficient_vit_sam("xl1", depths=(1, 2, 2, 4, 6, 6), neck_depth=12, **_LARGEST),
    _sam2("tiny"),
    _sam2("small", depths=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    _sam2("base_plus", 112, 2, depths=(2, 3, 16, 3), global_blocks=(12, 16, 20), position_side=14),
    _sam2(
        "large",
        144,
        2,
        depths=(2, 6, 36, 4),
        global_blocks=(23, 33, 43),
        window_sizes=(8, 4, 16, 8),
    ),
    ModelConfig("medsam2", image_size=512, preprocessing="medsam2", hiera=HieraConfig()),
)

VARIANTS: dict[str, ModelConfig] = {config.name: config for config in _CONFIGS}
"""Variant name → configuration. `medsam_vit_b` is `sam_vit_b` with MedSAM 1.0's preprocessing, and
`medsam2` is `sam2_hiera_tiny` at MedSAM2's image size and with its preprocessing."""
HIERA_STEP = 32
"""Pixels of a cell of Hiera's last stage, and the step of its image sizes."""


def variant_config(
    name: str, *, image_size: int | None = None, fusion: Fusion | None = None
) -> ModelConfig:
    """Configuration of a variant, optionally at another image size or with another fusion block.

    Raises:
        InputError: unknown name, size, or a fusion for a variant without a two-branch adapter.
    """
    config = choose("variant", name, VARIANTS)
    if image_size is not None:
        step = HIERA_STEP if config.hiera else PATCH_SIZE
        config = replace(config, image_size=check_image_size(image_size, step))
    if fusion is not None:
        if not isinstance(config.adapter, TwoBranchConfig):
            raise InputError(
                f"variant {name} has no selectable fusion; use db_sam or db_sam_4level"
            )
        config = replace(config, adapter=replace(config.adapter, fusion=fusion))
    return config
