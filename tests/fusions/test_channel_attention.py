"""Channel attention block → `dbsam::ChannelAttention`: its body, its pattern, and no match."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.fusions import check_fusion, run_body, unfused_when_changed
from support.references import check_close
from torch import nn

from dbsam_deploy.fusions import fuse
from dbsam_deploy.fusions.channel_attention import NAME, body, supports
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.kernels.torch_ops import channel_attention_reference
from dbsam_deploy.model.blocks import ChannelAttentionBlock

DTYPES = {torch.float32: "float32", torch.float16: "float16"}


def random_block(channels):
    block = ChannelAttentionBlock(channels)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return block


@pytest.fixture(scope="module", params=DTYPES, ids=DTYPES.values())
def graph(request, traced):
    x = torch.randn(2, 16, 5, 6).to(request.param)
    block = random_block(16).to(request.param)
    return traced(block, {"x": x}), {"x": x.numpy()}, DTYPES[request.param], block


def test_the_pattern_becomes_a_node_and_a_product_on_tokens(graph):
    model, feed, dtype, block = graph
    fused = check_fusion(model, feed, dtype)
    nodes = list(fused.graph)
    kinds = ["Transpose", NAME, "MatMul", "Reshape", "Add", "Transpose"]
    assert [node.op_type for node in nodes] == kinds
    assert nodes[1].domain == DOMAIN
    assert {key: a.value for key, a in nodes[1].attributes.items()} == {
        "epsilon": pytest.approx(1e-6),
        "channels": 16,
        **PLUGIN,
    }
    found = [value.const_value.numpy() for value in nodes[1].inputs[1:]]
    expected = [
        *(block.pre_norm.weight, block.pre_norm.bias, block.conv_dw.weight),
        *(block.se.fc1.weight[:, :, 0, 0], block.se.fc2.weight[:, :, 0, 0]),
        block.conv_pw.weight[:, :, 0, 0].T,
    ]
    for array, weight in zip(found, expected, strict=True):
        assert np.array_equal(array, weight.detach().numpy())


def test_a_changed_number_is_no_match(graph):
    model, feed, dtype, _ = graph
    left = unfused_when_changed(model, feed, dtype)
    weights = ("pre_norm.weight", "pre_norm.bias", "conv_dw.weight", "conv_pw.weight")
    free = {*weights, "se.fc1.weight", "se.fc2.weight"}
    constants = {tensor.name for tensor in model.graph.initializer}
    assert free <= constants
    assert constants - free <= left  # GELU's, the axes of the mean, the biases that are zero
    for piece in ("pads", "group", "axis", "keepdims", "strides", "dilations", "perm"):
        assert any(name.endswith(piece) for name in left), piece


def test_a_convolution_with_a_bias_is_no_match(traced):
    block = random_block(8)
    block.conv_pw.bias = nn.Parameter(torch.ones(8))
    model = ir.from_proto(traced(block, {"x": torch.randn(2, 8, 3, 3)}))
    assert fuse(model)["channel_attention"] == 0


def test_channels_that_the_kernel_does_not_run_are_left_alone(traced):
    model = ir.from_proto(traced(random_block(12), {"x": torch.randn(2, 12, 3, 3)}))
    before = [node.op_type for node in model.graph]
    assert fuse(model)["channel_attention"] == 0
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(("channels", "runs"), [(768, True), (1024, True), (1032, False)])
def test_limits_of_the_kernel(channels, runs):
    assert supports(channels) == runs


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("height", "width", "channels", "reduced"), [(1, 1, 8, 2), (4, 7, 24, 5), (6, 2, 40, 10)]
)
def test_the_body_is_the_reference(height, width, channels, reduced, dtype):
    shapes = [
        *((3, height, width, channels), (channels,), (channels,), (channels, 1, 3, 3)),
        *((reduced, channels), (channels, reduced), (channels, channels)),
    ]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    sizes = {"epsilon": 1e-5, "channels": channels}
    found = run_body(body(), [x.numpy() for x in inputs], sizes)
    expected = channel_attention_reference(*inputs, epsilon=1e-5)
    for array, wanted, what in zip(found, expected, ("hidden", "gated_weight"), strict=True):
        assert array.dtype == wanted.numpy().dtype
        check_close(array, wanted.float().numpy(), DTYPES[dtype], what)
