"""Deformable sampling → `dbsam::MsDeformAttn`: its body, its pattern, and what is no match."""

import math
from itertools import chain

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.fusions import check_fusion, run_body, unfused_when_changed
from support.references import check_close
from torch import nn

from dbsam_deploy.core.errors import ExportError
from dbsam_deploy.fusions import fuse
from dbsam_deploy.fusions.ms_deform_attn import NAME, body, supports
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.graphs.encoder_decoder import BatchedSampling
from dbsam_deploy.graphs.precision import Fp32Island
from dbsam_deploy.kernels.torch_ops import ms_deform_attn_reference
from dbsam_deploy.model.deform_attn import reference_points

DTYPES = {torch.float32: "float32", torch.float16: "float16"}


class Sampling(nn.Module):
    """The part of the module between its Linear layers, as the encoder graph has it."""

    def __init__(self, levels, queries, heads, points, *, half=False):
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.centres = reference_points(queries)
        self.sampling = BatchedSampling()
        if half:
            self.sampling = Fp32Island(self.sampling, torch.float16)

    def forward(self, value, offsets, weights):
        split = (offsets.shape[1], self.heads, len(self.levels), self.points)
        tokens = value.reshape(-1, value.shape[1], self.heads, value.shape[2] // self.heads)
        offsets, weights = offsets.reshape(-1, *split, 2), weights.reshape(-1, *split)
        return self.sampling(tokens, self.levels, offsets, weights, self.centres)


def random_inputs(levels, queries, heads, depth, points, *, batch=2, half=False):
    """Offsets of up to a map's side, so that many samples are outside."""
    cells, count = (sum(math.prod(shape) for shape in shapes) for shapes in (levels, queries))
    samples = heads * len(levels) * points
    inputs = {
        "value": torch.randn(batch, cells, heads * depth),
        "offsets": torch.randn(batch, count, samples * 2) * levels[0][1],
        "weights": torch.randn(batch, count, samples) * 3,
    }
    return {key: x.half() if half else x for key, x in inputs.items()}


CASES = [
    # levels, queries, heads, depth, points, half precision
    (((4, 6),), ((4, 6),), 2, 64, 4, False),
    (((3, 5),) * 5, ((5, 2),) * 3, 2, 8, 4, True),
]


@pytest.fixture(scope="module", params=CASES, ids=["one level", "five levels, half"])
def graph(request, traced):
    *sizes, half = request.param
    levels, queries, heads, _, points = sizes
    inputs = random_inputs(*sizes, half=half)
    model = traced(Sampling(levels, queries, heads, points, half=half), inputs)
    feed = {key: x.numpy() for key, x in inputs.items()}
    return request.param, model, feed, "float16" if half else "float32"


def test_the_pattern_becomes_one_node_with_the_same_values(graph):
    (levels, queries, heads, _, points, _), model, feed, dtype = graph
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == 1
    (node,) = check_fusion(model, feed, dtype).graph
    assert (node.domain, node.op_type) == (DOMAIN, NAME)
    assert [value.name for value in node.inputs] == ["value", "offsets", "weights"]
    assert {key: a.value for key, a in node.attributes.items()} == {
        "num_heads": heads,
        "num_points": points,
        "level_shapes": tuple(chain(*levels)),
        "query_shapes": tuple(chain(*queries)),
        **PLUGIN,
    }


def test_a_changed_number_is_no_match(graph):
    _, model, feed, dtype = graph
    left = unfused_when_changed(model, feed, dtype)
    constants = {tensor.name for tensor in model.graph.initializer}
    assert constants <= left  # sizes, centres and the map to -1…1: all of them are the op's
    assert any(name.endswith("align_corners") for name in left)


@pytest.mark.parametrize("mode", ["nearest", "border"])
def test_another_sampling_is_no_match(graph, mode):
    model = ir.from_proto(graph[1])
    (node,) = (node for node in model.graph if node.op_type == "GridSample")
    key = "padding_mode" if mode == "border" else "mode"
    node.attributes[key] = ir.AttrString(key, mode)
    assert fuse(model)["ms_deform_attn"] == 0


def test_a_value_that_is_used_elsewhere_keeps_its_nodes(graph):
    model = ir.from_proto(graph[1])
    (node,) = (node for node in model.graph if node.op_type == "Softmax")
    model.graph.outputs.append(node.outputs[0])
    before = [node.op_type for node in model.graph]
    assert fuse(model)["ms_deform_attn"] == 0
    assert [node.op_type for node in model.graph] == before


def test_sizes_that_the_kernel_does_not_run_are_left_alone(traced):
    inputs = random_inputs(((2, 3),), ((2, 2),), 1, 12, 1)
    model = ir.from_proto(traced(Sampling(((2, 3),), ((2, 2),), 1, 1), inputs))
    assert fuse(model)["ms_deform_attn"] == 0


@pytest.mark.parametrize(
    ("head_dim", "levels", "points", "runs"),
    [(64, 5, 4, True), (256, 8, 8, True), (264, 1, 4, False), (8, 9, 1, False), (8, 1, 9, False)],
)
def test_limits_of_the_kernel(head_dim, levels, points, runs):
    assert supports(head_dim, levels, points) == runs


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("levels", "queries", "heads", "depth", "points"),
    [
        (((1, 1),), ((1, 1),), 1, 8, 1),
        (((7, 3),), ((2, 9),), 3, 24, 4),
        (((4, 4),) * 4, ((4, 4),), 2, 16, 4),
        (((2, 5),) * 8, ((3, 1),) * 5, 1, 8, 8),
        (((1, 6),), ((6, 1),) * 2, 12, 64, 2),
    ],
)
def test_the_body_is_the_reference(levels, queries, heads, depth, points, dtype):
    inputs = random_inputs(levels, queries, heads, depth, points, batch=3)
    sizes = {
        "num_heads": heads,
        "num_points": points,
        "level_shapes": list(chain(*levels)),
        "query_shapes": list(chain(*queries)),
    }
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    (found,) = run_body(body(), [x.numpy() for x in inputs.values()], sizes)
    expected = ms_deform_attn_reference(**inputs, **sizes)
    assert found.dtype == expected.numpy().dtype
    check_close(found, expected.float().numpy(), DTYPES[dtype])


def test_samples_outside_count_as_zero():
    inputs = random_inputs(((3, 3),), ((2, 2),), 1, 8, 2)
    inputs["offsets"] = torch.full_like(inputs["offsets"], 1e4)
    sizes = {"num_heads": 1, "num_points": 2, "level_shapes": [3, 3], "query_shapes": [2, 2]}
    (found,) = run_body(body(), [x.numpy() for x in inputs.values()], sizes)
    assert not np.any(found)


def test_levels_of_different_shapes_are_refused():
    levels = ((2, 3), (3, 2))
    inputs = random_inputs(levels, ((2, 2),), 1, 8, 2)
    with pytest.raises(ExportError, match="expected maps of one shape"):
        Sampling(levels, ((2, 2),), 1, 2)(**inputs)
