"""`rel_pos_attention`: the kernels on the CPU emulation against the float32 reference."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from support.references import check_close
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels.library import DTYPE_CODES, call, host_library
from dbsam_deploy.kernels.torch_ops import rel_pos_attention_reference

HEAD_DIM = 64
MARGIN = 64
"""Elements of NaN before and after every tensor: read or written, they show."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SIZES = {
    "one token": (2, 1, 1),
    "idle warps": (3, 5, 2),
    "SAM's window, two ragged tiles": (2, 14, 3),
    "one full strip": (1, 16, 2),
    "a strip of one column, a tile of one row": (2, 17, 2),
    "three strips": (1, 33, 1),
}
"""What is special → windows, side, heads."""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return host_library("rel_pos_attention")


def _between_nans(tensor: Tensor) -> Tensor:
    padded = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    inner = padded[MARGIN:-MARGIN].view(tensor.shape)
    return inner.copy_(tensor)


def _inputs(windows: int, side: int, heads: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(100 * side + heads)
    qkv = torch.randn(windows, side * side, 3 * heads * HEAD_DIM)
    tables = (0.3 * torch.randn(2 * side - 1, HEAD_DIM) for _ in range(2))
    return tuple(tensor.to(DTYPES[dtype]) for tensor in (qkv, *tables))


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (windows, tokens, heads, 64) of queries, keys and values."""
    return qkv.unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)


def _run(
    library: ctypes.CDLL,
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    scale: float = 0.125,
    entry_point: str = "dbsam_rel_pos_attention",
) -> Tensor:
    """The kernel's output in its dtype, from an output that held NaN."""
    windows, tokens, packed = qkv.shape
    side, heads = (len(rel_pos_h) + 1) // 2, packed // (3 * HEAD_DIM)
    tensors = [_between_nans(tensor) for tensor in (qkv, rel_pos_h, rel_pos_w)]
    width = heads * HEAD_DIM
    padded = torch.full((windows * tokens * width + 2 * MARGIN,), torch.nan, dtype=qkv.dtype)
    out = padded[MARGIN:-MARGIN].view(windows, tokens, width)
    addresses = [tensor.data_ptr() for tensor in (*tensors, out)]
    code = DTYPE_CODES[str(qkv.dtype).removeprefix("torch.")]
    sizes = (windows, side, heads, HEAD_DIM)
    call(library, entry_point, *addresses, *sizes, scale, code, None)
    assert padded[:MARGIN].isnan().all()
    assert padded[-MARGIN:].isnan().all()
    return out


def _check(found: Tensor, inputs: tuple[Tensor, ...], dtype: str, scale: float = 0.125) -> None:
    """Compare with the reference, computed in float32 from the rounded inputs."""
    qkv, rel_pos_h, rel_pos_w = (tensor.float() for tensor in inputs)
    heads, side = qkv.shape[-1] // (3 * HEAD_DIM), (len(rel_pos_h) + 1) // 2
    expected = rel_pos_attention_reference(
        qkv, rel_pos_h, rel_pos_w, num_heads=heads, side=side, scale=scale
    )
    check_close(found.float().numpy(), expected.numpy(), f"{dtype} kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values(library, sizes, dtype):
    inputs = _inputs(*sizes, dtype)
    _check(_run(library, *inputs), inputs, dtype)


@pytest.mark.parametrize(
    ("dtype", "side"),
    [("float16", 64), ("float32", 44), pytest.param("float32", 64, marks=pytest.mark.slow)],
)
def test_large_grids(library, dtype, side):
    """SAM's global one has side 64, the largest; bfloat16 would only take its time again."""
    inputs = _inputs(1, side, 1, dtype)
    _check(_run(library, *inputs), inputs, dtype)


COMPACT = "dbsam_rel_pos_attention_compact"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [(2, 1, 1), (3, 5, 2), (2, 14, 3), (2, 17, 2), (1, 32, 1)], ids=str
)
def test_the_compact_form_gives_the_same_bits(library, sizes, dtype):
    """Up to 32 rows it takes the keys in the same order."""
    inputs = _inputs(*sizes, dtype)
    assert torch.equal(_run(library, *inputs, entry_point=COMPACT), _run(library, *inputs))


@pytest.mark.parametrize(
    "sizes", [(1, 33, 1), (2, 37, 1), pytest.param((1, 64, 1), marks=pytest.mark.slow)], ids=str
)
def test_the_compact_form_goes_through_its_rows_in_parts(library, sizes):
    inputs = _inputs(*sizes, "float16")
    _check(_run(library, *inputs, entry_point=COMPACT), inputs, "float16")


def test_the_compact_form_has_no_float32(library):
    with pytest.raises(EngineError, match=r"status -1\)"):
        _run(library, *_inputs(1, 3, 1, "float32"), entry_point=COMPACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0])
def test_the_scale_is_not_applied_to_the_bias(library, scale, dtype):
    inputs = _inputs(1, 7, 2, dtype)
    _check(_run(library, *inputs, scale), inputs, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", [-1, 1], ids=["falling", "rising"])
def test_scores_far_beyond_the_range_of_float16(library, direction, dtype):
    """Up to 1.5e5, a step of 16384 from row to row; whole numbers, which float32 holds exactly."""
    qkv, rel_pos_h, rel_pos_w = _inputs(2, 18, 2, dtype)
    queries, keys, _ = _parts(qkv)
    rows = torch.arange(18).repeat_interleave(18) - 9
    queries.copy_(queries[..., :1].sign() * 16)
    keys.copy_(rows[:, None, None] * direction * 16)
    tables = ((table * 10).round() * 4 for table in (rel_pos_h, rel_pos_w))
    inputs = (qkv, *tables)
    _check(_run(library, *inputs, 1.0), inputs, dtype, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", [-1, 1], ids=["falling", "rising"])
def test_the_reference_score_follows(library, direction, dtype):
    """Largest scores that rise, or fall, by about 3 (in units of log 2) with every row of keys."""
    qkv, rel_pos_h, rel_pos_w = _inputs(1, 20, 1, dtype)
    _, keys, _ = _parts(qkv)
    queries = _parts(qkv)[0]
    queries.copy_(queries.abs())
    rows = torch.arange(20.0).repeat_interleave(20) - 10
    keys.copy_(direction * rows[:, None, None] / 3)
    inputs = (qkv, rel_pos_h, rel_pos_w)
    _check(_run(library, *inputs), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [1, 14, 19])
def test_the_weights_of_a_query_sum_to_one(library, side, dtype):
    inputs = _inputs(2, side, 2, dtype)
    _parts(inputs[0])[2].fill_(1)
    found = _run(library, *inputs).float()
    check_close(found.numpy(), torch.ones_like(found).numpy(), f"{dtype} kernel")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_added_to_all_keys_changes_nothing(library, dtype):
    """Eighths, so that the sum is exact in every dtype."""
    inputs = _inputs(1, 15, 2, dtype)
    _, keys, _ = _parts(inputs[0])
    keys.copy_((keys.float().clamp(-2, 2) * 8).round() / 8)
    before = _run(library, *inputs)
    keys.add_(torch.randint(-16, 17, (HEAD_DIM,)).to(keys) / 8)
    after = _run(library, *inputs)
    check_close(after.float().numpy(), before.float().numpy(), f"{dtype} kernel")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_where_it_belongs(library, dtype):
    """One in a query spoils that query's head alone; one in a key, all queries of the head."""
    inputs = _inputs(2, 6, 3, dtype)
    queries, keys, _ = _parts(inputs[0])
    queries[0, 5, 1, 7] = torch.nan
    keys[1, 35, 2, 63] = torch.nan
    expected = torch.zeros(2, 36, 3, HEAD_DIM, dtype=torch.bool)
    expected[0, 5, 1] = expected[1, :, 2] = True
    assert torch.equal(_run(library, *inputs).isnan().view_as(expected), expected)


def test_no_windows(library):
    inputs = _inputs(0, 3, 2, "float16")
    assert _run(library, *inputs).shape == (0, 9, 128)


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
        ({"windows": -1}, -2),
        ({"scale": 0.0}, -2),
        ({"scale": float("nan")}, -2),
        ({"scale": float("inf")}, -2),
        ({"qkv": 0}, -3),
        ({"rel_pos_h": 8}, -3),
        ({"rel_pos_w": 24}, -3),
        ({"out": 4}, -3),
        ({"windows": 2**31 - 1}, -4),
    ],
    ids=str,
)
def test_refused_arguments(library, changed, status):
    """Nothing is read or written: the addresses lead nowhere."""
    arguments = dict.fromkeys(("qkv", "rel_pos_h", "rel_pos_w", "out"), 4096)
    arguments |= {"windows": 1, "side": 64, "heads": 12, "head_dim": 64, "scale": 0.125}
    arguments |= {"dtype": 1, "stream": None} | changed
    run = functools.partial(call, library, "dbsam_rel_pos_attention")
    with pytest.raises(EngineError, match=rf"status {status}\)"):
        run(*arguments.values())
