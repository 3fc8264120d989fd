"""The CPU emulation under the kernels' tests: what it computes, and which mistakes it shows."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbsam_deploy.kernels.build import build_library, source_files
from dbsam_deploy.kernels.library import HOST_FLAGS
from dbsam_deploy.resources import resource_dir

PROBE = Path(__file__).with_name("emulation_probe.cu")
THREADS = 96
CODES = {torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    for source in (PROBE, *source_files(resource_dir("kernels") / "common.cuh")):
        shutil.copy(source, folder)
    return build_library("probe", "g++", [folder / PROBE.name], (*HOST_FLAGS, "-Werror"), None)


@pytest.fixture(scope="module")
def probe(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_blocks_and_threads_count_as_in_cuda(probe: ctypes.CDLL, blocks: int) -> None:
    values = torch.rand(blocks, THREADS)
    out = torch.full_like(values, torch.nan)
    assert probe.reverse(_address(values), _address(out), blocks, True) == 0
    assert torch.equal(out, values.flip(1))


def test_a_missing_barrier_shows_in_blocks_of_either_order(probe: ctypes.CDLL) -> None:
    values = torch.rand(8, THREADS)
    out = torch.zeros_like(values)
    assert probe.reverse(_address(values), _address(out), 8, False) == 0
    assert out[0::2, : THREADS // 2].isnan().all()  # threads ran in ascending order
    assert out[1::2, THREADS // 2 :].isnan().all()  # and here in descending order


def test_shuffles_and_reductions(probe: ctypes.CDLL) -> None:
    values = torch.randn(THREADS)
    sums, read = torch.zeros(THREADS), torch.zeros(THREADS, 3, dtype=torch.int32)
    assert probe.shuffle(_address(values), _address(sums), _address(read)) == 0
    largest = values.reshape(-1, 8).amax(1).repeat_interleave(8)
    expected = values.reshape(-1, 32).sum(1).repeat_interleave(32) + largest
    torch.testing.assert_close(sums, expected)
    index = torch.arange(THREADS)
    lane = index % 32
    assert torch.equal(read[:, 0], (index ^ 5).int())
    assert torch.equal(read[:, 1], (index // 16 * 16 + lane * 7 % 16).int())
    assert torch.equal(read[:, 2], torch.where(index % 8 < 5, index + 3, index).int())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_matrix_products(probe: ctypes.CDLL, dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    stored = a.T.contiguous() if transposed else a
    columns, out = b.T.contiguous(), torch.full((16, 8), torch.nan)
    arguments = (_address(stored), _address(columns), _address(out), CODES[dtype], transposed)
    assert probe.product(*arguments, True) == 0
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_copy_arrives_at_the_wait_and_no_earlier(probe: ctypes.CDLL) -> None:
    a, b = torch.ones(16, 16).half(), torch.ones(8, 16).half()
    out = torch.zeros(16, 8)
    assert probe.product(_address(a), _address(b), _address(out), 1, False, False) == 0
    assert out.isnan().all()


def test_an_invalid_copy_fills_with_zeros(probe: ctypes.CDLL) -> None:
    values, out = torch.rand(32, 4), torch.full((32, 4), torch.nan)
    assert probe.zero_fill(_address(values), _address(out)) == 0
    values[1::2] = 0
    assert torch.equal(out, values)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_conversions_round_as_pytorch_does(probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    # every pattern, the halfway points to the next one, and numbers of all magnitudes
    exact = every.float()
    floats = torch.cat((exact, (exact + exact.roll(-1)) / 2, exact * (1 + 2e-7)))
    values = every.repeat(3)
    out, rounded = torch.empty(len(floats)), torch.empty(len(floats), dtype=dtype)
    memory = (_address(values), _address(out), _address(floats), _address(rounded))
    assert probe.convert(*memory, len(floats), CODES[dtype]) == 0
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rounded, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


MISTAKES = {
    "deadlock": "deadlock: 63 of 64 live threads wait at __syncthreads",
    "mixed_operations": "lanes of a warp meet at different operations",
    "misaligned": "misaligned vector access",
    "overrun": "a write past the end of the dynamic shared memory",
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.items())
def test_a_mistake_aborts_with_its_name(path: Path, name: str, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({str(path)!r}).{name}()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode < 0
    assert message in result.stderr


INVALID_VALUE, LIMITS = 1, -4
SMALLEST, HOPPER = 99 * 1024, 227 * 1024
"""Shared memory that a block of sm_86, sm_89 and sm_120 can have, and of sm_90."""


@pytest.fixture
def hopper(probe: ctypes.CDLL) -> Iterator[None]:
    probe.emulate_shared_limit(HOPPER)
    yield
    probe.emulate_shared_limit(SMALLEST)


def test_a_launch_without_threads_is_refused(probe: ctypes.CDLL) -> None:
    assert probe.no_threads() == 9  # cudaErrorInvalidConfiguration


def test_shared_memory_above_48_kib_has_to_be_asked_for(probe: ctypes.CDLL) -> None:
    """The probe's kernel has 2 KiB of static shared memory, and asks for nothing by itself."""
    assert probe.start_with_shared(46 * 1024) == 0
    assert probe.start_with_shared(46 * 1024 + 1) == INVALID_VALUE


@pytest.mark.parametrize("dynamic", [0, 46 * 1024, 46 * 1024 + 16, 48 * 1024, SMALLEST - 2048])
def test_a_launch_asks_for_what_it_needs(probe: ctypes.CDLL, dynamic: int) -> None:
    assert probe.launch_with_shared(dynamic) == 0


def test_more_than_the_smallest_gpu_has_is_refused(probe: ctypes.CDLL) -> None:
    assert probe.launch_with_shared(SMALLEST - 2048 + 1) == LIMITS
    assert probe.launch_with_shared(SMALLEST) == LIMITS


@pytest.mark.usefixtures("hopper")
def test_a_larger_gpu_has_its_own_limit(probe: ctypes.CDLL) -> None:
    assert probe.launch_with_shared(HOPPER - 2048) == 0
    assert probe.launch_with_shared(HOPPER - 2048 + 1) == LIMITS
