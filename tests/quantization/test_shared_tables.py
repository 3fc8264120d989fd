"""Repetitive tables become smaller without a change of any value; others stay."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.fusions import run_onnx

from dbsam_deploy.quantization.shared_tables import share_tables

HEADS, SIDE = 3, 8


def relative(rng):
    """(heads, N, N) table of |dx|, |dy| as in TinyViT, N = SIDE²."""
    points = np.stack(np.meshgrid(range(SIDE), range(SIDE)), -1).reshape(-1, 2)
    offsets = np.abs(points[:, None] - points[None])
    values = rng.standard_normal((HEADS, SIDE * SIDE)).astype(np.float32)
    return values[:, offsets[..., 0] * SIDE + offsets[..., 1]]


def graph(*tables, op="Add"):
    names = [f"t{i}" for i in range(len(tables))]
    nodes = [helper.make_node(op, ["x", name], [f"y{name}"]) for name in names]
    shape = ["n", HEADS, SIDE * SIDE, SIDE * SIDE]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, shape) for n in names],
            [numpy_helper.from_array(t, n) for t, n in zip(tables, names, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def test_values_stay_and_tables_of_one_pattern_share_their_index(rng):
    model = graph(relative(rng), relative(rng))
    x = rng.standard_normal((2, HEADS, SIDE**2, SIDE**2)).astype(np.float32)
    before, size = run_onnx(model, {"x": x}), model.ByteSize()
    saved = share_tables(model)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node].count("Gather") == 2
    assert len([t for t in model.graph.initializer if t.data_type == TensorProto.INT32]) == 1
    assert saved == pytest.approx(size - model.ByteSize(), abs=600)
    assert model.ByteSize() < 0.3 * size
    for a, b in zip(run_onnx(model, {"x": x}), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_constants_stay(rng):
    without = rng.standard_normal((HEADS, SIDE**2, SIDE**2)).astype(np.float32)
    for model in (graph(without), graph(relative(rng), op="Mul")):
        before = model.SerializeToString()
        assert share_tables(model) == 0
        assert model.SerializeToString() == before
