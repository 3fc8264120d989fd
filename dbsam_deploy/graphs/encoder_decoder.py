"""Model → `EncoderGraph`, `DecoderGraph`: tensors in, tensors out, ready for every exporter.

The graphs compute what SAM's modules compute, written so that exporters see only static H and W:
batch and prompt axes are carried by `-1` or by broadcasting (no shape arithmetic), relative
position tables are interpolated beforehand, `LayerNorm2d` is a transposed LayerNorm, and image
features are shared between prompts by broadcasting instead of `repeat_interleave`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..core.contract import (
    BATCH,
    HAS_MASK_INPUT,
    IMAGE,
    NUM_BOXES,
    NUM_POINTS,
    NUM_PROMPTS,
    POINT_LABELS,
    Geometry,
    graph_specs,
)
from ..core.errors import ExportError, InputError
from ..fusions.rel_pos_attention import head_groups, supports
from ..model import DbSam
from ..model.blocks import ChannelLayerNorm
from ..model.conv_branch import ConvBlock
from ..model.db_sam import WITHOUT_VIT, encode_with
from ..model.deform_attn import DeformableSampling, MSDeformAttn, Shapes
from ..model.efficient_vit import ConvNorm, EfficientVit
from ..model.sam import LayerNorm2d, ViTBlock, get_rel_pos
from ..model.tiny_vit import AttentionBlock, ConvBn, WindowAttention
from .prompt_decoder import DecoderGraph, PromptDecoderGraph
from .sam2_graphs import Sam2DecoderGraph, Sam2EncoderGraph, Sam2PromptDecoderGraph


class RelPosAttention(nn.Module):
    """SAM's ViT `Attention` with its relative position tables gathered for one window size.

    Heads are taken in groups, see `head_groups`, where no fused operator does it.

    Args:
        attention: SAM's module.
        side: height and width of the token window.
    """

    rel_h: Tensor
    rel_w: Tensor

    def __init__(self, attention: Any, side: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.side = attention.num_heads, attention.scale, side
        self.qkv, self.proj = attention.qkv, attention.proj
        fused = supports(attention.rel_pos_h.shape[-1], side)
        self.groups = 1 if fused else head_groups(self.num_heads, side)
        # (side, side, D): row i holds the embedding of every key position relative to query i
        for name in ("rel_h", "rel_w"):
            table = getattr(attention, name.replace("rel_", "rel_pos_"))
            self.register_buffer(name, get_rel_pos(side, side, table).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(W, side·side, C) → (W, side·side, C) for W windows."""
        tokens, dim = self.side * self.side, x.shape[-1]
        depth = dim // self.num_heads
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.num_heads, depth).permute(2, 0, 3, 1, 4)
        parts = qkv.unbind(0)
        if self.groups == 1:
            out = self._attend(*parts)
        else:
            groups = zip(*(part.chunk(self.groups, 1) for part in parts), strict=True)
            out = torch.cat([self._attend(*group) for group in groups], 1)
        return self.proj(out.transpose(1, 2).reshape(-1, tokens, dim))

    def _attend(self, *parts: Tensor) -> Tensor:
        """Queries, keys and values, (W, H, side·side, D) each, → the same, for H of the heads."""
        side, tokens, (heads, depth) = self.side, self.side * self.side, parts[0].shape[1::2]
        q, k, v = (part.reshape(-1, tokens, depth) for part in parts)
        # The bias uses the unscaled query, as in SAM.
        grid = q.reshape(-1, side, side, depth)
        bias_h = grid @ self.rel_h.transpose(1, 2)
        bias_w = (grid.transpose(1, 2) @ self.rel_w.transpose(1, 2)).transpose(1, 2)
        scores = (q * self.scale) @ k.transpose(1, 2)
        scores = scores.reshape(-1, tokens, side, side)
        scores = scores + bias_h.reshape(-1, tokens, side, 1)
        scores = scores + bias_w.reshape(-1, tokens, 1, side)
        out = scores.reshape(-1, tokens, tokens).softmax(-1) @ v
        return out.reshape(-1, heads, tokens, depth)


class WindowedBlock(nn.Module):
    """SAM's ViT `Block` on a fixed G×G grid.

    Padding tokens of incomplete windows take part in the attention unmasked, as in SAM.
    """

    def __init__(self, block: Any, grid: int) -> None:
        super().__init__()
        self.grid, self.window = grid, block.window_size
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = RelPosAttention(block.attn, self.window or grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) → (B, G, G, C)."""
        y = self._windowed(self.norm1(x)) if self.window else self._global(self.norm1(x))
        x = x + y
        return x + self.mlp(self.norm2(x))

    def _global(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).reshape(-1, self.grid, self.grid, x.shape[-1])

    def _windowed(self, x: Tensor) -> Tensor:
        size, dim = self.window, x.shape[-1]
        pad = -self.grid % size
        count = (self.grid + pad) // size
        x = F.pad(x, (0, 0, 0, pad, 0, pad))
        x = x.reshape(-1, count, size, count, size, dim).permute(0, 1, 3, 2, 4, 5)
        x = self.attn(x.reshape(-1, size * size, dim))
        x = x.reshape(-1, count, count, size, size, dim).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, self.grid + pad, self.grid + pad, dim)
        return x[:, : self.grid, : self.grid]


class BatchedSampling(DeformableSampling):
    """`DeformableSampling` of equally large levels: one GridSample, the levels on its batch axis.

    The graph is then the same for any number of levels, and no samples are concatenated. Points
    come before queries (P, Q), so that sums over them run along contiguous queries.
    """

    def forward(
        self, value: Tensor, shapes: Shapes, offsets: Tensor, weights: Tensor, centres: Tensor
    ) -> Tensor:
        """See `DeformableSampling.forward`.

        Raises:
            ExportError: levels of different shapes.
        """
        if len(set(shapes)) > 1:
            raise ExportError(
                f"deformable attention over maps of {shapes}: expected maps of one shape"
            )
        height, width = shapes[0]
        levels, (queries, heads, points) = len(shapes), (offsets.shape[i] for i in (1, 2, 4))
        depth = value.shape[-1]
        size = offsets.new_tensor([width, height], dtype=torch.float32)
        # (B, Q, H, L, P, …) → (B, L, H, P, Q, …), its first three axes being GridSample's batch
        location = centres[:, :, None, None] + offsets.float() / size
        grid = (2 * location - 1).permute(0, 3, 2, 4, 1, 5).reshape(-1, points, queries, 2)
        weights = weights.float().reshape(-1, queries, heads, levels * points).softmax(-1)
        weights = weights.reshape(-1, queries, heads, levels, points).permute(0, 3, 2, 4, 1)
        value = value.float().reshape(-1, levels, height * width, heads, depth)
        plane = value.permute(0, 1, 3, 4, 2).reshape(-1, depth, height, width)
        sampled = F.grid_sample(
            plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        summed = (sampled * weights.reshape(-1, 1, points, queries)).sum(2)
        summed = summed.reshape(-1, levels, heads * depth, queries).sum(1)
        return summed.transpose(1, 2)


class MatrixUpsample(nn.Module):
    """Bicubic interpolation of a map of a fixed side, as a product with its weights on both sides.

    ONNX's Resize asks for the map's shape at run time. The weights stand on the left, where no
    recipe takes them for a layer's.

    Args:
        source: side of the map.
        side: of the result.
    """

    weights: Tensor

    def __init__(self, source: int, side: int) -> None:
        super().__init__()
        unit = torch.eye(source)[None, None]
        weights = F.interpolate(unit, (side, source), mode="bicubic", align_corners=False)[0, 0]
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, source, source) → (B, C, side, side)."""
        rows = (self.weights @ x).transpose(2, 3)
        return (self.weights @ rows).transpose(2, 3)


def _rewrite_upsampling(encoder: Any, image_size: int) -> None:
    """Give the neck of EfficientViT-SAM constant weights for its interpolation."""
    sides = [image_size]
    for _ in encoder.backbone.stages:
        sides.append(-(-sides[-1] // 2))
    for place, source in zip(encoder.neck.input_ops, sides[:-4:-1], strict=True):
        side = place.op_list[1].side
        if source != side:
            place.op_list[1] = MatrixUpsample(source, side)


def rewrite_layer_norms(module: nn.Module) -> None:
    """Replace every SAM `LayerNorm2d` below `module` by `ChannelLayerNorm` on the same weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LayerNorm2d):
                norm = ChannelLayerNorm(len(child.weight), eps=child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)


def _rewrite_blocks(encoder: Any) -> None:
    """Replace the blocks of SAM's ViT by `WindowedBlock`."""
    grid = encoder.pos_embed.shape[1]
    for name, block in list(encoder.blocks.named_children()):
        if not isinstance(block, ViTBlock):
            raise InputError(f"ViT block {name} is a {type(block).__name__}, not SAM's Block")
        setattr(encoder.blocks, name, WindowedBlock(block, grid))


class SplitWindowAttention(nn.Module):
    """`WindowAttention` with a layer each for queries, keys and values.

    A runtime that computes attention in one go reads them where their layers left them, whereas
    the three thirds of each head of one layer have to be copied apart.

    Args:
        attention: what it computes; its weights are taken apart, its queries' scale goes into them.
    """

    bias: Tensor

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.num_heads = heads = attention.num_heads
        self.norm, self.proj = attention.norm, attention.proj
        dim = attention.proj.in_features
        weights = attention.qkv.weight.reshape(heads, 3, dim // heads, dim).unbind(1)
        biases = attention.qkv.bias.reshape(heads, 3, dim // heads).unbind(1)
        scales = ((dim // heads) ** -0.5, 1, 1)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in scales)
        for layer, weight, bias, scale in zip(
            (self.q, self.k, self.v), weights, biases, scales, strict=True
        ):
            layer.weight = nn.Parameter(weight.reshape(dim, dim) * scale)
            layer.bias = nn.Parameter(bias.reshape(dim) * scale)
        table = attention.attention_biases[:, attention.attention_bias_idxs]
        self.register_buffer("bias", table.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(windows, w*w, C) → (windows, w*w, C)."""
        x = self.norm(x)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def _split_attention(module: nn.Module) -> None:
    """Replace every `WindowAttention` below `module` by `SplitWindowAttention`."""
    for block in module.modules():
        if isinstance(block, AttentionBlock):
            block.add_module("attn", SplitWindowAttention(block.attn))


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold every BatchNorm below `module` into the convolution before it."""
    for block in module.modules():
        if isinstance(block, ConvBlock) and isinstance(block.bn, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
        elif isinstance(block, ConvBn) and isinstance(block.bn, nn.BatchNorm2d):
            block.c = fuse_conv_bn_eval(block.c, block.bn)
            block.bn = nn.Identity()
        elif isinstance(block, ConvNorm) and isinstance(block.norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.norm)
            block.norm = nn.Identity()


class EncoderGraph(nn.Module):
    """`encoder`: image (B, 3, S, S) → image_embeddings (B, 256, G, G).

    Args:
        model: reference model; it is copied, not changed.
    """

    def __init__(self, model: DbSam) -> None:
        super().__init__()
        self.stage_depth = model.config.stage_depth
        encoder = copy.deepcopy(model.image_encoder).eval()
        if not isinstance(encoder, WITHOUT_VIT):
            _rewrite_blocks(encoder)
        if isinstance(encoder, EfficientVit):
            _rewrite_upsampling(encoder, model.config.image_size)
        rewrite_layer_norms(encoder)
        _fold_batch_norms(encoder)
        _split_attention(encoder)
        for module in encoder.modules():
            if isinstance(module, MSDeformAttn):
                module.sampling = BatchedSampling()
        self.image_encoder: Any = encoder

    def forward(self, image: Tensor) -> Tensor:
        """See the class; float32 in and out, whatever dtype the weights have."""
        image = image.to(next(self.image_encoder.parameters()).dtype)
        return encode_with(self.image_encoder, self.stage_depth, image).float()


def build_graph(model: DbSam, name: str) -> nn.Module:
    """Build one of the contract's graphs from a reference model.

    Args:
        model: reference model, left unchanged.
        name: `encoder`, `decoder` or `prompt_decoder`.

    Raises:
        InputError: another name.
    """
    builders: dict[str, type[nn.Module]] = {
        "encoder": EncoderGraph,
        "decoder": DecoderGraph,
        "prompt_decoder": PromptDecoderGraph,
    }
    if model.config.hiera:
        builders = {
            "encoder": Sam2EncoderGraph,
            "decoder": Sam2DecoderGraph,
            "prompt_decoder": Sam2PromptDecoderGraph,
        }
    if name not in graph_specs(model.config.frame) or name not in builders:
        raise InputError(f"graph {name!r}: expected one of {', '.join(builders)}")
    graph = builders[name](model).eval()
    return graph.requires_grad_(False)


def example_inputs(
    name: str, size: Geometry, *, batch: int = 2, prompts: int = 3
) -> dict[str, Tensor]:
    """Random inputs of a graph in the contract's order, with distinct sizes for dynamic axes."""
    sizes = {BATCH: batch, NUM_BOXES: prompts, NUM_PROMPTS: prompts, NUM_POINTS: 5}
    out = {}
    for spec in graph_specs(size)[name].inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        if spec.name == POINT_LABELS:
            out[spec.name] = torch.randint(-1, 4, shape, dtype=torch.int32)
        elif spec.frame == "model" and spec.name != IMAGE:
            out[spec.name] = torch.rand(shape) * size.frame_side
        elif spec.name == HAS_MASK_INPUT:
            out[spec.name] = torch.randint(0, 2, shape).float()
        else:
            out[spec.name] = torch.randn(shape)
    return out
