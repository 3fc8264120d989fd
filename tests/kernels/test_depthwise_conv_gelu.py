"""The depthwise convolution with GELU on the CPU emulation, against float64."""

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.references import check_close
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels.torch_ops import DTYPE_CODES, depthwise_conv_gelu_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64  # elements around the output, which stay as they are

SHAPES = [
    # images, height, width, channels
    (1, 1, 1, 8),
    (3, 5, 7, 8),
    (1, 14, 14, 32),
    (1, 32, 32, 72),  # a group of channels, and a few of the next
    (2, 1, 19, 264),
    (2, 19, 1, 40),
    (1, 2, 33, 24),  # a block over the width, and one column of the next
    (1, 96, 40, 64),  # strips of several rows
]

Inputs = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Inputs], Tensor]


def draw(images: int, height: int, width: int, channels: int, dtype: torch.dtype) -> Inputs:
    """Random maps, taps and biases of ordinary size."""
    return (
        torch.randn(images, height, width, channels).to(dtype),
        (torch.randn(channels, 1, 3, 3) / 3).to(dtype),
        torch.randn(channels).to(dtype),
    )


def exact(inputs: Inputs) -> Tensor:
    """The definition in float64, as nine shifted products."""
    x, weight, bias = (tensor.double() for tensor in inputs)
    _, height, width, _ = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    total = bias.expand(x.shape).clone()
    for i in range(3):
        for j in range(3):
            total += padded[:, i : i + height, j : j + width] * weight[:, 0, i, j]
    return total * 0.5 * (1 + torch.erf(total * 0.5**0.5))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernels.host_library("depthwise_conv_gelu")


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    """Runs the kernel into memory full of NaN, and checks that nothing around it is written."""

    def call(inputs: Inputs) -> Tensor:
        x = inputs[0]
        whole = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
        out = whole[GUARD:-GUARD]
        addresses = [tensor.data_ptr() for tensor in (*inputs, out)]
        entry, code = "dbsam_depthwise_conv_gelu", DTYPE_CODES[x.dtype]
        kernels.call(library, entry, *addresses, *x.shape, code, None)
        assert torch.cat((whole[:GUARD], whole[-GUARD:])).isnan().all()
        return out.reshape(x.shape)

    return call


def _name(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} kernel"


def _check(found: Tensor, expected: Tensor) -> None:
    check_close(found.float().numpy(), expected.numpy(), _name(found.dtype))


def test_the_reference_is_the_definition():
    inputs = draw(6, 5, 7, 16, torch.float64)
    x, weight, bias = inputs
    tokens = x.reshape(2, 3 * 35, 16)  # two images of three levels
    found = depthwise_conv_gelu_reference(tokens, weight, bias, height=5, width=7)
    check_close(found.reshape(x.shape).numpy(), exact(inputs).numpy(), "float32")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_definition(run, shape, dtype):
    inputs = draw(*shape, dtype)
    _check(run(inputs), exact(inputs))


@pytest.mark.parametrize("size", [1e-6, 60.0, 3e4], ids=["small", "large", "huge"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_extreme_values(run, size, dtype):
    x, weight, bias = draw(2, 5, 9, 16, torch.float32)
    inputs = tuple(t.to(dtype) for t in ((x * size).clamp(-65504, 65504), weight / 8, bias))
    found, expected = run(inputs), exact(inputs)
    assert expected.abs().max() < 65504
    _check(found, expected)


def test_sums_over_the_map_are_float32_whatever_its_type(run):
    """Rows of terms beyond float16 cancel to the last bit, and the bias is left."""
    x = torch.full((1, 5, 9, 8), 3e4, dtype=torch.float16)
    taps = torch.tensor([0, 8, 0, 0, 8, 0, 0, -16, 0]).half()
    weight = taps.expand(8, 9).reshape(8, 1, 3, 3).contiguous()
    bias = 1 + torch.arange(8).half() / 8
    inner = run((x, weight, bias))[:, 1:-1]
    _check(inner, F.gelu(bias.double()).expand(inner.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_gelu_over_its_whole_range(run, dtype):
    """Without taps the bias alone reaches GELU."""
    x, weight, _ = draw(1, 1, 1, 1024, dtype)
    argument = torch.linspace(-12, 12, 1024).to(dtype)
    argument[:4] = torch.tensor([-60000.0, 60000.0, -1e-4, 1e-4])
    found = run((x, weight * 0, argument)).flatten()
    expected = F.gelu(argument.double())
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1e-2)
    assert error.max() <= max(1.25 * torch.finfo(dtype).eps / 2, 1.2e-6)


@pytest.mark.parametrize("tap", range(9))
def test_each_tap_moves_the_map_its_own_way(run, tap):
    """A tap of one gives its neighbour's value to the last bit, and zero beyond the border."""
    x, weight, _ = draw(2, 6, 11, 8, torch.float32)
    one = torch.zeros_like(weight).flatten(1)
    one[:, tap] = 1
    found = run((x, one.reshape(weight.shape), torch.zeros(8)))
    centre = run((x, F.pad(torch.ones(8, 1, 1, 1), (1, 1, 1, 1)), torch.zeros(8)))
    padded = F.pad(centre, (0, 0, 1, 1, 1, 1))
    assert torch.equal(found, padded[:, tap // 3 :, tap % 3 :][:, :6, :11])


def test_a_nan_reaches_its_neighbours_only(run):
    x, weight, bias = draw(3, 11, 35, 16, torch.float16)
    for row, column in ((0, 0), (4, 7), (4, 8), (5, 32), (10, 34)):
        spoilt = x.clone()
        spoilt[1, row, column, 5] = torch.nan
        reached = torch.zeros(x.shape, dtype=torch.bool)
        reached[1, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2, 5] = True
        assert torch.equal(run((spoilt, weight, bias)).isnan(), reached)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_no_bit_depends_on_how_many_images_there_are(run, dtype):
    """Nor on how the map is cut: with 65 images its strips have five rows, with one four."""
    x, weight, bias = draw(65, 60, 9, 8, dtype)
    together = run((x, weight, bias))
    for image in (0, 64):
        assert torch.equal(
            run((x[image : image + 1].contiguous(), weight, bias))[0], together[image]
        )


SIZES = {"images": 1, "height": 4, "width": 4, "channels": 16}
REFUSED = [
    *((name, value) for name in SIZES for value in (0, -1) if (name, value) != ("images", 0)),
    ("channels", 12),
    ("channels", 2**31 - 8),
    ("width", 2**31 - 1),
    ("images", 2**31 - 1),
]


def call_kernel(library, addresses, sizes=SIZES, code=0):
    """Call the entry point as the library does; `code` is the dtype's."""
    kernels.call(library, "dbsam_depthwise_conv_gelu", *addresses, *sizes.values(), code, None)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_sizes(library, name, value):
    wide = {"height": 64, "width": 64} if name == "images" else {}
    with pytest.raises(EngineError, match="status -2"):
        call_kernel(library, [4096] * 4, {**SIZES, **wide, name: value})


def test_no_image_is_no_work(library):
    call_kernel(library, [None] * 4, {**SIZES, "images": 0})


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("address", [4104, None], ids=["out of line", "null"])
def test_refused_addresses(library, position, address):
    addresses = [4096] * 4
    addresses[position] = address
    with pytest.raises(EngineError, match="status -3"):
        call_kernel(library, addresses)


@pytest.mark.parametrize("code", [-1, 3])
def test_refused_dtype(library, code):
    with pytest.raises(EngineError, match="status -1"):
        call_kernel(library, [4096] * 4, code=code)
