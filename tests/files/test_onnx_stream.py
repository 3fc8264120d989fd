"""A file that is written a weight at a time has the bytes of one that is written at once."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from dbsam_deploy.files import onnx_files
from dbsam_deploy.files.onnx_data import data_path
from dbsam_deploy.files.onnx_files import SCOPES, save_onnx
from dbsam_deploy.files.onnx_stream import write_whole


def model(sizes: tuple[int, ...] = (3000, 1, 70_000, 5)) -> ir.Model:
    """A graph with weights of these many float32, notes and a function."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(size, np.float32), f"w{i}")
        for i, size in enumerate(sizes)
    ]
    weights += [numpy_helper.from_array(np.array([-1], np.int64), "shape")]
    nodes = [helper.make_node("Twice", ["x"], ["x0"], domain="own")]
    for i in range(len(sizes)):
        nodes.append(helper.make_node("ReduceSum", [f"w{i}"], [f"sum{i}"], keepdims=0))
        nodes.append(helper.make_node("Add", [f"x{i}", f"sum{i}"], [f"x{i + 1}"]))
    nodes[1].metadata_props.add(key=SCOPES, value="['encoder']")
    nodes.append(helper.make_node("Reshape", [f"x{len(sizes)}", "shape"], ["y"]))
    values = [helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    twice = helper.make_function(
        "own", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights, doc_string="text")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    made = helper.make_model(
        graph, functions=[twice], opset_imports=opsets, ir_version=10, producer_name="dbsam_deploy"
    )
    return ir.from_proto(made)


def test_the_bytes_are_those_of_a_file_written_at_once(tmp_path, monkeypatch):
    files = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(onnx_files, "STREAMED_BYTES", limit)
        path = tmp_path / str(limit) / "g.onnx"
        path.parent.mkdir()
        save_onnx(model(), path, onnx_files.check_valid)
        assert [file.name for file in path.parent.iterdir()] == ["g.onnx"]
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) > 4 * 73_000


def test_no_more_than_a_weight_is_written_at_once(tmp_path):
    class Widest(io.BytesIO):
        most = 0

        def write(self, data):
            self.most = max(self.most, len(data))
            return super().write(data)

    stream, sizes = Widest(), (40_000,) * 5
    path = tmp_path / "g.onnx"
    ir.save(model(sizes), path, external_data="g.data", size_threshold_bytes=1024)
    proto = onnx.load(path, load_external_data=False)
    write_whole(proto, tmp_path / "g.data", stream)
    assert stream.most == 4 * 40_000
    found = onnx.load_model_from_string(stream.getvalue())
    for tensor in found.graph.initializer[:5]:
        assert len(tensor.raw_data) == 4 * 40_000
    assert proto.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "STREAMED_BYTES", 0)
    path = tmp_path / "g.onnx"
    path.write_bytes(b"earlier")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_files, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        save_onnx(model(), path)
    assert path.read_bytes() == b"earlier"
    assert not data_path(path).exists()
    assert list(tmp_path.iterdir()) == [path]
