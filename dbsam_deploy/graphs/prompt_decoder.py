"""Prompt encoder + mask decoder as one graph, for B images with N independent prompts each.

Float inputs and outputs are float32 whatever dtype the weights have; coordinates stay float32.
Tensors carry both axes, (B, N, …): image features keep N = 1 until a prompt changes them, so what
depends on the image alone is computed once, and no axis has to be expanded or repeated.
"""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import NUM_MASK_TOKENS
from ..model import DbSam

LONGEST_SUM = 128
"""Terms that ONNX Runtime's matrix product always sums in one piece."""


class PointEncoding(nn.Module):
    """SAM's `PositionEmbeddingRandom` for points; an FP32 island (coordinates reach 1024).

    Args:
        prompt_encoder: SAM's prompt encoder.
    """

    gaussian: Tensor

    def __init__(self, prompt_encoder: Any) -> None:
        super().__init__()
        self.image_size = prompt_encoder.input_image_size[0]
        matrix = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        self.register_buffer("gaussian", matrix.detach().clone())

    def forward(self, points: Tensor) -> Tensor:
        """(..., 2) x, y pixels in the model frame → (..., 256)."""
        unit = (points + 0.5) / self.image_size * 2 - 1
        phase = unit @ self.gaussian * (2 * math.pi)
        return torch.cat((phase.sin(), phase.cos()), -1)


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM's decoder `Attention` among the tokens of a prompt, (B, N, T, C)."""
    heads, depth = attention.num_heads, attention.internal_dim // attention.num_heads
    q, k, v = (
        projection(x).unflatten(-1, (heads, depth)).transpose(2, 3)
        for projection, x in (
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
        )
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(depth)).softmax(-1)
    return attention.out_proj((weights @ v).transpose(2, 3).flatten(-2))


class CrossAttention(nn.Module):
    """SAM's decoder `Attention` between the few tokens of each prompt and all pixels of an image.

    A head's scores are `token · W · pixel`. Here W is multiplied with the tokens, one row for each
    head and token (H·T = 56 for a box), so that no pixel is projected to 128 channels for each
    prompt. A row that belongs to one head is a token's projection with the other heads' channels
    set to 0.

    Args:
        attention: SAM's module.
        grid: G, for G·G pixels.
        shared: the pixels are those of the image, the same for all prompts: projected once.
    """

    heads_only: Tensor
    ones: Tensor

    def __init__(self, attention: Any, grid: int, *, shared: bool) -> None:
        super().__init__()
        self.attention, self.shared = attention, shared
        self.block = _rows_at_once(grid) * grid
        self.heads, channels = attention.num_heads, attention.internal_dim
        self.scale = 1 / math.sqrt(channels // self.heads)
        own = torch.eye(self.heads).repeat_interleave(channels // self.heads, 1)
        self.register_buffer("heads_only", own[:, None])
        self.register_buffer("ones", torch.ones(1, max(self.heads, grid * grid // self.block)))

    def by_head(self, tokens: Tensor) -> Tensor:
        """(B, N, T, C) → (B, N, H·T, C)."""
        return (tokens[:, :, None] * self.heads_only).flatten(2, 3)


def _rows_at_once(grid: int) -> int:
    """Most rows of G pixels that divide the grid and whose sums are not cut."""
    fitting = (rows for rows in range(1, grid + 1) if grid % rows == 0)
    return max((rows for rows in fitting if rows * grid <= LONGEST_SUM), default=1)


class TokensSeePixels(CrossAttention):
    """From (B, 1 or N, P, C) pixels to (B, N, T, C) tokens."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B, N, T, C); keys and values (B, 1 or N, P, C) → (B, N, T, C)."""
        own = self.attention
        rows = self.by_head(own.q_proj(queries) * self.scale)
        if self.shared:
            keys, values = own.k_proj(keys), own.v_proj(values)
        else:  # the bias of the keys adds the same to all scores of a token
            rows = rows @ own.k_proj.weight
        seen = self._weighted((rows @ keys.transpose(-1, -2)).softmax(-1), values)
        if not self.shared:
            seen = own.v_proj(seen)
        seen = (seen.unflatten(2, (self.heads, -1)) * self.heads_only).transpose(2, 3)
        return own.out_proj((self.ones[:, : self.heads] @ seen).squeeze(3))

    def _weighted(self, weights: Tensor, values: Tensor) -> Tensor:
        """`weights @ values` as a sum over blocks of pixels.

        Libraries cut a long sum into pieces that depend on how many threads and prompts there are,
        and so would the last bits of the masks.
        """
        channels, block = values.shape[-1], self.block
        parts = weights.unflatten(-1, (-1, block)).transpose(2, 3)
        sums = parts @ values.unflatten(2, (-1, block))
        return (self.ones[:, : sums.shape[2]] @ sums.flatten(3)).unflatten(-1, (-1, channels))[
            :, :, 0
        ]


class PixelsSeeTokens(CrossAttention):
    """From (B, N, T, C) tokens to (B, 1 or N, P, C) pixels."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B, 1 or N, P, C); keys and values (B, N, T, C) → (B, N, P, C)."""
        own = self.attention
        rows = self.by_head(own.k_proj(keys) * self.scale)
        if self.shared:
            scores = rows @ own.q_proj(queries).transpose(-1, -2)
        else:
            more = rows @ own.q_proj.bias[:, None]
            scores = (rows @ own.q_proj.weight) @ queries.transpose(-1, -2) + more
        scores = scores.unflatten(2, (self.heads, -1))
        weights = _softmax_over_tokens(scores, keys).flatten(2, 3).transpose(-1, -2)
        seen = self.by_head(own.v_proj(values)) @ own.out_proj.weight.T
        return weights @ (seen + own.out_proj.bias / self.heads)


def _softmax_over_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, H, T, P) → the same over T, step by step along the many pixels.

    ONNX Runtime transposes for a softmax that is not over the last axis. Sums are products with
    ones, which keep the dtype, and have the size of `tokens` (B, N, T, C).
    """
    ones = (tokens[..., :1] * 0 + 1).transpose(2, 3)[:, :, None]
    powers = (scores - scores.max(3, keepdim=True).values).exp()
    return powers / (ones @ powers)


class MaskGraph(nn.Module):
    """What both decoder graphs share: two-way transformer, upscaling, hypernetworks.

    Args:
        model: reference model; it is copied, not changed.
        mask_tokens: how many mask tokens are computed, counted from the single-mask token.
        shared: the prompts' pixels are the same until a prompt's tokens change them.
        copied: False computes with the model's own modules, for training them.
    """

    image_pe: Tensor
    up1: nn.Module
    up2: nn.Module

    def __init__(
        self, model: DbSam, mask_tokens: int, *, shared: bool, copied: bool = True
    ) -> None:
        super().__init__()
        self.mask_tokens = mask_tokens
        parts = model.prompt_encoder, model.mask_decoder
        self.prompt: Any
        self.decoder: Any
        self.prompt, self.decoder = copy.deepcopy(parts) if copied else parts
        self.prompt.eval()
        self.decoder.eval()
        self.grid = model.prompt_encoder.image_embedding_size[0]
        self.points = PointEncoding(self.prompt)
        pe = self.prompt.get_dense_pe().detach()
        self.register_buffer("image_pe", pe.flatten(2).transpose(1, 2)[None])
        grid, transformer = self.grid, self.decoder.transformer
        self.to_tokens, self.to_pixels = nn.ModuleList(), nn.ModuleList()
        for number, layer in enumerate(transformer.layers):
            same, seeing = shared and number == 0, layer.cross_attn_image_to_token
            self.to_tokens.append(
                TokensSeePixels(layer.cross_attn_token_to_image, grid, shared=same)
            )
            self.to_pixels.append(PixelsSeeTokens(seeing, grid, shared=same))
        final = transformer.final_attn_token_to_image
        self.to_tokens.append(TokensSeePixels(final, grid, shared=False))
        upscale = self.decoder.output_upscaling
        self.up1, self.up1_norm, self.up2 = _Upscale(upscale[0]), upscale[1], _Upscale(upscale[3])

    def corner_tokens(self, boxes: Tensor) -> Tensor:
        """Boxes (B, N, 4) → sparse prompt embeddings (B, N, 2, 256)."""
        corners = self.points(boxes.unflatten(-1, (2, 2)))
        embeddings = self.prompt.point_embeddings
        labels = torch.cat([embeddings[2].weight, embeddings[3].weight])
        return corners.to(labels.dtype) + labels

    def predict(
        self, image: Tensor, sparse: Tensor, finer: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """SAM's `predict_masks`, and SAM 2's with finer maps.

        Args:
            image: (B, 1 or N, G·G, 256) image + dense prompt embeddings.
            sparse: (B, N, T, 256) sparse prompt embeddings.
            finer: (B, 32, 4G, 4G) and (B, 64, 2G, 2G) maps of SAM 2.

        Returns:
            low_res_masks (B, N, M, 4G, 4G), iou_predictions (B, N, M), in the weights' dtype.
        """
        decoder, count = self.decoder, self.mask_tokens
        learned = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if finer is not None:
            learned.append(decoder.obj_score_token.weight)  # image mode looks at no answer of it
        fixed = torch.cat(learned)
        # (B, N, 1, 1) of zeros spreads the learned tokens over the dynamic axes by broadcasting.
        tokens = torch.cat((fixed + sparse[:, :, :1, :1] * 0, sparse), 2)
        queries, keys = self._two_way(image, tokens)
        iou = decoder.iou_prediction_head(queries[:, :, 0])
        weights = torch.stack(
            [decoder.output_hypernetworks_mlps[i](queries[:, :, 1 + i]) for i in range(count)], 2
        )
        masks = weights @ self._upscaled(keys, finer).transpose(-1, -2)
        return self._in_rows(masks), iou[..., :count]

    def _upscaled(self, features: Tensor, finer: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, G·G, 256) → (B, N, G·G·16, 32), see `_in_rows` for the order of the pixels."""
        norm = self.up1_norm
        features = self.up1(features)
        if finer is not None:
            features = features + self._within_cells(finer[1], 1)
        features = F.layer_norm(features, norm.weight.shape, norm.weight, norm.bias, norm.eps)
        features = self.up2(F.gelu(features))
        if finer is not None:
            features = features + self._within_cells(finer[0], 2)
        return F.gelu(features)

    def _within_cells(self, x: Tensor, halvings: int) -> Tensor:
        """(B, C, H, W) → (B, 1, H·W, C) in the order of `_in_rows`."""
        parts = (self.grid, *(2,) * halvings)
        x = x.unflatten(3, parts).unflatten(2, parts)
        rows, columns = range(2, 3 + halvings), range(3 + halvings, x.dim())
        axes = chain.from_iterable(zip(rows, columns, strict=True))
        return x.permute(0, *axes, 1).flatten(1, -2)[:, None]

    def _in_rows(self, masks: Tensor) -> Tensor:
        """(B, N, M, G·G·16) cell by cell, each with its 2×2 and their 2×2 → (B, N, M, 4G, 4G)."""
        count, grid = masks.shape[2], self.grid
        cells = masks.flatten(1, 2).unflatten(2, (grid, grid, 2, 2, 2, 2))
        rows = cells.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5, 7).flatten(2, 4)
        return rows.unflatten(1, (-1, count))

    def _two_way(self, keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's `TwoWayTransformer`, with LayerNorm after every residual.

        Returns:
            What the tokens of IoU and masks have become (B, N, 1 + M, 256), and the pixels.
        """
        transformer, pe, queries = self.decoder.transformer, self.image_pe, tokens
        crossings = zip(transformer.layers, self.to_tokens, self.to_pixels, strict=False)
        for layer, to_tokens, to_pixels in crossings:
            if layer.skip_first_layer_pe:
                queries = _attend(layer.self_attn, queries, queries, queries)
            else:
                q = queries + tokens
                queries = queries + _attend(layer.self_attn, q, q, queries)
            queries = layer.norm1(queries)
            k = keys + pe
            attended = to_tokens(queries + tokens, k, keys)
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.mlp(queries))
            keys = layer.norm4(keys + to_pixels(k, queries + tokens, queries))
        read = slice(0, 1 + self.mask_tokens)
        queries, tokens = queries[:, :, read], tokens[:, :, read]
        queries = queries + self.to_tokens[-1](queries + tokens, keys + pe, keys)
        return transformer.norm_final_attn(queries), keys


class _Upscale(nn.Module):
    """ConvTranspose2d with kernel = stride = 2, channels last, any number of leading axes.

    Such a convolution is one matrix product per pixel, whose 2×2 here stay together.
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        inputs, outputs = convolution.weight.shape[:2]
        self.outputs = outputs
        self.linear = nn.Linear(inputs, 4 * outputs)
        with torch.no_grad():
            # (in, out, dy, dx) → (dy, dx, out, in)
            weight = convolution.weight.permute(2, 3, 1, 0).reshape(4 * outputs, inputs)
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(convolution.bias.repeat(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, P, C) → (B, N, P·4, C'): for each pixel its four, rows first."""
        return self.linear(x).unflatten(-1, (4, self.outputs)).flatten(2, 3)


def image_tokens(image_embeddings: Tensor) -> Tensor:
    """(B, 256, G, G) → (B, 1, G·G, 256)."""
    return image_embeddings.flatten(2).transpose(1, 2)[:, None]


class DecoderGraph(MaskGraph):
    """`decoder`: image_embeddings (B, 256, G, G), boxes (B, N, 4) → one mask for each box."""

    def __init__(self, model: DbSam) -> None:
        super().__init__(model, mask_tokens=1, shared=True)

    def forward(self, image_embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """low_res_masks (B, N, 1, 4G, 4G), iou_predictions (B, N, 1)."""
        empty = self.prompt.no_mask_embed.weight
        tokens = image_tokens(image_embeddings.to(empty.dtype)) + empty
        masks, iou = self.predict(tokens, self.corner_tokens(boxes))
        return masks.float(), iou.float()


class PromptMaskGraph(MaskGraph):
    """Prompts of every kind as tokens, for a graph that gives all four masks of each set."""

    def __init__(self, model: DbSam, *, shared: bool = False, copied: bool = True) -> None:
        super().__init__(model, NUM_MASK_TOKENS, shared=shared, copied=copied)

    def point_tokens(self, coords: Tensor, labels: Tensor) -> Tensor:
        """SAM's `_embed_points` and `_embed_boxes`, by label.

        Args:
            coords: (B, N, P, 2) model frame.
            labels: (B, N, P): -1 no point, 0, 1, 2 and 3 as in SAM's point embeddings.

        Returns:
            (B, N, P, 256).
        """
        encoded = self.points(coords)
        names = [self.prompt.not_a_point_embed, *self.prompt.point_embeddings]
        table = torch.cat([name.weight for name in names])
        encoded = encoded.to(table.dtype) * (labels >= 0).to(table.dtype)[..., None]
        return encoded + F.embedding(labels.long() + 1, table)

    def dense_tokens(self, mask_input: Tensor) -> Tensor:
        """SAM's `_embed_masks` on (B, N, 1, 4G, 4G) → (B, N, G·G, 256)."""
        scale: Any = self.prompt.mask_downscaling
        x = mask_input.squeeze(2)[..., None]
        for convolution, norm in ((scale[0], scale[1]), (scale[3], scale[4])):
            x = _halve(x) @ convolution.weight.permute(2, 3, 1, 0).flatten(0, 2) + convolution.bias
            x = F.gelu(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        return (x @ scale[6].weight[:, :, 0, 0].T + scale[6].bias).flatten(2, 3)

    def prompted_tokens(
        self, image_embeddings: Tensor, mask_input: Tensor, has_mask_input: Tensor
    ) -> Tensor:
        """Image + dense prompt embeddings (B, N, G·G, 256), of the graph's inputs."""
        empty = self.prompt.no_mask_embed.weight
        flag = has_mask_input[..., None, None].to(empty.dtype)
        dense = self.dense_tokens(mask_input.to(empty.dtype)) * flag + empty * (1 - flag)
        return image_tokens(image_embeddings.to(empty.dtype)) + dense


class PromptDecoderGraph(PromptMaskGraph):
    """`prompt_decoder`: points, box corners and earlier masks → all four mask tokens."""

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """low_res_masks (B, N, 4, 4G, 4G), iou_predictions (B, N, 4)."""
        sparse = self.point_tokens(point_coords, point_labels)
        tokens = self.prompted_tokens(image_embeddings, mask_input, has_mask_input)
        masks, iou = self.predict(tokens, sparse)
        return masks.float(), iou.float()


def _halve(x: Tensor) -> Tensor:
    """(B, N, H, W, C) → (B, N, H/2, W/2, 4C): each 2×2 patch, rows first, on the channel axis."""
    patches = [x[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
    return torch.cat(patches, -1)
