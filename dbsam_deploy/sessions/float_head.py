"""A graph in parts that follow each other: float32 in a runtime that rounds to bfloat16, or not.

What a recipe leaves in float, between its quantised layers, it leaves there because it is
sensitive: rounding LiteMedSAM's stem and first stage to bfloat16 costs more than the other stages
together. And bfloat16 has eight bits: of a coordinate up to 1024 it leaves steps of four pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import onnx
from onnx.utils import Extractor

from ..core.contract import BOXES, IMAGE, PIXELS, POINT_COORDS, GraphSpec
from ..core.errors import EngineError

COORDINATES = frozenset({BOXES, POINT_COORDS})


@dataclass(frozen=True)
class Part:
    """A piece of a graph, whose inputs are the whole one's or outputs of pieces before it.

    Attributes:
        graph: the piece.
        lowered: whether it may be computed in bfloat16.
    """

    graph: onnx.ModelProto
    lowered: bool


def split_graph(model: onnx.ModelProto, spec: GraphSpec) -> tuple[Part, ...]:
    """Split off what must not be rounded: a decoder's coordinates, an int8 encoder's float layers.

    An encoder that takes pixels is cut where they are resized and scaled, a graph with coordinates
    behind the sines and cosines of SAM's point encoding, a quantised one at tensors that alone
    carry the image on: before and behind the places that have a Linear or dense Conv layer and none
    that is quantised.

    Args:
        model: with shapes, without functions; left as it is.
        spec: its inputs and outputs.

    Returns:
        The parts in their order; one, lowered, for a graph that has neither.

    Raises:
        EngineError: coordinates go elsewhere than into sines and cosines.
    """
    starts = tuple(name for name in spec.input_names if name in COORDINATES)
    parts = Extractor(model)
    if PIXELS in spec.input_names:
        before = Part(parts.extract_model(spec.input_names, [IMAGE]), lowered=False)
        rest = parts.extract_model([IMAGE], list(spec.output_names))
        image = replace(spec.inputs[0], name=IMAGE)
        return (before, *split_graph(rest, replace(spec, inputs=(image,))))
    if starts:
        tensors = _encoded(model, spec, starts)
        others = [name for name in spec.input_names if name not in starts]
        return (
            Part(parts.extract_model(list(starts), list(tensors)), lowered=False),
            Part(parts.extract_model([*others, *tensors], list(spec.output_names)), lowered=True),
        )
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not quantized or len(spec.inputs) != 1 or len(spec.outputs) != 1:
        return (Part(model, lowered=True),)
    found, (start,) = [], spec.input_names
    for lowered, places in groupby(_places(model, spec.output_names[0]), lambda place: place[1]):
        *_, (end, _) = places
        found.append(Part(parts.extract_model([start], [end]), lowered))
        start = end
    return tuple(found)


def _encoded(model: onnx.ModelProto, spec: GraphSpec, starts: tuple[str, ...]) -> tuple[str, ...]:
    """The sines and cosines of coordinates, which nothing else is made of."""
    fixed = {tensor.name for tensor in model.graph.initializer} | {""}
    inside, found = set(starts), []
    for node in model.graph.node:
        if fixed.issuperset(node.input):
            fixed |= set(node.output)
        elif inside.isdisjoint(node.input):
            continue
        elif not (inside | fixed).issuperset(node.input) or spec.output_names[0] in node.output:
            raise EngineError(
                f"{spec.name}: its coordinates are not encoded as in SAM, and bfloat16 would round "
                "them: take float32"
            )
        elif node.op_type in ("Sin", "Cos"):
            found.append(node.output[0])
        else:
            inside |= set(node.output)
    return tuple(found)


def _places(model: onnx.ModelProto, output: str) -> Iterator[tuple[str, bool]]:
    """Each tensor that alone carries the image on, and whether what is before it may be rounded.

    That is what lies between it and the one before. What has no layer is as what it follows. What
    is eight bits wide, or was, has no shape in the file, and is no such tensor.
    """
    nodes = model.graph.node
    shaped = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    last_read = {name: i for i, node in enumerate(nodes) for name in node.input}
    last_read[output] = len(nodes)
    fixed = {tensor.name for tensor in model.graph.initializer} | {""}
    alive = {value.name for value in model.graph.input} - fixed
    lowered = quantized = exact = False
    for i, node in enumerate(nodes):
        if fixed.issuperset(node.input):
            fixed |= set(node.output)
            continue
        quantized |= node.op_type == "QuantizeLinear"
        exact |= _is_layer(node, fixed)
        alive |= set(node.output)
        alive = {name for name in alive if last_read.get(name, -1) > i}
        if len(alive) == 1 and alive <= shaped:
            lowered = quantized or (lowered and not exact)
            yield next(iter(alive)), lowered
            quantized = exact = False


def _is_layer(node: onnx.NodeProto, fixed: set[str]) -> bool:
    """Whether it is a Linear or a dense Conv, what a recipe quantises or leaves out."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in fixed:
        return False
    return not any(a.name == "group" and a.i > 1 for a in node.attribute)
