"""The compiled kernels on a GPU, through pycuda's memory and through PyTorch's operators.

The same sources are tested on the CPU emulation in test_<op>.py. Shapes are those of DB-SAM at
1024×1024, and a few that fit no tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.references import check_close, prompt_feed, small_model
from torch import Tensor

from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.kernels.nvrtc_kernels import NvrtcKernels
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.sessions.cuda_graphs import capturing
from dbsam_deploy.sessions.fused_model import FusedEncoder
from dbsam_deploy.sessions.fused_session import FusedPytorchSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.validation.measuring import as_tuple, without_tf32
from dbsam_deploy.validation.operator_cases import (
    DEPTH,
    HEADS,
    OperatorCase,
    channel,
    deform,
    depthwise,
    expected,
    rel_pos,
    windowed,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(case: OperatorCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Fresh inputs on the GPU."""
    return tuple(
        (torch.randn(shape, device="cuda") * case.factors.get(i, 1)).to(dtype)
        for i, shape in enumerate(case.shapes)
    )


CASES = {
    "deform one level": deform(1, [64, 64], [64, 64], HEADS, DEPTH),
    "deform batch": deform(3, [64, 64], [64, 64], HEADS, DEPTH),
    "deform ViT from four levels": deform(1, [64, 64], [64, 64] * 4, HEADS, DEPTH),
    "deform five levels": deform(1, [64, 64] * 5, [64, 64] * 5, HEADS, DEPTH),
    "deform ragged": deform(2, [5, 3, 1, 7], [7, 9, 2, 2, 1, 1], 3, DEPTH),
    "deform narrow": deform(1, [6, 5], [4, 4], 2, 8),
    # samples alone are 48 KiB of shared memory in float32
    "deform 24 samples": deform(1, [9, 9], [4, 5] * 6, 2, DEPTH),
    "deform far": deform(1, [9, 9], [8, 8, 4, 4], HEADS, DEPTH, 50),
    "channel": channel(1, 64, 64, 768),
    "channel batch": channel(8, 64, 64, 768),
    "channel ragged": channel(3, 13, 7, 64),
    "channel one cell": channel(1, 1, 1, 32),
    "rel_pos global": rel_pos(1, 64, HEADS),
    "rel_pos global batch": rel_pos(2, 64, 2),
    "rel_pos windows": rel_pos(25, 14, HEADS),
    "rel_pos ragged": rel_pos(3, 9, 2),
    "rel_pos one token": rel_pos(2, 1, 1),
    "rel_pos middle": rel_pos(1, 33, 3),
    "depthwise": depthwise(1, 1, 64, 64, 3072),
    "depthwise levels and batch": depthwise(2, 5, 64, 64, 3072),
    "depthwise ragged": depthwise(3, 2, 13, 37, 72),
    "depthwise one cell": depthwise(1, 1, 1, 1, 8),
    "windowed": windowed(1, 64, 64, 14, HEADS),
    "windowed batch, ragged": windowed(3, 33, 47, 14, 3),
    "windowed map within a window": windowed(2, 5, 11, 14, 2),
    "windowed large": windowed(1, 70, 65, 64, 1),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def _operator(case: OperatorCase) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    return getattr(torch.ops.dbsam, case.operator)


def _compare(
    found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype, bound: str = ""
) -> None:
    assert len(found) == len(wanted)
    for ours, truth in zip(found, wanted, strict=True):
        assert ours.dtype is dtype
        values = ours.float().cpu().numpy()
        check_close(values, truth.cpu().numpy(), bound or f"{str(dtype)[6:]} kernel")


@ALL
@EACH_DTYPE
def test_the_operator_on_cuda_equals_the_reference(case, dtype):
    tensors = drawn(case, dtype)
    torch.use_deterministic_algorithms(True)  # fills what `new_empty` makes with NaN
    try:
        found = as_tuple(_operator(case)(*tensors, **case.sizes))
    finally:
        torch.use_deterministic_algorithms(False)
    _compare(found, expected(case, tensors), dtype)


class PycudaMemory:
    """Device memory that PyTorch knows nothing of, in the primary context, and a stream."""

    def __init__(self, driver: Any) -> None:
        self._driver, self._kept = driver, []
        self.stream = driver.Stream()

    def put(self, tensor: Tensor) -> int:
        """Address of a copy of the tensor's bytes."""
        data = tensor.cpu().contiguous().view(torch.uint8).numpy()
        address = self._driver.mem_alloc(data.nbytes)
        self._driver.memcpy_htod(address, data)
        self._kept.append(address)
        return int(address)

    def make(self, size: int) -> int:
        """Address of `size` bytes of NaN."""
        address = self._driver.mem_alloc(size)
        self._driver.memset_d8(address, 0xFF, size)
        self._kept.append(address)
        return int(address)

    def get(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes there as a tensor, once the stream is done."""
        self.stream.synchronize()
        data = np.empty(int(np.prod(shape)) * dtype.itemsize, np.uint8)
        self._driver.memcpy_dtoh(data, address)
        return torch.from_numpy(data).view(dtype).reshape(shape)


@pytest.fixture
def memory() -> PycudaMemory:
    pytest.importorskip("pycuda", reason="pycuda is not installed")
    torch.cuda.init()
    import pycuda.autoprimaryctx  # the context that the CUDA runtime uses
    import pycuda.driver

    return PycudaMemory(pycuda.driver)


def _call(
    memory: PycudaMemory, case: OperatorCase, dtype: torch.dtype, *inputs: Any, entry: str
) -> list:
    """Run an entry point on pycuda's stream; returns its outputs."""
    library = torch_ops.kernel_library(torch.device("cuda:0"))
    code = kernels.DTYPE_CODES[str(dtype)[6:]]
    outputs = [memory.make(int(np.prod(shape)) * dtype.itemsize) for shape in case.outputs]
    workspace = []
    if case.operator == "channel_attention":
        size = library.dbsam_channel_attention_workspace(*case.arguments[:5], code)
        workspace = [memory.make(max(size, 16))]
    arguments = (*inputs, *outputs, *workspace, *case.arguments, code, memory.stream.handle)
    kernels.call(library, entry, *arguments)
    return [memory.get(a, s, dtype) for a, s in zip(outputs, case.outputs, strict=True)]


@ALL
@EACH_DTYPE
def test_the_entry_point_on_pycudas_memory_equals_the_reference(memory, case, dtype):
    tensors = drawn(case, dtype)
    inputs = [memory.put(tensor) for tensor in tensors]
    found = _call(memory, case, dtype, *inputs, entry=f"dbsam_{case.operator}")
    _compare(tuple(found), expected(case, tensors), dtype)


@pytest.mark.nvcc
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rel_pos")])
def test_the_compact_attention_equals_the_reference(memory, name, dtype):
    case = CASES[name]
    tensors = drawn(case, dtype)
    inputs = [memory.put(tensor) for tensor in tensors]
    found = _call(memory, case, dtype, *inputs, entry="dbsam_rel_pos_attention_compact")
    _compare(tuple(found), expected(case, tensors), dtype)


@pytest.fixture
def by_nvrtc(monkeypatch):
    """The operators on NVRTC's kernels, as where there is no nvcc."""
    monkeypatch.setattr(torch_ops, "has_nvcc", lambda: False)
    torch_ops.kernel_library.cache_clear()
    yield
    torch_ops.kernel_library.cache_clear()


@pytest.mark.nvrtc
@pytest.mark.usefixtures("by_nvrtc")
@ALL
@EACH_DTYPE
def test_nvrtcs_kernels_equal_the_reference(case, dtype):
    tensors = drawn(case, dtype)
    found = as_tuple(_operator(case)(*tensors, **case.sizes))
    assert isinstance(torch_ops.kernel_library(tensors[0].device), NvrtcKernels)
    _compare(found, expected(case, tensors), dtype)


@ALL
@EACH_DTYPE
def test_the_same_inputs_give_the_same_bits(case, dtype):
    tensors, operator = drawn(case, dtype), _operator(case)
    first = as_tuple(operator(*tensors, **case.sizes))
    for _ in range(3):
        again = as_tuple(operator(*tensors, **case.sizes))
        assert all(map(torch.equal, again, first))


@ALL
def test_a_captured_operator_follows_its_inputs(case):
    tensors, operator = drawn(case, torch.float16), _operator(case)
    operator(*tensors, **case.sizes)  # builds and loads the library
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        found = as_tuple(operator(*tensors, **case.sizes))
    fresh = drawn(case, torch.float16)
    for tensor, new in zip(tensors, fresh, strict=True):
        tensor.copy_(new)
    graph.replay()
    _compare(found, expected(case, fresh), torch.float16)


@pytest.mark.parametrize(
    "name", ["deform ragged", "channel ragged", "rel_pos ragged"], ids=lambda name: name.split()[0]
)
def test_pytorch_accepts_the_operator_on_cuda(name):
    case = CASES[name]
    results = torch.library.opcheck(_operator(case).default, drawn(case, torch.float16), case.sizes)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("variant", ["sam_vit_b", "db_sam", "db_sam_4level", "db_sam_plus"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@EACH_DTYPE
def test_the_fused_encoder_on_cuda_equals_the_model(variant, dtype, compiled):
    torch.compiler.reset()
    model = small_model(variant, 144, embed_dim=2 * DEPTH)
    image = torch.randn(2, 3, 144, 144)
    fused = FusedEncoder(model).to("cuda", dtype)
    encode = torch.compile(fused, fullgraph=True) if compiled else fused
    with torch.inference_mode(), without_tf32():
        expected, found = model.encode(image), encode(image.cuda())
    check_close(found.cpu().numpy(), expected.numpy(), str(dtype)[6:], "image_embeddings")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_session_equals_the_reference_on_the_trained_model(dtype, compiled):
    torch.compiler.reset()
    model = load_model(variant="db_sam_tiny", image_size=256).model
    session = FusedPytorchSession(model, dtype=dtype, compiled=compiled)
    reference, rng = PytorchSession(model), np.random.default_rng()
    for batch in (1, 3, 1):
        image = rng.standard_normal((batch, 3, 256, 256)).astype(np.float32)
        found = session.run("encoder", {"image": image})["image_embeddings"]
        expected = reference.run("encoder", {"image": image})["image_embeddings"]
        check_close(found, expected, dtype, f"batch {batch}")
    for boxes in (3, 4, 1):
        feed = {
            "image_embeddings": expected,
            "boxes": (rng.random((1, boxes, 4)) * 256).astype(np.float32),
        }
        _compare_runs(session, reference, "decoder", feed, dtype)
    feed = prompt_feed(rng, box=True, points=2, size=model.config.frame)
    _compare_runs(session, reference, "prompt_decoder", feed, dtype)


def _compare_runs(session, reference, graph: str, feed: dict, dtype: str) -> None:
    found, expected = session.run(graph, feed), reference.run(graph, feed)
    for name, values in expected.items():
        check_close(found[name], values, dtype, name)
