"""`windowed_attention`: the kernels on the CPU emulation against the float32 reference."""

from __future__ import annotations

import ctypes
import functools
import sys

import pytest
import torch
from support.references import check_close
from torch import Tensor, nn

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels.library import call, host_library
from dbsam_deploy.kernels.torch_ops import (
    DTYPE_CODES,
    rel_pos_attention_reference,
    windowed_attention_reference,
)
from dbsam_deploy.model.sam import ViTBlock

HEAD_DIM = 64
MARGIN = 64
"""Elements of NaN before and after every tensor: read or written, they show."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)

SIZES = {
    "one token": (2, 1, 1, 1, 1),
    "a map within a window, one token of it": (1, 1, 1, 14, 2),
    "a map within a window": (2, 3, 11, 14, 1),
    "whole windows": (1, 10, 5, 5, 2),
    "ragged windows": (2, 7, 12, 5, 2),
    "windows with two tiles, ragged ones with one": (1, 14, 20, 14, 1),
    "a row and a column beyond the windows": (1, 15, 15, 14, 1),
    "strips of one column, ragged": (1, 17, 20, 17, 1),
}
"""What is special → batch, height, width, side, heads."""
SLOW_SIZES = {
    "SAM's at 512": (1, 32, 32, 14, 2),
    "three strips": (1, 35, 33, 33, 1),
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return host_library("windowed_attention")


def _inputs(batch: int, height: int, width: int, side: int, heads: int, dtype: str) -> Inputs:
    packed = 3 * heads * HEAD_DIM
    qkv = torch.randn(batch, height, width, packed)
    tables = 0.3 * torch.randn(2, 2 * side - 1, HEAD_DIM)
    return tuple(t.to(DTYPES[dtype]) for t in (qkv, torch.randn(packed), *tables))


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (…, heads, 64) of queries, keys and values."""
    return qkv.unflatten(-1, (3, -1, HEAD_DIM)).unbind(-3)


def _between_nans(tensor: Tensor) -> Tensor:
    padded = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    return padded[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor)


def _run(library: ctypes.CDLL, *inputs: Tensor, scale: float = 0.125) -> Tensor:
    """The kernel's output in its dtype, from an output that held NaN."""
    qkv, side = inputs[0], (len(inputs[2]) + 1) // 2
    batch, height, width, packed = qkv.shape
    tensors = [_between_nans(tensor) for tensor in inputs]
    shape = (batch, height, width, packed // 3)
    padded = torch.full((qkv.numel() // 3 + 2 * MARGIN,), torch.nan, dtype=qkv.dtype)
    out = padded[MARGIN:-MARGIN].view(shape)
    addresses = [tensor.data_ptr() for tensor in (*tensors, out)]
    sizes = (batch, height, width, side, packed // (3 * HEAD_DIM), HEAD_DIM)
    entry, code = "dbsam_windowed_attention", DTYPE_CODES[qkv.dtype]
    call(library, entry, *addresses, *sizes, scale, code, None)
    assert padded[:MARGIN].isnan().all()
    assert padded[-MARGIN:].isnan().all()
    return out


def _expected(*inputs: Tensor, scale: float = 0.125) -> Tensor:
    """The reference, computed in float32 from the rounded inputs."""
    side, heads = (len(inputs[2]) + 1) // 2, inputs[0].shape[-1] // (3 * HEAD_DIM)
    wide = (tensor.float() for tensor in inputs)
    return windowed_attention_reference(*wide, num_heads=heads, side=side, scale=scale)


def _check(found: Tensor, expected: Tensor) -> None:
    name = f"{str(found.dtype).removeprefix('torch.')} kernel"
    check_close(found.float().numpy(), expected.numpy(), name)


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(64, 64, 14), (28, 14, 14), (5, 7, 14), (9, 4, 3), (1, 1, 2)],
    ids=str,
)
def test_the_reference_is_sams_own_attention_within_windows(height, width, side):
    """`window_partition`, `Attention` and `window_unpartition` of segment-anything."""
    heads, channels = 2, 16
    block = ViTBlock(channels, heads, use_rel_pos=True, window_size=side, input_size=(side, side))
    sam, attention = sys.modules[ViTBlock.__module__], block.attn
    attention.proj = nn.Identity()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, height, width, channels)
    with torch.inference_mode():
        windows, padded = sam.window_partition(x, side)
        expected = sam.window_unpartition(attention(windows), side, padded, (height, width))
        found = windowed_attention_reference(
            attention.qkv(x),
            attention.qkv.bias,
            attention.rel_pos_h,
            attention.rel_pos_w,
            num_heads=heads,
            side=side,
            scale=attention.scale,
        )
    check_close(found.numpy(), expected.numpy(), "float32")


@EACH_DTYPE
@pytest.mark.parametrize(
    "sizes",
    [
        *(pytest.param(sizes, id=name) for name, sizes in SIZES.items()),
        *(pytest.param(s, id=name, marks=pytest.mark.slow) for name, s in SLOW_SIZES.items()),
    ],
)
def test_values(library, sizes, dtype):
    inputs = _inputs(*sizes, dtype)
    _check(_run(library, *inputs), _expected(*inputs))


@EACH_DTYPE
def test_a_map_of_one_window_has_the_bits_of_the_attention_without_maps(library, dtype):
    qkv, bias, *tables = _inputs(2, 9, 9, 9, 2, dtype)
    whole, code = torch.empty(2, 9, 9, 128, dtype=qkv.dtype), DTYPE_CODES[qkv.dtype]
    addresses = [tensor.data_ptr() for tensor in (qkv, *tables, whole)]
    other = host_library("rel_pos_attention")
    call(other, "dbsam_rel_pos_attention", *addresses, 2, 9, 2, HEAD_DIM, 0.125, code, None)
    assert torch.equal(_run(library, qkv, bias, *tables), whole)


@EACH_DTYPE
def test_padding_is_the_bias_and_not_zero(library, dtype):
    """One token among 24 of padding: the share of a value that it has follows from their keys."""
    qkv, bias, *tables = _inputs(1, 1, 1, 5, 1, dtype)
    _parts(qkv)[2].fill_(0)
    _parts(bias)[2].fill_(1)
    found = _run(library, qkv, bias, *tables)
    _check(found, _expected(qkv, bias, *tables))
    assert found.min() > 0.1  # zero padding would give zero
    padded = bias.repeat(1, 25, 1)
    padded[:, 0] = qkv[0, 0]
    wide = (t.float() for t in (padded, *tables))
    whole = rel_pos_attention_reference(*wide, num_heads=1, side=5, scale=0.125)
    _check(found[0, 0], whole[:, 0])


@EACH_DTYPE
@pytest.mark.parametrize("direction", [-1, 1], ids=["falling", "rising"])
def test_scores_far_beyond_the_range_of_float16(library, direction, dtype):
    """Up to 1e5 for tokens, and padding above or below all of them; whole numbers, held exactly."""
    inputs = _inputs(1, 8, 7, 5, 1, dtype)
    qkv, bias, *tables = inputs
    queries, keys, _ = _parts(qkv)
    queries.copy_(queries[..., :1].sign() * 16)
    keys.copy_((torch.arange(8) - 4)[None, :, None, None, None] * direction * 16)
    _parts(bias)[1].fill_(direction * 96)
    for table in tables:
        table.copy_((table * 10).round() * 4)
    _check(_run(library, *inputs, scale=1.0), _expected(*inputs, scale=1.0))


@EACH_DTYPE
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_scale_is_not_applied_to_the_bias_of_positions(library, scale, dtype):
    inputs = _inputs(1, 5, 4, 3, 2, dtype)
    _check(_run(library, *inputs, scale=scale), _expected(*inputs, scale=scale))


@EACH_DTYPE
def test_the_weights_of_a_query_sum_to_one(library, dtype):
    inputs = _inputs(1, 9, 16, 7, 2, dtype)
    for packed in inputs[:2]:
        _parts(packed)[2].fill_(1)
    found = _run(library, *inputs)
    _check(found, torch.ones(found.shape))


@EACH_DTYPE
def test_a_nan_stays_in_its_window_and_head(library, dtype):
    """In a query it spoils that one; in a key its window; in the bias, all windows with padding."""
    qkv, bias, *tables = _inputs(2, 6, 8, 5, 2, dtype)
    queries, keys, _ = _parts(qkv)
    queries[0, 5, 7, 1, 3] = torch.nan
    keys[1, 0, 6, 0, 9] = torch.nan
    spoilt = torch.zeros(2, 6, 8, 2, dtype=torch.bool)
    spoilt[0, 5, 7, 1] = spoilt[1, :5, 5:, 0] = True
    found = _run(library, qkv, bias, *tables).unflatten(-1, (2, -1)).isnan()
    assert torch.equal(found, spoilt[..., None].expand(found.shape))
    _parts(bias)[2][1, 0] = torch.nan
    spoilt[:, 5:, :, 1] = spoilt[:, :, 5:, 1] = True
    found = _run(library, qkv, bias, *tables).unflatten(-1, (2, -1))[..., 0].isnan()
    assert torch.equal(found, spoilt)


@EACH_DTYPE
def test_no_bit_depends_on_the_batch(library, dtype):
    qkv, *rest = _inputs(3, 4, 6, 4, 1, dtype)
    together = _run(library, qkv, *rest)
    assert torch.equal(_run(library, qkv[2:].contiguous(), *rest), together[2:])


def test_no_images(library):
    assert _run(library, *_inputs(0, 3, 2, 2, 1, "float16")).shape == (0, 3, 2, 64)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"dtype": 3}, -1),
        ({"dtype": -1}, -1),
        ({"head_dim": 32}, -2),
        ({"side": 0}, -2),
        ({"side": 65}, -2),
        ({"heads": 0}, -2),
        ({"heads": 1025}, -2),
        ({"batch": -1}, -2),
        ({"height": 0}, -2),
        ({"width": -4}, -2),
        ({"width": 2**31 - 1}, -2),
        ({"height": 2**31 - 1, "width": 2**31 - 1, "heads": 1024}, -2),
        ({"height": 11940}, -2),
        ({"scale": 0.0}, -2),
        ({"scale": float("nan")}, -2),
        ({"scale": float("inf")}, -2),
        ({"qkv": 0}, -3),
        ({"qkv_bias": 2}, -3),
        ({"rel_pos_h": 8}, -3),
        ({"rel_pos_w": 24}, -3),
        ({"out": 4}, -3),
        ({"batch": 2**31 - 1}, -4),
    ],
    ids=str,
)
def test_refused_arguments(library, changed, status):
    """Nothing is read or written: the addresses lead nowhere."""
    arguments = dict.fromkeys(("qkv", "qkv_bias", "rel_pos_h", "rel_pos_w", "out"), 4096)
    arguments |= {"batch": 1, "height": 64, "width": 64, "side": 14, "heads": 12, "head_dim": 64}
    arguments |= {"scale": 0.125, "dtype": 1, "stream": None} | changed
    run = functools.partial(call, library, "dbsam_windowed_attention")
    with pytest.raises(EngineError, match=rf"status {status}\)"):
        run(*arguments.values())
