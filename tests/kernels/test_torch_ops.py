"""References against the model's own modules, and the operators as PyTorch sees them.

The kernels behind the operators are tested in test_<op>.py (CPU) and test_gpu_kernels.py.
"""

import contextlib
import shutil
from typing import Any

import pytest
import torch
from support.references import check_close, small_model
from torch import Tensor, nn

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.model.blocks import ChannelAttentionBlock, MixFFN
from dbsam_deploy.model.deform_attn import MSDeformAttn

Case = tuple[tuple[Tensor, ...], dict[str, Any]]


def ms_deform_attn_case(dtype: torch.dtype = torch.float32) -> Case:
    """Two ragged value levels, three ragged query levels, offsets that leave the maps."""
    sizes = {
        "num_heads": 2,
        "num_points": 3,
        "level_shapes": [4, 3, 2, 5],
        "query_shapes": [2, 5, 3, 3, 1, 1],
    }
    shapes = ((2, 22, 16), (2, 20, 2 * 2 * 3 * 2), (2, 20, 2 * 2 * 3))
    value, offsets, weights = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return (value, offsets * 3, weights), sizes


def channel_attention_case(dtype: torch.dtype = torch.float32) -> Case:
    shapes = ((2, 5, 3, 16), (16,), (16,), (16, 1, 3, 3), (4, 16), (16, 4), (16, 16))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes), {"epsilon": 1e-6}


def rel_pos_attention_case(dtype: torch.dtype = torch.float32) -> Case:
    shapes = ((3, 25, 3 * 2 * 8), (9, 8), (9, 8))
    sizes = {"num_heads": 2, "side": 5, "scale": 8**-0.5}
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes), sizes


def depthwise_conv_gelu_case(dtype: torch.dtype = torch.float32) -> Case:
    """Two images of three levels."""
    shapes = ((2, 3 * 15, 16), (16, 1, 3, 3), (16,))
    tensors = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
    return tensors, {"height": 3, "width": 5}


def windowed_attention_case(dtype: torch.dtype = torch.float32) -> Case:
    """Two maps of 2×2 windows, ragged."""
    shapes = ((2, 4, 5, 3 * 2 * 8), (3 * 2 * 8,), (5, 8), (5, 8))
    sizes = {"num_heads": 2, "side": 3, "scale": 8**-0.5}
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes), sizes


CASES = {
    "ms_deform_attn": ms_deform_attn_case,
    "channel_attention": channel_attention_case,
    "rel_pos_attention": rel_pos_attention_case,
    "depthwise_conv_gelu": depthwise_conv_gelu_case,
    "windowed_attention": windowed_attention_case,
}


def _wide_rel_pos_attention_case(dtype: torch.dtype) -> Case:
    shapes = ((3, 25, 3 * 2 * 64), (9, 64), (9, 64))
    tensors = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
    return tensors, {"num_heads": 2, "side": 5, "scale": 0.125}


def _wide_windowed_attention_case(dtype: torch.dtype) -> Case:
    shapes = ((2, 4, 5, 3 * 2 * 64), (3 * 2 * 64,), (5, 64), (5, 64))
    tensors = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
    return tensors, {"num_heads": 2, "side": 3, "scale": 0.125}


KERNEL_CASES = {
    **CASES,
    "rel_pos_attention": _wide_rel_pos_attention_case,
    "windowed_attention": _wide_windowed_attention_case,
}
"""Sizes that the kernels cover."""
OPERATORS = {name: getattr(torch.ops.dbsam, name) for name in CASES}


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize(
    ("query_shapes", "level_shapes"),
    [(((3, 4),), ((3, 4),)), (((2, 3),), ((4, 5), (1, 2))), (((2, 2), (3, 1)), ((2, 2), (3, 1)))],
)
def test_ms_deform_attn_reference_equals_the_module(query_shapes, level_shapes):
    module = MSDeformAttn(24, len(level_shapes), num_heads=3, num_points=2)
    nn.init.normal_(module.sampling_offsets.weight, std=0.5)
    nn.init.normal_(module.attention_weights.weight)
    query = torch.randn(2, sum(h * w for h, w in query_shapes), 24)
    value = torch.randn(2, sum(h * w for h, w in level_shapes), 24)
    with torch.inference_mode():
        expected = module(query, value, query_shapes, level_shapes)
        sampled = torch_ops.ms_deform_attn_reference(
            module.value_proj(value),
            module.sampling_offsets(query),
            module.attention_weights(query),
            num_heads=3,
            num_points=2,
            level_shapes=[size for shape in level_shapes for size in shape],
            query_shapes=[size for shape in query_shapes for size in shape],
        )
        found = module.output_proj(sampled)
    check_close(found.numpy(), expected.numpy(), "float32")


def _sample(plane: Tensor, y: float, x: float) -> Tensor:
    """Bilinear value of (H, W, D) at pixel coordinates; outside the map lies zero."""
    total = torch.zeros(plane.shape[-1], dtype=plane.dtype)
    row, column = int(y // 1), int(x // 1)
    for i, j in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
        if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
            total += plane[i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return total


def test_ms_deform_attn_reference_equals_the_definition_point_by_point():
    (value, offsets, weights), sizes = ms_deform_attn_case(torch.float64)
    expected = torch.zeros(2, 20, 2, 8, dtype=torch.float64)
    centres = [
        ((i + 0.5) / height, (j + 0.5) / width)
        for height, width in ((2, 5), (3, 3), (1, 1))
        for i in range(height)
        for j in range(width)
    ]
    first, second = value.split([12, 10], 1)
    planes = [first.reshape(2, 4, 3, 2, 8), second.reshape(2, 2, 5, 2, 8)]
    moves = offsets.reshape(2, 20, 2, 2, 3, 2)
    shares = weights.reshape(2, 20, 2, 6).softmax(-1).reshape(2, 20, 2, 2, 3)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, moves.shape[:5])).tolist():
        plane, (y, x) = planes[level][b, :, :, h], centres[q]
        move_x, move_y = moves[b, q, h, level, p].tolist()
        row, column = y * plane.shape[0] + move_y - 0.5, x * plane.shape[1] + move_x - 0.5
        expected[b, q, h] += shares[b, q, h, level, p] * _sample(plane, row, column)
    found = torch_ops.ms_deform_attn_reference(value, offsets, weights, **sizes)
    check_close(found.numpy(), expected.flatten(2).numpy(), "float32")


def test_channel_attention_reference_equals_the_block():
    block = ChannelAttentionBlock(16)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 16, 5, 3)
    with torch.inference_mode():
        hidden, gated_weight = torch_ops.channel_attention_reference(
            x.permute(0, 2, 3, 1),
            block.pre_norm.weight,
            block.pre_norm.bias,
            block.conv_dw.weight,
            block.se.fc1.weight[:, :, 0, 0],
            block.se.fc2.weight[:, :, 0, 0],
            block.conv_pw.weight[:, :, 0, 0].T,
            epsilon=block.pre_norm.eps,
        )
        found = x.flatten(2).transpose(1, 2) + hidden @ gated_weight
        expected = block(x).flatten(2).transpose(1, 2)
    check_close(found.numpy(), expected.numpy(), "float32")


@pytest.mark.parametrize("block", [0, 1])  # a window of 14×14, the whole grid of 5×5
def test_rel_pos_attention_reference_equals_sams_attention(block):
    attention = small_model("sam_vit_b", 80).image_encoder.blocks[block].attn
    side = (attention.rel_pos_h.shape[0] + 1) // 2
    assert side == (14, 5)[block]
    x = torch.randn(2, side, side, 32)
    with torch.inference_mode():
        out = torch_ops.rel_pos_attention_reference(
            attention.qkv(x).flatten(1, 2),
            attention.rel_pos_h,
            attention.rel_pos_w,
            num_heads=attention.num_heads,
            side=side,
            scale=attention.scale,
        )
        found, expected = attention.proj(out), attention(x).flatten(1, 2)
    check_close(found.numpy(), expected.numpy(), "float32")


def test_depthwise_conv_gelu_reference_equals_the_middle_of_the_network():
    network = MixFFN(4, 16)
    x = torch.randn(2, 45, 4)
    with torch.inference_mode():
        convolution = network.dwconv.dwconv
        hidden = torch_ops.depthwise_conv_gelu_reference(
            network.fc1(x), convolution.weight, convolution.bias, height=3, width=5
        )
        found, expected = network.fc2(hidden), network(x, ((3, 5),) * 3)
    check_close(found.numpy(), expected.numpy(), "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_runs_the_reference_on_the_cpu(name, dtype):
    tensors, sizes = CASES[name](dtype)
    found = _as_tuple(OPERATORS[name](*tensors, **sizes))
    reference = getattr(torch_ops, f"{name}_reference")
    for ours, theirs in zip(found, _as_tuple(reference(*tensors, **sizes)), strict=True):
        assert ours.dtype is dtype
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
    precise = _as_tuple(reference(*(tensor.float() for tensor in tensors), **sizes))
    for ours, truth in zip(found, precise, strict=True):
        # Computed in float32 from these inputs, then rounded once: half a unit in the last place.
        unit = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
        assert ((ours.float() - truth).abs() <= 0.51 * unit + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gets_its_arguments_in_order(name, dtype, monkeypatch):
    """The CUDA branch, with the kernel on the CPU emulation in place of the device's."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the CPU emulation with")
    library = kernels.host_library(name)
    monkeypatch.setattr(torch_ops, "_has_kernels", lambda tensor: True)
    monkeypatch.setattr(torch_ops, "_current_stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(torch_ops, "kernel_library", lambda device: library)
    tensors, sizes = KERNEL_CASES[name](dtype)
    found = _as_tuple(OPERATORS[name](*tensors, **sizes))
    reference = getattr(torch_ops, f"{name}_reference")
    precise = _as_tuple(reference(*(tensor.float() for tensor in tensors), **sizes))
    for ours, truth in zip(found, precise, strict=True):
        assert ours.dtype is dtype
        name = str(dtype).removeprefix("torch.")
        check_close(ours.float().numpy(), truth.numpy(), f"{name} kernel")


@pytest.mark.parametrize("name", CASES)
def test_pytorch_accepts_the_operator(name):
    tensors, sizes = CASES[name]()
    results = torch.library.opcheck(OPERATORS[name].default, tensors, sizes)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
def test_compiled_code_keeps_the_operator_and_its_values(name):
    tensors, sizes = CASES[name]()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def work(*tensors: Tensor) -> tuple[Tensor, ...]:
        doubled = (tensors[0] * 2, *tensors[1:])
        return tuple(x + 1 for x in _as_tuple(OPERATORS[name](*doubled, **sizes)))

    torch.compiler.reset()  # it counts how often this function is compiled, over all operators
    with torch.inference_mode():
        expected = work(*tensors)
        found = torch.compile(work, fullgraph=True, backend=keep)(*tensors)
        lowered = torch.compile(work, fullgraph=True, backend="aot_eager")(*tensors)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, lowered, expected))
    (graph,) = graphs
    assert [OPERATORS[name]] == [
        node.target for node in graph.graph.nodes if "dbsam" in str(node.target)
    ]


@pytest.mark.parametrize("name", CASES)
def test_exported_programs_keep_the_operator_with_a_free_batch(name):
    class Work(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return _as_tuple(OPERATORS[name](*tensors, **sizes))

    tensors, sizes = CASES[name]()
    batched = 3 if name == "ms_deform_attn" else 1
    batch = torch.export.Dim("batch", max=64)
    shapes = tuple({0: batch} if i < batched else None for i in range(len(tensors)))
    program = torch.export.export(Work(), tensors, dynamic_shapes=(shapes,))
    more = [torch.cat([x, x, x]) if i < batched else x for i, x in enumerate(tensors)]
    for found, expected in zip(
        program.module()(*more), _as_tuple(OPERATORS[name](*more, **sizes)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, Tensor.double, "dtype torch.float64, expected one of torch.float32"),
        (-1, Tensor.half, "torch.float16 on cpu, expected torch.float32 on cpu"),
        (-1, lambda x: x[1:], "shape .* expected"),
        (0, lambda x: x.mT.contiguous().mT, "contiguous"),
        (0, lambda x: x[:0], "no axis of size 0"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(name, which, change, message):
    tensors, sizes = CASES[name]()
    changed = list(tensors)
    changed[which] = change(changed[which])
    with pytest.raises(InputError, match=f"^{name}: .*{message}"):
        OPERATORS[name](*changed, **sizes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ms_deform_attn", {"num_heads": 3}, "16 channels cannot be split into 3"),
        ("ms_deform_attn", {"num_heads": 0}, "cannot be split into 0"),
        ("ms_deform_attn", {"num_points": 4}, "offsets: shape"),
        ("ms_deform_attn", {"level_shapes": [4, 3, 2]}, "height and width"),
        ("ms_deform_attn", {"level_shapes": [4, 3, 2, 4]}, "value: shape"),
        ("ms_deform_attn", {"query_shapes": []}, "height and width"),
        ("ms_deform_attn", {"query_shapes": [2, 5, 10, 1, 0, 9]}, "at least 1"),
        ("rel_pos_attention", {"num_heads": 5}, "48 channels cannot be split into 15"),
        ("rel_pos_attention", {"side": 4}, "qkv: shape"),
        ("windowed_attention", {"num_heads": 5}, "48 channels cannot be split into 15"),
        ("windowed_attention", {"side": 4}, "rel_pos_h: shape"),
        ("depthwise_conv_gelu", {"height": 2}, "45 tokens, expected those of whole maps .* 2×5"),
        ("depthwise_conv_gelu", {"width": 0}, "45 tokens, expected .* 3×0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, change, message):
    tensors, sizes = CASES[name]()
    with pytest.raises(InputError, match=message):
        OPERATORS[name](*tensors, **{**sizes, **change})


@pytest.mark.parametrize("name", ["channel_attention", "windowed_attention"])
def test_a_map_needs_four_axes(name):
    tensors, sizes = CASES[name]()
    with pytest.raises(InputError, match="3 axes, expected"):
        OPERATORS[name](tensors[0].flatten(1, 2), *tensors[1:], **sizes)


@pytest.mark.parametrize("name", CASES)
def test_there_is_no_gradient_to_be_wrong(name):
    tensors, sizes = CASES[name]()
    first = _as_tuple(OPERATORS[name](tensors[0].requires_grad_(), *tensors[1:], **sizes))[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()
