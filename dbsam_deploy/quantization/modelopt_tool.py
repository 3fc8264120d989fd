"""Q/DQ by nvidia-modelopt, as an alternative to ONNX Runtime's tools (`tool = "modelopt"`).

modelopt calibrates and quantises a copy of the graph in a process of its own, in this Python or in
the one that `DBSAM_MODELOPT_PYTHON` names (it has pins of its own). Only its pairs are taken over:
modelopt raises the opset, renames and copies constants and drops the nodes' module paths, none of
which reaches our graph, and every node that was not chosen stays as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from ..core.errors import EngineError, ExportError, InputError, MissingError
from ..core.imaging import FloatArray
from ..extras import pip_line
from ..files.onnx_files import save_onnx
from ..machine.child_process import run_python
from ..recipe import Quantization
from .qdq_types import check_float8_opset

PYTHON_VARIABLE = "DBSAM_MODELOPT_PYTHON"
"""Environment variable with the path of a Python that has modelopt."""

CALIBRATORS = ("max", "entropy")
"""Of `recipe.CALIBRATORS`, those that modelopt has."""

_WORKER = Path(__file__).with_name("modelopt_worker.py")
_LAST_LINES = 4
_TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True)
class ModelOptJob:
    """What the worker is asked for.

    Attributes:
        graph: ONNX file in standard operators.
        output: file to write.
        nodes: names of the nodes to quantise; to modelopt each is a pattern of how a name begins.
        operators: their operators.
        images: folder with one npz for each calibration image: input's name → array.
        format: `int8` or `fp8`.
        calibrator: `max` or `entropy`.
    """

    graph: str
    output: str
    nodes: list[str]
    operators: list[str]
    images: str
    format: str
    calibrator: str


def find_python() -> str:
    """The Python that runs modelopt: the one that is named, or else this one.

    Raises:
        MissingError: none is named, and modelopt is not installed here.
        EngineError: the one that is named is not there.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not (os.path.isfile(named) and os.access(named, os.X_OK)):
            raise EngineError(
                f"{PYTHON_VARIABLE}={named}: no program; name the python of an environment with "
                "nvidia-modelopt, such as modelopt-env/bin/python"
            )
        return named
    if importlib.util.find_spec("modelopt") is None:
        raise MissingError(
            f"nvidia-modelopt is not installed here, and {PYTHON_VARIABLE} names no other Python "
            "that has it",
            pip_line("modelopt"),
        )
    return sys.executable


def check_modelopt(plan: Quantization) -> None:
    """Refuse, before any long work, what `place_modelopt_pairs` would refuse.

    Raises:
        InputError: a plan that modelopt cannot follow.
        EngineError: it is not installed.
    """
    _calibrator(plan)
    find_python()


def _calibrator(plan: Quantization) -> str:
    if plan.calibration is None:
        raise InputError(f'modelopt makes int8 and fp8, not {plan.format}: tool = "onnxruntime"')
    if plan.outputs:
        raise InputError(
            f"modelopt rounds what enters a layer, not what leaves it: outputs = {plan.outputs}, "
            "expected []"
        )
    calibrator = plan.calibration.calibrator
    if calibrator not in CALIBRATORS:
        raise InputError(
            f"calibrator {calibrator!r}: modelopt has {' and '.join(CALIBRATORS)}; set one of them "
            'in the recipe, or tool = "onnxruntime"'
        )
    return calibrator


def place_modelopt_pairs(
    source: Path,
    nodes: Iterable[str],
    plan: Quantization,
    feeds: Iterable[dict[str, FloatArray]],
) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Q/DQ around the nodes, with modelopt's scales and codes; every other node is as before.

    modelopt leaves out convolutions for which TensorRT has no kernel in the format: few channels,
    and for fp8 large windows.

    Args:
        source: graph in standard operators, float32.
        nodes: those to quantise, with a constant weight each.
        plan: the recipe's table, for format, operators and calibrator.
        feeds: the graph's inputs, image by image.

    Returns:
        The graph, and those of the nodes that are quantised.

    Raises:
        ExportError: modelopt quantised nothing, or not as it was asked to.
        InputError: a graph that is not float32, a plan that modelopt cannot follow, or no image.
        EngineError: modelopt is not installed, or it failed.
    """
    model = onnx.load(source)
    if any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer):
        raise InputError(f'{source.name} is float16; with modelopt use dtype = "float32"')
    if plan.format == "fp8":
        check_float8_opset(model)
    # modelopt takes a name for a pattern of how names begin: `node_1` would be `node_12` as well.
    names = {node.name: f"node{index:08}" for index, node in enumerate(model.graph.node)}
    twins = {name: names[name] for name in nodes}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        node.name = names[node.name]
    found = _quantize(copy, list(twins.values()), plan, feeds, source)
    placed = _take_pairs(model, found, twins, plan.format)
    if not placed:
        raise ExportError(f"{source.name}: modelopt quantised none of the {len(twins)} layers")
    model.producer_name = "dbsam_deploy"
    return model, placed


def _quantize(
    model: onnx.ModelProto,
    nodes: list[str],
    plan: Quantization,
    feeds: Iterable[dict[str, FloatArray]],
    source: Path,
) -> onnx.ModelProto:
    """What modelopt makes of a graph; its log is beside `source` while it runs and if it fails."""
    calibrator, python, log = _calibrator(plan), find_python(), source.with_suffix(".modelopt.log")
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        folder = Path(scratch)
        _write_images(folder / "images", feeds)
        job = ModelOptJob(
            graph=str(folder / "graph.onnx"),
            output=str(folder / "quantized.onnx"),
            nodes=nodes,
            operators=list(plan.operators),
            images=str(folder / "images"),
            format=plan.format,
            calibrator=calibrator,
        )
        save_onnx(model, Path(job.graph))
        _run(python, job, folder, log)
        found = onnx.load(job.output)
    log.unlink()
    return found


def _write_images(folder: Path, feeds: Iterable[dict[str, FloatArray]]) -> None:
    folder.mkdir()
    index = -1
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:06}.npz", **feed)  # type: ignore[arg-type] # it takes names, too
    if index < 0:
        raise InputError("no calibration image; modelopt finds its ranges on images")


def _run(python: str, job: ModelOptJob, folder: Path, log: Path) -> None:
    """Run the worker; its log stays if it fails.

    Raises:
        EngineError: with its last words.
    """
    job_file, answer = folder / "job.json", folder / "answer.json"
    job_file.write_text(json.dumps(asdict(job)))
    # -P: the worker's own folder is this package, whose modules are not to be found by bare names.
    command = ["-P", str(_WORKER), "--job", str(job_file), "--answer", str(answer)]
    try:
        # modelopt leaves files behind where temporary ones go.
        ended = run_python(command, python=python, log=log, variables={"TMPDIR": str(folder)})
    except EngineError as error:
        raise EngineError(f"{PYTHON_VARIABLE}={error.message}") from error
    if ended.status != 0 or not answer.is_file() or not Path(job.output).is_file():
        raise EngineError(
            f"modelopt did not quantise the graph ({ended.reason(_LAST_LINES)}); the Python that "
            f"runs it is {python}, and needs: {pip_line('modelopt')}",
            f"whole log: {log}",
        )


def _take_pairs(
    model: onnx.ModelProto, found: onnx.ModelProto, twins: dict[str, str], kind: str
) -> frozenset[str]:
    """Copy the pairs of chosen nodes from modelopt's graph into ours, in place.

    Tensors get the names that ONNX Runtime's tools give them.

    Args:
        model: our graph.
        found: modelopt's.
        twins: our name of each chosen node → its name there.
        kind: `int8` or `fp8`.

    Returns:
        Our names of the nodes that modelopt quantised.
    """
    taken = _Pairs(model, found, _TYPES[kind])
    nodes: list[onnx.NodeProto] = []
    placed = set()
    for node in model.graph.node:
        if node.name in twins:
            pairs = taken.of(node, twins[node.name])
            if pairs is not None:
                nodes += pairs
                placed.add(node.name)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    tensors = [t for t in (*model.graph.initializer, *taken.tensors.values()) if t.name in used]
    for field, items in ((model.graph.node, nodes), (model.graph.initializer, tensors)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)
    return frozenset(placed)


class _Pairs:
    """Finds a node's pairs in modelopt's graph, and redirects our node to its own copies.

    Attributes:
        tensors: scales, zero points and codes for our graph, by name.
    """

    def __init__(self, model: onnx.ModelProto, found: onnx.ModelProto, kind: int) -> None:
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._kind = kind
        self._constants = {tensor.name: tensor for tensor in found.graph.initializer}
        self._nodes = {node.name: node for node in found.graph.node}
        self._writers = {name: node for node in found.graph.node for name in node.output}
        self._done: set[str] = set()

    def of(self, node: onnx.NodeProto, twin: str) -> list[onnx.NodeProto] | None:
        """New nodes for our graph, to stand before `node`; None if modelopt left it out.

        Raises:
            ExportError: only one of its inputs is quantised, or in another format.
        """
        there = self._nodes[twin]
        writers = [self._writers.get(name) for name in there.input[:2]]
        pairs = [w for w in writers if w is not None and w.op_type == "DequantizeLinear"]
        if not pairs:
            return None
        if len(pairs) < 2 or pairs[1].input[0] not in self._constants:
            raise ExportError(f"{node.name}: modelopt quantised one of its inputs, not both")
        source, weight = node.input[0], node.input[1]
        activation, codes = pairs
        added = []
        if source not in self._done:
            ends = self._parameters(source, activation)
            middle, back = f"{source}_QuantizeLinear_Output", f"{source}_DequantizeLinear_Output"
            added += [
                _node("QuantizeLinear", source, [source, *ends], middle),
                _node("DequantizeLinear", source, [middle, *ends], back),
            ]
        if weight not in self._done:
            ends = self._parameters(weight, codes)
            self._add(codes.input[0], f"{weight}_quantized")
            inputs, back = [f"{weight}_quantized", *ends], f"{weight}_DequantizeLinear_Output"
            pair = _node("DequantizeLinear", weight, inputs, back)
            pair.attribute.extend(codes.attribute)
            added.append(pair)
        self._done |= {source, weight}
        node.input[0] = f"{source}_DequantizeLinear_Output"
        node.input[1] = f"{weight}_DequantizeLinear_Output"
        return added

    def _parameters(self, name: str, pair: onnx.NodeProto) -> list[str]:
        """Copies of a pair's scale and zero point, under the names of our tensor."""
        if self._constants[pair.input[2]].data_type != self._kind:
            raise ExportError(f"{name}: modelopt's zero point is not of the recipe's format")
        self._add(pair.input[1], f"{name}_scale")
        self._add(pair.input[2], f"{name}_zero_point")
        return [f"{name}_scale", f"{name}_zero_point"]

    def _add(self, theirs: str, ours: str) -> None:
        self.tensors[ours] = onnx.TensorProto()
        self.tensors[ours].CopyFrom(self._constants[theirs])
        self.tensors[ours].name = ours


def _node(op: str, tensor: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], name=f"{tensor}_{op}")
