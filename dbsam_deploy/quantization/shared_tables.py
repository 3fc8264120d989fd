"""Stores a bias table of attention by its distinct values: what 8-bit weights leave over.

A table of relative positions repeats one row of values along its diagonals: LiteMedSAM's six
tables of 196 × 196 hold 196 values a head, and would be a third of its int8 file. Runtimes fold
the Gather when they load the graph, so that nothing is computed twice and no value changes.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

MIN_VALUES = 4096
"""Smaller tables are not worth a node."""
MIN_REPEATS = 4


def share_tables(model: onnx.ModelProto) -> int:
    """Replace repetitive constants that are only added by Gather(values, index), in place.

    Args:
        model: any graph.

    Returns:
        Bytes that were saved.
    """
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    indices: dict[bytes, str] = {}
    nodes, saved = [], 0
    for tensor in list(model.graph.initializer):
        dims = tuple(tensor.dims)
        if readers.get(tensor.name) != {"Add"} or len(dims) < 2 or math.prod(dims) < MIN_VALUES:
            continue
        table = numpy_helper.to_array(tensor)
        columns = table.reshape(-1, dims[-2] * dims[-1])
        _, first, index = np.unique(columns, axis=1, return_index=True, return_inverse=True)
        if len(first) * MIN_REPEATS > columns.shape[1]:
            continue
        # In the order of their first place, which is the same for all tables of one pattern.
        rank = np.argsort(np.argsort(first))
        distinct = columns[:, np.sort(first)]
        places = rank[index].reshape(dims[-2:]).astype(np.int32)
        if places.tobytes() not in indices:
            name = f"{tensor.name}.index"
            indices[places.tobytes()] = name
            model.graph.initializer.append(numpy_helper.from_array(places, name))
            saved -= places.nbytes
        values = np.ascontiguousarray(distinct.reshape(*dims[:-2], -1))
        values_name = f"{tensor.name}.values"
        model.graph.initializer.append(numpy_helper.from_array(values, values_name))
        inputs = [values_name, indices[places.tobytes()]]
        node = helper.make_node("Gather", inputs, [tensor.name], axis=len(dims) - 2)
        node.name = f"{tensor.name}.gather"
        nodes.append(node)
        model.graph.initializer.remove(tensor)
        saved += table.nbytes - values.nbytes
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    return saved
