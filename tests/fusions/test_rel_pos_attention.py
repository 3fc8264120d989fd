"""SAM's attention → `dbsam::RelPosAttention`: its body, its pattern, and what is no match."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.fusions import check_fusion, run_body, run_onnx, unfused_when_changed
from support.references import check_close
from torch import nn

from dbsam_deploy.fusions import fuse, rel_pos_attention
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.fusions.rel_pos_attention import NAME, body, head_groups, supports
from dbsam_deploy.graphs.encoder_decoder import RelPosAttention
from dbsam_deploy.kernels.torch_ops import rel_pos_attention_reference

DTYPES = {torch.float32: "float32", torch.float16: "float16"}


def attention(heads, side, depth=64):
    """The encoder graph's module without its two Linear layers, and its compact tables."""
    sam = SimpleNamespace(
        num_heads=heads,
        scale=depth**-0.5,
        qkv=nn.Identity(),
        proj=nn.Identity(),
        rel_pos_h=torch.randn(2 * side - 1, depth),
        rel_pos_w=torch.randn(2 * side - 1, depth),
    )
    return Unpacked(RelPosAttention(sam, side)), (sam.rel_pos_h, sam.rel_pos_w)


class Unpacked(nn.Module):
    """`RelPosAttention` where its qkv Linear, which would triple the channels, is left out."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.module.qkv = Packed()

    def forward(self, qkv):
        self.module.qkv.packed = qkv
        return self.module(qkv[..., : qkv.shape[-1] // 3])


class Packed(nn.Module):
    """Stands for the Linear: gives what it was told."""

    def forward(self, x):
        return self.packed


@pytest.fixture(scope="module", params=DTYPES, ids=DTYPES.values())
def graph(request, traced):
    heads, side, dtype = 2, 5, request.param
    module, tables = attention(heads, side)
    qkv = torch.randn(3, side * side, 3 * heads * 64).to(dtype)
    model = traced(module.to(dtype), {"qkv": qkv})
    return model, {"qkv": qkv.numpy()}, DTYPES[dtype], tables


def test_the_pattern_becomes_one_node_with_the_same_values(graph):
    model, feed, dtype, tables = graph
    fused = check_fusion(model, feed, dtype)
    (node,) = fused.graph
    assert (node.domain, node.op_type) == (DOMAIN, NAME)
    assert node.inputs[0].name == "qkv"
    assert {key: a.value for key, a in node.attributes.items()} == {
        "num_heads": 2,
        "side": 5,
        "scale": 0.125,
        **PLUGIN,
    }
    for value, table in zip(node.inputs[1:], tables, strict=True):
        assert np.array_equal(value.const_value.numpy(), table.numpy().astype(dtype))
    assert set(fused.graph.initializers) == {value.name for value in node.inputs[1:]}


def test_a_changed_number_is_no_match(graph):
    model, feed, dtype, _ = graph
    left = unfused_when_changed(model, feed, dtype)
    # A table with one other entry is not that of relative positions; another scale is one.
    scalars = {t.name for t in model.graph.initializer if not t.dims and t.data_type != 7}
    assert len(scalars) == 1
    assert {tensor.name for tensor in model.graph.initializer} - scalars <= left
    assert sum(name.startswith("Transpose") for name in left) == 5
    assert any(name.startswith("Softmax") for name in left)


@pytest.mark.parametrize(("depth", "side"), [(32, 3), (64, 65)])
def test_sizes_that_the_kernel_does_not_run_are_left_alone(traced, depth, side):
    assert not supports(depth, side)
    module, _ = attention(1, side, depth)
    model = ir.from_proto(traced(module, {"qkv": torch.randn(2, side * side, 3 * depth)}))
    assert fuse(model)["rel_pos_attention"] == 0


@pytest.mark.parametrize(("head_dim", "side"), [(64, 64), (64, 14), (64, 1)])
def test_sizes_that_the_kernel_runs(head_dim, side):
    assert supports(head_dim, side)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("windows", "heads", "side", "depth"), [(1, 1, 1, 64), (2, 3, 4, 64), (5, 2, 7, 16)]
)
def test_the_body_is_the_reference(windows, heads, side, depth, dtype):
    tables = [torch.randn(2 * side - 1, depth).to(dtype) for _ in range(2)]
    qkv = torch.randn(windows, side * side, 3 * heads * depth).to(dtype)
    sizes = {"num_heads": heads, "side": side, "scale": depth**-0.5}
    (found,) = run_body(body(), [qkv.numpy(), *(table.numpy() for table in tables)], sizes)
    expected = rel_pos_attention_reference(qkv, *tables, **sizes)
    assert found.dtype == expected.numpy().dtype
    check_close(found, expected.float().numpy(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
def test_heads_in_groups_are_the_same_in_float32_bit_for_bit(dtype):
    heads, side = 6, 5
    inputs = [torch.randn(2, side * side, 3 * heads * 64), *torch.randn(2, 2 * side - 1, 64)]
    feed = [x.to(dtype).numpy() for x in inputs]
    sizes = {"num_heads": heads, "side": side, "scale": 0.125}
    (whole,) = run_body(body(), feed, sizes)
    for groups in (2, 3, 6):
        (found,) = run_body(body(groups), feed, sizes)
        check_close(found, whole.astype(np.float32), DTYPES[dtype])
        if dtype is torch.float32:  # in float16 one number of 20 000 is rounded the other way
            np.testing.assert_array_equal(found, whole)


def test_a_group_has_as_many_heads_as_there_is_room_for():
    assert head_groups(2, 64) == 1  # db_sam_tiny
    assert head_groups(12, 64) == 6  # SAM's ViT-B
    assert head_groups(16, 64) == 8
    assert head_groups(12, 14) == head_groups(12, 16) == 1
    assert head_groups(3, 64) == 3  # no two of three are a part of the heads
    assert head_groups(5, 200) == 5  # not even one fits


def test_heads_that_are_not_fused_are_taken_in_groups_by_the_graph_itself(traced, monkeypatch):
    heads, side, depth = 4, 5, 32
    qkv = torch.randn(2, side * side, 3 * heads * depth)
    softmax, found = [], []
    for groups in (1, 2):
        monkeypatch.setattr(rel_pos_attention, "GROUP_BYTES", heads // groups * side**4 * 4)
        torch.manual_seed(0)
        module, _ = attention(heads, side, depth)
        model = traced(module, {"qkv": qkv})
        softmax.append(sum(node.op_type == "Softmax" for node in model.graph.node))
        found += [module(qkv).numpy(), run_onnx(model, {"qkv": qkv.numpy()})[0]]
    assert softmax == [1, 2]
    for other in found[1:]:
        check_close(other, found[0], "float32")


def test_the_largest_attention_of_a_graph_decides_for_its_body(traced, monkeypatch):
    """Two nodes share the body, of which only the one with the larger window has to be divided."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = attention(4, 3)[0], attention(4, 6)[0]

        def forward(self, qkv):
            return self.small(qkv[:, :9]).sum(1, keepdim=True) + self.large(qkv)

    feed = {"qkv": torch.randn(2, 36, 3 * 4 * 64)}
    model = traced(Both(), feed)
    wanted = run_onnx(model, {"qkv": feed["qkv"].numpy()})[0]
    for room, groups in ((4, 1), (2, 2), (1, 4), (0.5, 4)):
        monkeypatch.setattr(rel_pos_attention, "GROUP_BYTES", room * 6**4 * 4)
        fused = ir.from_proto(model)
        assert fuse(fused)["rel_pos_attention"] == 2
        (function,) = fused.functions.values()
        assert sum(node.op_type == "Softmax" for node in function) == groups
        check_close(
            run_onnx(ir.to_proto(fused), {"qkv": feed["qkv"].numpy()})[0], wanted, "float32"
        )
