"""Small real ONNX graphs of the contract, with random weights, as an export."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dbsam_deploy.artefact import Artefact, graph_file, load_artefact, write_artefact
from dbsam_deploy.core.contract import MASK_BITS, Geometry, GraphSpec, graph_specs
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.points import POINTS, PointRules, usual_record
from dbsam_deploy.files import onnx_files
from dbsam_deploy.files.onnx_files import check_valid, save_onnx
from dbsam_deploy.graphs.imaging_graphs import put_pixels_before, write_mask_bits

from .graph_builder import GraphBuilder

TINY_SIZE = 128

_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


class _Graph(GraphBuilder):
    """Collects the nodes of a graph of the contract."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self.spec = spec

    def axes(self, op: str, value: str, *axes: int, output: str | None = None, **more) -> str:
        return self.add(op, value, self.constant(np.array(axes, np.int64)), output=output, **more)

    def save(self, path: Path) -> None:
        def describe(specs):
            return [helper.make_tensor_value_info(s.name, _TYPES[s.dtype], s.axes) for s in specs]

        graph = helper.make_graph(
            self.nodes,
            self.spec.name,
            describe(self.spec.inputs),
            describe(self.spec.outputs),
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _encoder(spec: GraphSpec, path: Path, rng: np.random.Generator, size: Geometry) -> None:
    graph = _Graph(spec)
    patch = [size.image_size // size.grid] * 2
    weight = (rng.standard_normal((256, 3, *patch)) * 0.8 / patch[0]).astype(np.float32)
    patches = graph.add("Conv", "image", graph.constant(weight), kernel_shape=patch, strides=patch)
    graph.add("Tanh", patches, output="image_embeddings")
    for finer in spec.outputs[1:]:
        fewer = graph.constant(rng.standard_normal((finer.axes[1], 256, 1, 1)).astype(np.float32))
        small = graph.add("Conv", "image_embeddings", fewer, kernel_shape=[1, 1])
        scales = np.array([1, 1, *[finer.axes[2] // size.grid] * 2], np.float32)
        graph.add("Resize", small, "", graph.constant(scales), output=finer.name, mode="linear")
    graph.save(path)


def _image_term(graph: _Graph, rng: np.random.Generator) -> str:
    """(B, 1, 1, 4G, 4G): what the image adds to every mask."""
    weight = graph.constant((rng.standard_normal((1, 256, 1, 1)) * 0.3).astype(np.float32))
    small = graph.add("Conv", "image_embeddings", weight, kernel_shape=[1, 1])
    scales = graph.constant(np.array([1, 1, 4, 4], np.float32))
    term = graph.add("Resize", small, "", scales, mode="linear")
    side = graph.spec.outputs[0].axes[-1]
    for finer in graph.spec.inputs[1:]:
        if finer.name.startswith("high_res"):
            mean = graph.axes("ReduceMean", finer.name, 1)
            times = np.array([1, 1, *[side // finer.axes[2]] * 2], np.float32)
            more = graph.add("Resize", mean, "", graph.constant(times), mode="linear")
            term = graph.add("Add", term, more)
    return graph.axes("Unsqueeze", term, 1)


def _grid(graph: _Graph, size: Geometry) -> tuple[str, str]:
    """x and y of the mask grid's cells in the model frame, (1, 1, 1, 1, 4G) and (…, 4G, 1)."""
    cell = np.float32(size.frame_side / size.mask_side)
    centres = (np.arange(size.mask_side, dtype=np.float32) + np.float32(0.5)) * cell
    return (
        graph.constant(centres.reshape(1, 1, 1, 1, -1)),
        graph.constant(centres.reshape(1, 1, 1, -1, 1)),
    )


def _decoder(spec: GraphSpec, path: Path, rng: np.random.Generator, size: Geometry) -> None:
    """Logits: distance to the box's nearest side, bent by the image."""
    graph = _Graph(spec)
    x, y = _grid(graph, size)
    sides = []
    for index, axis in enumerate((x, y, x, y)):
        number = graph.constant(np.array([index], np.int64))
        corner = graph.axes("Unsqueeze", graph.add("Gather", "boxes", number, axis=2), 3, 4)
        order = (axis, corner) if index < 2 else (corner, axis)
        sides.append(graph.add("Sub", *order))
    inside = graph.add("Mul", graph.add("Min", *sides), graph.constant(np.float32(0.2)))
    graph.add("Add", inside, _image_term(graph, rng), output="low_res_masks")
    mean = graph.axes("ReduceMean", "low_res_masks", 3, 4, keepdims=0)
    graph.add("Sigmoid", mean, output="iou_predictions")
    graph.save(path)


def _prompt_decoder(spec: GraphSpec, path: Path, rng: np.random.Generator, size: Geometry) -> None:
    """Logits: a hill or a hollow at each point by its label, the image, and the earlier mask."""
    graph = _Graph(spec)
    x, y = _grid(graph, size)
    squares = []
    for index, axis in enumerate((x, y)):
        number = graph.constant(np.array([index], np.int64))
        at = graph.axes("Unsqueeze", graph.add("Gather", "point_coords", number, axis=3), 4)
        distance = graph.add("Sub", axis, at)
        squares.append(graph.add("Mul", distance, distance))
    spread = graph.add(
        "Div", graph.add("Add", *squares), graph.constant(np.float32(size.image_size))
    )
    heights = graph.constant(np.array([0, -4, 4, 2, 2], np.float32))  # labels -1, 0, 1, 2, 3
    label = graph.add("Add", "point_labels", graph.constant(np.int32(1)))
    height = graph.axes("Unsqueeze", graph.add("Gather", heights, label), 3, 4)
    one = graph.constant(np.float32(1))
    hills = graph.axes("ReduceSum", graph.add("Div", height, graph.add("Add", spread, one)), 2)
    earlier = graph.add("Mul", "mask_input", graph.axes("Unsqueeze", "has_mask_input", 2, 3, 4))
    logits = graph.add("Add", graph.add("Add", hills, _image_term(graph, rng)), earlier)
    tokens = np.array([0, 0.5, -0.5, 1.5], np.float32).reshape(1, 1, 4, 1, 1)
    graph.add("Add", logits, graph.constant(tokens), output="low_res_masks")
    mean = graph.axes("ReduceMean", "low_res_masks", 3, 4, keepdims=0)
    graph.add("Sigmoid", mean, output="iou_predictions")
    graph.save(path)


def make_tiny_artefact(
    folder: Path,
    image_size: int = TINY_SIZE,
    mode: str = "sam",
    seed: int = 0,
    stride: int = 16,
    *,
    high_res: bool = False,
    frame_size: int | None = None,
    pixels_in_graph: bool = False,
) -> Artefact:
    """Write an export of small graphs with random weights: masks follow both prompt and image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    how = Preprocessing(
        image_size, mode, embedding_stride=stride, high_res=high_res, frame_size=frame_size
    )
    specs = graph_specs(how)
    paths = {name: folder / f"{name}.onnx" for name in specs}
    _encoder(specs["encoder"], paths["encoder"], rng, how)
    _decoder(specs["decoder"], paths["decoder"], rng, how)
    _prompt_decoder(specs["prompt_decoder"], paths["prompt_decoder"], rng, how)
    if pixels_in_graph:
        how = dataclasses.replace(how, pixels_in_graph=True)
        put_pixels_before(paths["encoder"], how)
        paths[MASK_BITS] = write_mask_bits(folder, how, 18)
    artefact = Artefact(
        folder=folder,
        variant="tiny_test",
        precision="fp32",
        preprocessing=how,
        graphs={name: graph_file(path, folder) for name, path in paths.items()},
        weights={
            "source": "random",
            "sha256": None,
            "trained": False,
            "note": "test graphs",
            POINTS: usual_record("tiny_test", trained=False),
        },
    )
    write_artefact(artefact)
    return load_artefact(folder)


def in_two_files(artefact: Artefact, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """The same export with the weights of its graphs in files of their own, as above 2 GiB."""
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "ONE_FILE_BYTES", 100)
        for name in artefact.graphs:
            save_onnx(onnx.load(artefact.path(name)), folder / f"{name}.onnx", check_valid)
    graphs = {name: graph_file(folder / f"{name}.onnx", folder) for name in artefact.graphs}
    write_artefact(dataclasses.replace(artefact, folder=folder, graphs=graphs))
    return load_artefact(folder)


def copy_with_points(artefact: Artefact, folder: Path, rules: PointRules | None) -> Artefact:
    """The same export with other rules for points; None for one that does not say them."""
    shutil.copytree(artefact.folder, folder)
    weights = {name: value for name, value in artefact.weights.items() if name != POINTS}
    if rules is not None:
        weights[POINTS] = rules.record("a test says so")
    write_artefact(dataclasses.replace(artefact, folder=folder, weights=weights))
    return load_artefact(folder)
