"""The channel attention kernels on the CPU emulation, against PyTorch in float32 or float64."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.references import check_close
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels.torch_ops import DTYPE_CODES, channel_attention_reference
from dbsam_deploy.model.blocks import ChannelAttentionBlock

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = 1e-6
GUARD = 64  # elements behind every output, which stay as they are

SHAPES = [
    # batch, height, width, channels, reduced
    (1, 1, 1, 8, 2),
    (3, 5, 7, 8, 1),
    (1, 14, 14, 32, 8),
    (3, 16, 16, 128, 32),
    (1, 64, 64, 8, 2),
    (2, 1, 19, 264, 3),
    (2, 19, 1, 40, 10),
    (1, 2, 8, 24, 6),
    (1, 7, 10, 520, 130),
    (3, 5, 7, 768, 192),
    (1, 14, 14, 768, 192),
    (1, 6, 9, 1024, 256),
    (2, 96, 47, 8, 2),  # tiles of nine rows, the last of six
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, in the order of the entry point."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    dw_weight: Tensor
    fc1: Tensor
    fc2: Tensor
    pw_weight: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch, height, width, channels, reduced."""
        return (*self.x.shape, self.fc1.shape[0])

    def reference(self) -> tuple[Tensor, Tensor]:
        """Outputs in float32, from the rounded inputs."""
        tensors = (tensor.float() for tensor in self.tensors)
        return channel_attention_reference(*tensors, epsilon=EPSILON)


def draw(
    batch: int, height: int, width: int, channels: int, reduced: int, dtype: torch.dtype
) -> Inputs:
    """Random inputs of ordinary size; a token's mean is of the order of its deviation."""

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape) * size).to(dtype)

    token_mean = torch.randn(batch, height, width, 1)
    return Inputs(
        (torch.randn(batch, height, width, channels) * 2 + token_mean).to(dtype),
        random(channels),
        random(channels),
        random(channels, 1, 3, 3, size=1 / 3),
        random(reduced, channels, size=channels**-0.5),
        random(channels, reduced, size=reduced**-0.5),
        random(channels, channels, size=channels**-0.5),
    )


Run = Callable[[Inputs], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernels.host_library("channel_attention")


def _unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full((int(np.prod(shape)) + GUARD,), torch.nan, dtype=dtype)


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    """Runs the kernels into memory full of NaN, and checks that nothing beyond it is written."""

    def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
        batch, height, width, channels, _ = inputs.sizes
        dtype = inputs.x.dtype
        code = DTYPE_CODES[dtype]
        size = library.dbsam_channel_attention_workspace(*inputs.sizes, code)
        hidden_shape, weight_shape = (batch, height * width, channels), (batch, channels, channels)
        hidden = _unwritten(*hidden_shape, dtype=dtype)
        weight = _unwritten(*weight_shape, dtype=dtype)
        workspace = _unwritten(size // 4, dtype=torch.float32)
        memory = (*inputs.tensors, hidden, weight, workspace)
        addresses = [tensor.data_ptr() for tensor in memory]
        entry = "dbsam_channel_attention"
        kernels.call(library, entry, *addresses, *inputs.sizes, EPSILON, code, None)
        assert all(tensor[-GUARD:].isnan().all() for tensor in (hidden, weight, workspace))
        return hidden[:-GUARD].reshape(hidden_shape), weight[:-GUARD].reshape(weight_shape)

    return call


def _name(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} kernel"


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    check_close(found.float().numpy(), expected.numpy(), _name(found.dtype), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(run, shape, dtype):
    inputs = draw(*shape, dtype)
    for found, expected, what in zip(
        run(inputs), inputs.reference(), ("hidden", "gated_weight"), strict=True
    ):
        _check(found, expected, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("channels", [8, 32, 128])
def test_with_the_product_around_it_it_equals_the_block(run, channels, dtype):
    block = ChannelAttentionBlock(channels).eval()
    inputs = draw(2, 9, 13, channels, channels // 4, dtype)
    weights = zip(block.parameters(), inputs.tensors[1:], strict=True)
    with torch.inference_mode():
        for parameter, value in weights:
            value = value.T if parameter is block.conv_pw.weight else value
            parameter.copy_(value.reshape(parameter.shape))
        expected = block(inputs.x.float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    hidden, gated_weight = run(inputs)
    product = (hidden.float() @ gated_weight.float()).reshape(inputs.x.shape)
    _check((inputs.x.float() + product).to(dtype), expected, "block")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("channels", [96, 328, 376])  # n / 8 * (1 / (n / 8)) is not 1 for 41 and 47
def test_tokens_without_variance_give_what_zeros_give(run, channels, dtype):
    """Equal channels are normalised to exactly zero, whatever their value; epsilon is tiny."""
    inputs = draw(1, 4, 6, channels, 4, dtype)
    value = torch.randn(1, 4, 6, 1) * torch.tensor([1e-3, 1, 1e2, 1e4, 3e4, 0])[:, None]
    value = value.clamp(-65504, 65504).to(dtype)
    constant = replace(inputs, x=value.expand(inputs.x.shape).contiguous())
    zeros = replace(inputs, x=torch.zeros_like(inputs.x))
    for found, expected in zip(run(constant), run(zeros), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [
        3e4 + 32 * torch.randint(-2, 3, (2, 5, 9, 64)),
        torch.randn(2, 5, 9, 64) * 3e4,
        torch.randn(2, 5, 9, 64) * torch.tensor([6e4] + [1.0] * 63),
        torch.randn(2, 5, 9, 64) * 1e-3,
        3e4 + 2**-9 * torch.randint(0, 2, (2, 5, 9, 64)),
    ],
    ids=["large mean", "large", "one large channel", "small", "the last bit of float32"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_extreme_tokens(run, x, dtype):
    inputs = replace(draw(2, 5, 9, 64, 16, dtype), x=x.clamp(-65504, 65504).to(dtype))
    assert inputs.x.isfinite().all()
    double = (tensor.double() for tensor in inputs.tensors)
    x, scale, shift, taps, fc1, fc2, pw_weight = double
    normed = torch.nn.functional.layer_norm(x, (64,), scale, shift, EPSILON).permute(0, 3, 1, 2)
    hidden = torch.nn.functional.conv2d(normed, taps, padding=1, groups=64)
    hidden = torch.nn.functional.gelu(hidden).flatten(2).transpose(1, 2)
    gate = (torch.nn.functional.gelu(hidden.mean(1) @ fc1.T) @ fc2.T).sigmoid()
    found, found_weight = run(inputs)
    _check(found, hidden, "hidden")
    _check(found_weight, gate[:, :, None] * pw_weight, "gated_weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_gelu_over_its_whole_range(run, dtype):
    """Without scale, the shift reaches GELU through the central tap alone."""
    inputs = draw(1, 3, 3, 1024, 1, dtype)
    argument = torch.linspace(-12, 12, 1024).to(dtype)
    argument[:4] = torch.tensor([-60000.0, 60000.0, -1e-4, 1e-4])
    taps = torch.zeros(1024, 1, 3, 3, dtype=dtype)
    taps[:, :, 1, 1] = 1
    zeros = torch.zeros(1024, dtype=dtype)
    hidden, _ = run(replace(inputs, norm_weight=zeros, norm_bias=argument, dw_weight=taps))
    expected = torch.nn.functional.gelu(argument.double())
    error = (hidden.double() - expected).abs() / expected.abs().clamp(min=1e-2)
    rounding = torch.finfo(dtype).eps / 2
    assert error.max() <= max(1.25 * rounding, 1.2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_name)
def test_sums_over_the_map_do_not_round_as_the_map_does(run, dtype):
    """A gate that takes the difference of large means: an error of 1e-4 in one changes it by 0.01.

    Without scale, every place of the map has the shift's GELU, so that errors of a sum add up.
    """
    inputs = draw(1, 64, 64, 16, 1, dtype)
    shift = torch.linspace(2, 4, 16).to(dtype)
    means = torch.nn.functional.gelu(shift.double())
    squeeze = torch.tensor([64.0, -64.0] * 7 + [0.0, 0.0]).double()
    for channel in (14, 15):  # fc1's product becomes 1, as far as `dtype` can tell
        squeeze[channel] = ((1 - squeeze @ means) / means[channel]).to(dtype)
    taps = torch.zeros(16, 1, 3, 3, dtype=dtype)
    taps[:, :, 1, 1] = 1
    gates = {"fc1": squeeze.to(dtype)[None], "fc2": torch.ones(16, 1, dtype=dtype)}
    found = run(replace(inputs, norm_weight=shift * 0, norm_bias=shift, dw_weight=taps, **gates))[1]
    gate = torch.nn.functional.gelu(squeeze @ means).sigmoid()
    assert 0.6 < gate < 0.8
    _check(found, (gate * inputs.pw_weight.double())[None], "gated_weight")


def test_a_nan_reaches_its_neighbours_and_its_image_only(run):
    inputs = draw(3, 11, 20, 40, 8, torch.float16)
    for row, column in ((0, 0), (4, 7), (4, 8), (10, 19)):
        x = inputs.x.clone()
        x[1, row, column, 17] = torch.nan
        hidden, gated_weight = run(replace(inputs, x=x))
        reached = torch.zeros(3, 11, 20, dtype=torch.bool)
        reached[1, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        assert torch.equal(hidden.isnan(), reached.reshape(3, -1, 1).expand(hidden.shape))
        assert gated_weight[1].isnan().all()
        assert gated_weight[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_two_runs_give_the_same_bits(run, dtype):
    inputs = draw(2, 17, 21, 96, 24, dtype)
    for first, second in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(first, second)


def test_images_do_not_meet(run):
    inputs = draw(3, 9, 12, 48, 12, torch.bfloat16)
    order = torch.tensor([2, 0, 1])
    shuffled = run(replace(inputs, x=inputs.x[order]))
    for found, expected in zip(shuffled, run(inputs), strict=True):
        assert torch.equal(found, expected[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_without_excitation_the_gate_is_one_half(run, dtype):
    inputs = draw(2, 3, 4, 24, 5, dtype)
    _, gated_weight = run(replace(inputs, fc2=torch.zeros_like(inputs.fc2)))
    assert torch.equal(gated_weight, (inputs.pw_weight / 2).expand(2, 24, 24))


def test_a_mirrored_map_with_mirrored_taps_gives_the_mirrored_result(run):
    """11 columns: tiles and their ragged ends fall elsewhere."""
    inputs = draw(1, 6, 11, 16, 4, torch.float32)
    mirrored = replace(inputs, x=inputs.x.flip(2), dw_weight=inputs.dw_weight.flip(3))
    hidden, gated_weight = run(inputs)
    found, found_weight = run(mirrored)
    _check(found.reshape(1, 6, 11, 16).flip(2), hidden.reshape(1, 6, 11, 16), "hidden")
    _check(found_weight, gated_weight, "gated_weight")


SIZES = {"batch": 1, "height": 4, "width": 4, "channels": 16, "reduced": 4}
REFUSED = [
    *((name, 0, 0) for name in SIZES),
    *((name, -1, 0) for name in SIZES),
    ("batch", 65536, 0),
    ("channels", 12, 0),
    ("channels", 1032, 0),
    ("width", 2**31 - 1, 0),
]


def call_kernel(library, addresses, sizes=SIZES, code=0):
    """Call the entry point as the library does; `code` is the dtype's."""
    kernels.call(
        library, "dbsam_channel_attention", *addresses, *sizes.values(), EPSILON, code, None
    )


@pytest.mark.parametrize(("name", "value", "workspace"), REFUSED)
def test_refused_sizes(library, name, value, workspace):
    sizes = {**SIZES, name: value}
    if name == "width":
        sizes["height"] = 2**31 - 1
    address = torch.zeros(16).data_ptr()
    with pytest.raises(EngineError, match="status -2"):
        call_kernel(library, [address] * 10, sizes)
    assert library.dbsam_channel_attention_workspace(*sizes.values(), 0) == workspace


@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("shift", [8, None], ids=["out of line", "null"])
def test_refused_addresses(library, position, shift):
    memory = torch.zeros(4096)
    addresses = [memory.data_ptr()] * 10
    addresses[position] = None if shift is None else memory.data_ptr() + shift
    with pytest.raises(EngineError, match="status -3"):
        call_kernel(library, addresses)


@pytest.mark.parametrize("code", [-1, 3])
def test_refused_dtype(library, code):
    address = torch.zeros(4096).data_ptr()
    with pytest.raises(EngineError, match="status -1"):
        call_kernel(library, [address] * 10, code=code)
