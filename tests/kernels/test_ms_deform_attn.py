"""The deformable attention kernel on the CPU emulation, against PyTorch in float32."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from support.references import check_close
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels.torch_ops import DTYPE_CODES, ms_deform_attn_reference

Shapes = Sequence[tuple[int, int]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 512  # elements of NaN before the values and behind every tensor
LEAST_RESULT = 0.25
"""Bounds are parts of the result: rounding a coordinate is no small part of next to nothing."""


@dataclass(frozen=True)
class Case:
    """Sizes of a problem."""

    batch: int
    heads: int
    depth: int
    points: int
    levels: Shapes
    queries: Shapes

    def __str__(self) -> str:
        def text(shapes: Shapes) -> str:
            return "+".join(f"{height}x{width}" for height, width in shapes)

        return (
            f"{self.batch}x{self.heads}x{self.depth}-{self.points}-"
            f"{text(self.levels)}-{text(self.queries)}"
        )


@dataclass(frozen=True)
class Inputs:
    """A problem and its tensors, in the order of the entry point."""

    case: Case
    value: Tensor
    offsets: Tensor
    weights: Tensor

    def reference(self) -> Tensor:
        """(B, Q, H·D) float32, from the rounded inputs."""
        case = self.case
        return ms_deform_attn_reference(
            self.value.float(),
            self.offsets.float(),
            self.weights.float(),
            num_heads=case.heads,
            num_points=case.points,
            level_shapes=_flat(case.levels),
            query_shapes=_flat(case.queries),
        )


CASES = [
    # the variants' calls on a small map: one value level, four, and five with five query levels
    Case(1, 12, 64, 4, [(9, 9)], [(9, 9)]),
    Case(2, 2, 64, 4, [(16, 16)], [(16, 16)]),
    Case(1, 12, 64, 4, [(5, 5)] * 4, [(5, 5)]),
    Case(1, 12, 64, 4, [(5, 5)] * 5, [(5, 5)] * 5),
    # levels of different shapes, seen from queries of yet another
    Case(3, 3, 64, 4, [(9, 13), (5, 4), (16, 16)], [(7, 3), (11, 20)]),
    Case(1, 1, 8, 1, [(1, 1)], [(3, 5)]),
    Case(2, 5, 24, 3, [(1, 17), (17, 1)], [(1, 9), (9, 1), (1, 1)]),
    Case(1, 2, 136, 5, [(4, 5), (6, 7)], [(3, 10)]),
    # so many samples that those alone fit 48 KiB of shared memory in float32, and all does not
    Case(1, 1, 8, 6, [(2, 3)] * 4, [(2, 2)]),
    Case(1, 1, 8, 6, [(2, 1)] * 8, [(2, 2)]),
    Case(1, 1, 256, 8, [(4, 5)] * 8, [(3, 5)] * 8),
]

LARGE = Case(4, 8, 8, 1, [(3, 3)], [(1, 800), (800, 1)])
"""So many blocks that each takes four tiles."""


def _flat(shapes: Shapes) -> list[int]:
    return [side for shape in shapes for side in shape]


def _cells(shapes: Shapes) -> int:
    return sum(height * width for height, width in shapes)


def draw(case: Case, dtype: torch.dtype, reach: float = 2.0) -> Inputs:
    """Random inputs whose offsets are `reach` cells large; near the border they leave the map.

    Errors are judged as parts of the largest result. On a map of one cell it can happen that all
    samples miss, and every result is next to nothing: with small offsets that is drawn again.
    """
    tokens, queries = _cells(case.levels), _cells(case.queries)
    samples = case.heads * len(case.levels) * case.points
    while True:
        inputs = Inputs(
            case,
            torch.randn(case.batch, tokens, case.heads * case.depth).to(dtype),
            (torch.randn(case.batch, queries, samples * 2) * reach).to(dtype),
            torch.randn(case.batch, queries, samples).to(dtype),
        )
        if not case.batch or reach > 2 or inputs.reference().abs().max() > LEAST_RESULT:
            return inputs


def _guarded(tensor: Tensor) -> Tensor:
    """All elements with NaN around them, so that a stray read shows."""
    guard = torch.full((GUARD,), torch.nan, dtype=tensor.dtype)
    return torch.cat((guard, tensor.flatten(), guard))


Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernels.host_library("ms_deform_attn")


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    """Runs a kernel into memory full of NaN, and checks that nothing beyond it is written."""

    def call(inputs: Inputs) -> Tensor:
        case, dtype = inputs.case, inputs.weights.dtype
        shape = (case.batch, inputs.weights.shape[1], case.heads * case.depth)
        out = torch.full(shape, torch.nan, dtype=dtype)
        memory = [_guarded(t) for t in (inputs.value, inputs.offsets, inputs.weights, out)]
        addresses = [t.data_ptr() + GUARD * t.element_size() for t in memory]
        arguments = (*addresses, *_sizes(case), DTYPE_CODES[dtype], None)
        kernels.call(library, "dbsam_ms_deform_attn", *arguments)
        out = memory[-1]
        assert out[:GUARD].isnan().all()
        assert out[-GUARD:].isnan().all()
        return out[GUARD:-GUARD].reshape(shape)

    return call


def _sizes(case: Case) -> list[object]:
    return [
        *(case.batch, case.heads, case.depth, len(case.levels), case.points),
        *(_flat(case.levels), len(case.queries), _flat(case.queries)),
    ]


def _name(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} kernel"


def _check(found: Tensor, expected: Tensor) -> None:
    check_close(found.float().numpy(), expected.numpy(), _name(found.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_reference(run: Run, case: Case, dtype: torch.dtype) -> None:
    inputs = draw(case, dtype)
    _check(run(inputs), inputs.reference())


def test_blocks_of_four_tiles_leave_no_query_out(run: Run) -> None:
    inputs = draw(LARGE, torch.float32)
    _check(run(inputs), inputs.reference())


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_an_empty_batch_is_no_mistake(run: Run, dtype: torch.dtype) -> None:
    assert run(draw(replace(CASES[0], batch=0), dtype)).shape == (0, 81, 768)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("reach", [1e-3, 30, 1e4], ids=str)
def test_offsets_of_any_size(run: Run, reach: float, dtype: torch.dtype) -> None:
    """With 1e4 hardly a sample hits the map: then most results are exactly zero."""
    inputs = draw(CASES[4], dtype, reach)
    found, expected = run(inputs), inputs.reference()
    _check(found, expected)
    assert torch.equal(found == 0, expected.to(dtype) == 0) or reach < 1e4


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("worst", ["inf", "-inf", "nan", "max"])
def test_a_wild_offset_adds_nothing(run: Run, worst: str, dtype: torch.dtype) -> None:
    offset = torch.finfo(dtype).max if worst == "max" else float(worst)
    inputs = draw(CASES[6], dtype)
    chosen = torch.rand(inputs.offsets.shape) < 0.3
    wild = replace(inputs, offsets=inputs.offsets.masked_fill(chosen, offset))
    outside = replace(inputs, offsets=inputs.offsets.masked_fill(chosen, 1e4))
    found = run(wild)
    assert torch.equal(found, run(outside))
    _check(found, outside.reference())


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_logits_of_any_size(run: Run, dtype: torch.dtype) -> None:
    inputs = draw(CASES[4], dtype)
    inputs = replace(inputs, weights=inputs.weights * 1e4)  # 1e4 is in the range of float16
    _check(run(inputs), inputs.reference())


def test_a_logit_that_is_not_a_number_shows(run: Run) -> None:
    inputs = draw(CASES[1], torch.float16)
    inputs.weights[1, 7, 0] = torch.nan  # head 0 of query 7
    found = run(inputs)
    assert found[1, 7, :64].isnan().all()
    found[1, 7, :64] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_equal_values_come_out_again(run: Run, dtype: torch.dtype) -> None:
    """The weights of samples inside the map, all corners included, add up to one."""
    case = Case(1, 2, 64, 4, [(9, 13), (12, 10)], [(4, 6)])
    inputs = draw(case, dtype, reach=0.0)
    inputs.offsets.uniform_(-0.3, 0.3)
    constant = torch.randn(1, 1, 128).to(dtype).expand_as(inputs.value).contiguous()
    expected = constant[:, : inputs.weights.shape[1]].float()
    _check(run(replace(inputs, value=constant)), expected)


def test_logits_count_up_to_a_constant(run: Run) -> None:
    inputs = draw(CASES[4], torch.float32)
    shifted = replace(inputs, weights=inputs.weights + 8)
    _check(run(shifted), run(inputs))


def test_a_plane_is_sampled_where_the_offset_points(run: Run) -> None:
    """Values that are their own coordinates give back the place that was asked for."""
    case = Case(1, 1, 8, 1, [(12, 20)], [(6, 10)])
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    planes = torch.stack([columns, rows] * 4, -1).reshape(1, 240, 8)
    offsets = torch.empty(1, 60, 2).uniform_(-0.5, 0.5)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij")
    # the centre of query cell i lies between the two cells 2 i and 2 i + 1
    centres = torch.stack([columns, rows], -1).reshape(1, 60, 2) * 2 + 0.5
    found = run(Inputs(case, planes, offsets, torch.zeros(1, 60, 1)))
    _check(found, (centres + offsets).repeat(1, 1, 4))


REFUSED = {
    "dtype": ({"dtype": 3}, -1),
    "no heads": ({"heads": 0}, -2),
    "depth no multiple of 8": ({"depth": 12}, -2),
    "depth too large": ({"depth": 264}, -2),
    "no levels": ({"levels": []}, -2),
    "too many levels": ({"levels": [(1, 1)] * 9}, -2),
    "too many query levels": ({"queries": [(1, 1)] * 9}, -2),
    "no points": ({"points": 0}, -2),
    "too many points": ({"points": 9}, -2),
    "an empty level": ({"levels": [(3, 0)]}, -2),
    "negative queries": ({"queries": [(-3, 2)]}, -2),
    "more values than 32 bits count": ({"levels": [(65536, 32767)]}, -2),
    "a batch below zero": ({"batch": -1}, -2),
    "a batch beyond the grid": ({"batch": 65536}, -4),
    "queries beyond the grid": ({"queries": [(1, 10_000_000)], "heads": 1}, -4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_it_refuses(library: ctypes.CDLL, reason: str) -> None:
    changes, status = REFUSED[reason]
    dtype = changes.get("dtype", 0)
    case = replace(CASES[1], **{k: v for k, v in changes.items() if k != "dtype"})
    address = torch.zeros(64).data_ptr() // 16 * 16 + 16
    arguments = (*[address] * 4, *_sizes(case), dtype, None)
    with pytest.raises(EngineError, match=rf"status {status}\)"):
        kernels.call(library, "dbsam_ms_deform_attn", *arguments)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("shift", [None, 8], ids=["null", "misaligned"])
def test_it_refuses_an_address(library: ctypes.CDLL, which: int, shift: int | None) -> None:
    memory = torch.zeros(64)
    addresses: list[int | None] = [memory.data_ptr() // 16 * 16 + 16] * 4
    addresses[which] = shift and (addresses[which] or 0) + shift
    with pytest.raises(EngineError, match=r"status -3\)"):
        kernels.call(library, "dbsam_ms_deform_attn", *addresses, *_sizes(CASES[1]), 0, None)
