"""The image encoder on the fused operators: attention, channel attention, deformable attention.

`FusedEncoder` is `EncoderGraph` with three kinds of modules replaced by ones that call
`torch.ops.dbsam.*` on the same weights. It runs wherever PyTorch does: on CUDA with the kernels, on
a CPU with their references, and it can be compiled, exported and captured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InputError
from ..graphs.encoder_decoder import EncoderGraph, RelPosAttention, WindowedBlock
from ..kernels import torch_ops
from ..model import DbSam
from ..model.blocks import ChannelAttentionBlock, CrossAttentionBlock, MixFFN
from ..model.deform_attn import MSDeformAttn, Shapes


class _CompactAttention(nn.Module):
    """What the fused attentions take from `RelPosAttention`: its sizes, and its tables compact.

    Args:
        attention: the module it stands for; its Linear layers are shared.
    """

    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def __init__(self, attention: RelPosAttention) -> None:
        super().__init__()
        self.num_heads, self.side = attention.num_heads, attention.side
        self.scale = float(attention.scale)
        self.qkv, self.proj = attention.qkv, attention.proj
        self.register_buffer("rel_pos_h", _compact(attention.rel_h))
        self.register_buffer("rel_pos_w", _compact(attention.rel_w))

    def attend(self, operator: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
        """An operator's answer to tokens (and their bias), with the tables and sizes."""
        tables = (self.rel_pos_h, self.rel_pos_w)
        return operator(
            *tokens, *tables, num_heads=self.num_heads, side=self.side, scale=self.scale
        )


class FusedRelPosAttention(_CompactAttention):
    """`RelPosAttention` from the compact tables.

    Args:
        attention: the module it stands for; its Linear layers are shared.
        operator: what computes the attention, with the signature of `rel_pos_attention_reference`.
    """

    def __init__(
        self,
        attention: RelPosAttention,
        operator: Callable[..., Tensor] = torch_ops.rel_pos_attention,
    ) -> None:
        super().__init__(attention)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        """(W, side·side, C) → (W, side·side, C) for W windows."""
        return self.proj(self.attend(self.operator, self.qkv(x)))


class FusedWindowedAttention(_CompactAttention):
    """`RelPosAttention` within the windows of a map, which is neither padded nor cut up.

    Args:
        attention: the module it stands for; its Linear layers are shared.
        grid: side G of the map.
    """

    def __init__(self, attention: RelPosAttention, grid: int) -> None:
        super().__init__(attention)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, G·G, C) → (B, G·G, C)."""
        qkv = self.qkv(x).unflatten(1, (self.grid, self.grid))
        out = self.attend(torch_ops.windowed_attention, qkv, self.qkv.bias)
        return self.proj(out.flatten(1, 2))


def _compact(gathered: Tensor) -> Tensor:
    """(S, S, D) by query and key position → (2S-1, D) by their distance, from -(S-1) to S-1."""
    return torch.cat((gathered[0].flip(0), gathered[1:, 0]))


class FusedChannelAttention(nn.Module):
    """`ChannelAttentionBlock` with the gate folded into the weight of its last convolution.

    Args:
        block: the module it stands for; its weights are copied into the operator's layout.
    """

    def __init__(self, block: ChannelAttentionBlock) -> None:
        super().__init__()
        self.epsilon = block.pre_norm.eps
        self.norm_weight, self.norm_bias = block.pre_norm.weight, block.pre_norm.bias
        self.dw_weight = block.conv_dw.weight
        self.fc1 = _matrix(block.se.fc1.weight[:, :, 0, 0])
        self.fc2 = _matrix(block.se.fc2.weight[:, :, 0, 0])
        self.pw_weight = _matrix(block.conv_pw.weight[:, :, 0, 0].T)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), channels last in memory."""
        grid = x.permute(0, 2, 3, 1).contiguous()
        hidden, gated_weight = torch_ops.channel_attention(
            grid,
            self.norm_weight,
            self.norm_bias,
            self.dw_weight,
            self.fc1,
            self.fc2,
            self.pw_weight,
            epsilon=self.epsilon,
        )
        out = torch.baddbmm(grid.flatten(1, 2), hidden, gated_weight)
        return out.reshape(grid.shape).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))


class FusedMsDeformAttn(nn.Module):
    """`MSDeformAttn` with everything between its Linear layers in one operator.

    Args:
        attention: the module it stands for; its Linear layers are shared.
    """

    def __init__(self, attention: MSDeformAttn) -> None:
        super().__init__()
        self.num_heads, self.num_points = attention.num_heads, attention.num_points
        self.sampling_offsets = attention.sampling_offsets
        self.attention_weights = attention.attention_weights
        self.value_proj, self.output_proj = attention.value_proj, attention.output_proj

    def forward(
        self, query: Tensor, value: Tensor, query_shapes: Shapes, value_shapes: Shapes
    ) -> Tensor:
        """See `MSDeformAttn.forward`."""
        sampled = torch_ops.ms_deform_attn(
            self.value_proj(value),
            self.sampling_offsets(query),
            self.attention_weights(query),
            num_heads=self.num_heads,
            num_points=self.num_points,
            level_shapes=[size for shape in value_shapes for size in shape],
            query_shapes=[size for shape in query_shapes for size in shape],
        )
        return self.output_proj(sampled)


class LeanMixFfn(nn.Module):
    """`MixFFN` that joins the levels only where there are several: one of them is never copied.

    Args:
        mlp: the module it stands for; its layers are shared.
    """

    def __init__(self, mlp: MixFFN) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = mlp.fc1, mlp.dwconv, mlp.fc2

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """(B, Q, dim) tokens of the levels in `shapes` → (B, Q, dim)."""
        hidden = self.fc1(x)
        maps = []
        for tokens, shape in zip(hidden.split(_lengths(shapes), 1), shapes, strict=True):
            plane = tokens.transpose(1, 2).unflatten(2, shape)
            maps.append(self.dwconv(plane).flatten(2).transpose(1, 2))
        return self.fc2(F.gelu(_join(maps)))


class FusedMixFfn(nn.Module):
    """`MixFFN` with everything between its Linear layers in one operator.

    Args:
        mlp: the module it stands for; its weights are shared.
    """

    def __init__(self, mlp: MixFFN | LeanMixFfn) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        convolution = mlp.dwconv.dwconv
        self.dw_weight, self.dw_bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """(B, Q, dim) tokens of the levels in `shapes`, which are all the same → (B, Q, dim).

        Raises:
            InputError: levels of several shapes.
        """
        (height, width), *others = dict.fromkeys(shapes)
        if others:
            raise InputError(f"depthwise_conv_gelu: levels {shapes}, expected all of one shape")
        hidden = torch_ops.depthwise_conv_gelu(
            self.fc1(x), self.dw_weight, self.dw_bias, height=height, width=width
        )
        return self.fc2(hidden)


class LeanCrossAttention(nn.Module):
    """`CrossAttentionBlock` on `FusedMsDeformAttn` and `LeanMixFfn`.

    Args:
        block: the module it stands for, its attention replaced already.
    """

    def __init__(self, block: CrossAttentionBlock) -> None:
        super().__init__()
        self.query_norm, self.value_norm = block.query_norm, block.value_norm
        self.ffn_pre_norm = block.ffn_pre_norm
        self.attn: nn.Module = block.attn
        self.mlp = LeanMixFfn(block.mlp)

    def forward(self, query: list[Tensor], value: list[Tensor]) -> list[Tensor]:
        """See `CrossAttentionBlock.forward`; the maps are channels last in memory."""
        shapes: Shapes = tuple((q.shape[2], q.shape[3]) for q in query)
        value_shapes: Shapes = tuple((v.shape[2], v.shape[3]) for v in value)
        x = _join([q.flatten(2).transpose(1, 2) for q in query])
        v = _join([m.flatten(2).transpose(1, 2) for m in value])
        x = x + self.attn(self.query_norm(x), self.value_norm(v), shapes, value_shapes)
        x = x + self.mlp(self.ffn_pre_norm(x), shapes)
        parts = x.split(_lengths(shapes), 1)
        return [
            part.transpose(1, 2).unflatten(2, shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]


def _lengths(shapes: Shapes) -> list[int]:
    return [height * width for height, width in shapes]


def _join(levels: list[Tensor]) -> Tensor:
    """(B, N, C) tokens of several levels in one tensor."""
    return levels[0] if len(levels) == 1 else torch.cat(levels, 1)


_Table = dict[type[nn.Module], Any]
_REPLACEMENTS: _Table = {
    RelPosAttention: FusedRelPosAttention,
    ChannelAttentionBlock: FusedChannelAttention,
    MSDeformAttn: FusedMsDeformAttn,
    CrossAttentionBlock: LeanCrossAttention,
}
FUSED_OPERATORS: dict[str, type[nn.Module]] = {
    "rel_pos_attention": FusedRelPosAttention,
    "channel_attention": FusedChannelAttention,
    "ms_deform_attn": FusedMsDeformAttn,
    "depthwise_conv_gelu": FusedMixFfn,
    "windowed_attention": FusedWindowedAttention,
}
"""Operator → the module that calls it."""


class FusedEncoder(nn.Module):
    """`encoder` of the contract on the fused operators: image (B, 3, S, S) → (B, 256, G, G).

    Args:
        model: reference model; it is copied, not changed.
        optional: of `recipe.OPTIONAL_FUSIONS`, operators that are called as well.

    Raises:
        InputError: the variant has none of the fused operators.
    """

    def __init__(self, model: DbSam, optional: Collection[str] = ()) -> None:
        super().__init__()
        if model.config.hiera:
            raise _none_of_them(model)
        self.graph = EncoderGraph(model)
        if "windowed_attention" in optional:
            _attend_on_maps(self.graph)
        _replace(self.graph, _REPLACEMENTS)
        if "depthwise_conv_gelu" in optional:
            _replace(self.graph, {LeanMixFfn: FusedMixFfn})
        for module in self.graph.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.detach()
                module.weight.data = weight.contiguous(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)
        if not any(self.calls.values()):
            raise _none_of_them(model)

    @property
    def calls(self) -> dict[str, int]:
        """How often one run of the encoder calls each operator."""
        modules = list(self.graph.modules())
        return {
            name: sum(isinstance(module, kind) for module in modules)
            for name, kind in FUSED_OPERATORS.items()
        }

    def forward(self, image: Tensor) -> Tensor:
        """Float32 in and out, whatever dtype the weights have."""
        return self.graph(image.contiguous(memory_format=torch.channels_last))


def _none_of_them(model: DbSam) -> InputError:
    return InputError(
        f"variant {model.config.name} has none of the fused operators "
        f"({', '.join(FUSED_OPERATORS)}); use backend pytorch or onnxruntime"
    )


def _attend_on_maps(graph: EncoderGraph) -> None:
    """Leave windows to the attention: a block hands it the whole map, and cuts up none itself."""
    for block in graph.modules():
        if isinstance(block, WindowedBlock) and block.window:
            block.add_module("attn", FusedWindowedAttention(block.attn, block.grid))
            block.window = 0


def _replace(parent: nn.Module, table: _Table) -> None:
    """Put the table's modules in place of the others, below `parent`, innermost first."""
    for name, child in list(parent.named_children()):
        _replace(child, table)
        replacement = table.get(type(child))
        if replacement is not None:
            setattr(parent, name, replacement(child))
