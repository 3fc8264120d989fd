"""ONNX files appear whole and checked, without the notes of the machine that made them."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from dbsam_deploy.core.errors import ExportError
from dbsam_deploy.files.onnx_files import SCOPES, check_valid, save_onnx


def noted_model(op: str = "Relu") -> onnx.ModelProto:
    """One node; everything that can carry a note carries one, and the node its module's path."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    spare = helper.make_tensor("spare", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node(op, ["x"], ["y"], name="node")
    graph = helper.make_graph([node], "graph", [x], [y], [spare])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    inside = model.graph
    owners = (model, inside, inside.node[0], inside.input[0], inside.output[0])
    for owner in (*owners, inside.initializer[0]):
        owner.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "model.py", line 3')
    inside.node[0].metadata_props.add(key=SCOPES, value="['', 'neck']")
    return model


@pytest.mark.parametrize("form", ["proto", "ir"])
def test_only_module_paths_are_kept_of_the_notes(tmp_path: Path, form: str) -> None:
    model = noted_model()
    path = tmp_path / "graph.onnx"
    save_onnx(model if form == "proto" else ir.from_proto(model), path, check_valid)
    assert b"stack_trace" not in path.read_bytes()
    (node,) = onnx.load(path).graph.node
    assert [(note.key, note.value) for note in node.metadata_props] == [(SCOPES, "['', 'neck']")]


def test_a_refused_graph_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"graph\.onnx: onnx's checker refuses it"):
        save_onnx(noted_model("NoSuchOperator"), path, check_valid)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
