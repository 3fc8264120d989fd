"""MixFFN → `dbsam::DepthwiseConvGelu`: its body, its pattern, and nothing unless asked."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from support.fusions import check_fusion, run_body, unfused_when_changed
from support.references import check_close
from torch import Tensor, nn

from dbsam_deploy.fusions import _OPTIONAL, expected_counts, fuse
from dbsam_deploy.fusions.depthwise_conv_gelu import NAME, STEM, body, supports
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.kernels.torch_ops import depthwise_conv_gelu_reference
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.blocks import MixFFN
from dbsam_deploy.recipe import OPTIONAL_FUSIONS

DTYPES = {torch.float32: "float32", torch.float16: "float16"}
ASKED = (STEM,)


class Levels(nn.Module):
    """`MixFFN` on maps of the given shapes."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.mlp = shapes, MixFFN(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.shapes)

    def tokens(self) -> Tensor:
        cells = sum(height * width for height, width in self.shapes)
        return torch.randn(2, cells, 8)


def _graph(traced, levels, dtype):
    """The traced module, its input, the key of its tolerance, and its convolution."""
    module = Levels(*[(5, 6)] * levels).to(dtype)
    x = module.tokens().to(dtype)
    return traced(module, {"x": x}), {"x": x.numpy()}, DTYPES[dtype], module.mlp.dwconv.dwconv


@pytest.fixture(scope="module")
def several(traced):
    return _graph(traced, 3, torch.float16)


@pytest.fixture(scope="module", params=["one level", "three levels"])
def graph(request, traced, several):
    return several if request.param == "three levels" else _graph(traced, 1, torch.float32)


def test_the_tokens_go_straight_into_the_node(graph):
    model, feed, dtype, convolution = graph
    nodes = list(check_fusion(model, feed, dtype, ASKED).graph)
    kinds = ["MatMul", "Add", NAME, "MatMul", "Add"]
    assert [node.op_type for node in nodes] == kinds
    assert nodes[2].domain == DOMAIN
    expected = {"height": 5, "width": 6, "channels": 32, **PLUGIN}
    assert {key: a.value for key, a in nodes[2].attributes.items()} == expected
    found = [value.const_value.numpy() for value in nodes[2].inputs[1:]]
    for array, weight in zip(found, (convolution.weight, convolution.bias), strict=True):
        assert np.array_equal(array, weight.detach().numpy())


def test_unless_asked_nothing_changes(graph):
    model = ir.from_proto(graph[0])
    before = ir.to_proto(model).SerializeToString()
    assert not any(fuse(model).values())
    assert ir.to_proto(model).SerializeToString() == before


def test_a_changed_number_is_no_match(graph):
    model, feed, dtype, _ = graph
    left = unfused_when_changed(model, feed, dtype, ASKED)
    free = {"mlp.fc1.bias", "mlp.fc2.bias", "mlp.dwconv.dwconv.weight", "mlp.dwconv.dwconv.bias"}
    matrices = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    constants = {tensor.name for tensor in model.graph.initializer}
    assert free <= constants
    unused = constants - {name for node in model.graph.node for name in node.input}
    assert constants - free - matrices - unused <= left  # GELU's, sizes, shapes
    for piece in ("pads", "group", "strides", "dilations", "perm", "axis"):
        assert any(name.endswith(piece) for name in left), piece


def _own_shape(model: onnx.ModelProto, level: int) -> None:
    """As many cells as the others have, in other rows."""
    views = [n for n in model.graph.node if n.op_type == "Reshape" and "Conv" in _users(model, n)]
    views[level].input[1] = "own_shape"
    shape = np.array([-1, 32, 6, 5])
    model.graph.initializer.append(numpy_helper.from_array(shape, "own_shape"))


def _own_weight(model: onnx.ModelProto, level: int) -> None:
    convolution = [node for node in model.graph.node if node.op_type == "Conv"][level]
    (weight,) = [t for t in model.graph.initializer if t.name == convolution.input[1]]
    convolution.input[1] = "own_weight"
    own = numpy_helper.to_array(weight) + 1
    model.graph.initializer.append(numpy_helper.from_array(own, "own_weight"))


def _other_order(model: onnx.ModelProto, level: int) -> None:
    (joined,) = [node for node in model.graph.node if node.op_type == "Concat"]
    joined.input[0], joined.input[level] = joined.input[level], joined.input[0]


def _twice(model: onnx.ModelProto, level: int) -> None:
    """A level that is read by another one as well."""
    (joined,) = [node for node in model.graph.node if node.op_type == "Concat"]
    joined.input[0] = joined.input[level]


def _users(model: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    return {user.op_type for user in model.graph.node if node.output[0] in user.input}


@pytest.mark.parametrize("change", [_own_shape, _own_weight, _other_order, _twice])
@pytest.mark.parametrize("level", [1, 2])
def test_levels_that_differ_are_left_alone(several, change, level):
    model = onnx.ModelProto.FromString(several[0].SerializeToString())
    change(model, level)
    assert not any(fuse(ir.from_proto(model), ASKED).values())


@pytest.mark.parametrize(("channels", "runs"), [(8, True), (20, False), (3072, True), (0, False)])
def test_limits_of_the_kernel(channels, runs):
    assert supports(channels) == runs


@pytest.mark.parametrize(
    ("variant", "count"),
    [("db_sam", 8), ("db_sam_4level", 8), ("db_sam_plus", 8), ("sam_vit_b", 0)],
)
def test_expected_counts_follow_the_configuration(variant, count):
    config = VARIANTS[variant]
    assert expected_counts(config)["depthwise_conv_gelu"] == 0
    assert expected_counts(config, (), ASKED)["depthwise_conv_gelu"] == count
    block = "image_encoder.adapter.vit_cross_attn_blocks.2.mlp"
    quantized = (f"{block}.fc1", f"{block}.dwconv.dwconv", f"{block}.dwconv.dwconv")
    found = expected_counts(config, quantized, ASKED)["depthwise_conv_gelu"]
    assert found == max(count - 1, 0)


def test_a_recipe_may_ask_for_what_there_is():
    assert set(OPTIONAL_FUSIONS) == set(_OPTIONAL)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("levels", "height", "width", "channels"), [(1, 1, 1, 8), (1, 4, 7, 24), (3, 6, 2, 40)]
)
def test_the_body_is_the_reference(levels, height, width, channels, dtype):
    shapes = ((2, levels * height * width, channels), (channels, 1, 3, 3), (channels,))
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    sizes = {"height": height, "width": width}
    (found,) = run_body(body(), [x.numpy() for x in inputs], {**sizes, "channels": channels})
    expected = depthwise_conv_gelu_reference(*inputs, **sizes)
    assert found.dtype == expected.numpy().dtype
    check_close(found, expected.float().numpy(), DTYPES[dtype])
