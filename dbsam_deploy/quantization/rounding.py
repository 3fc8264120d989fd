"""Weights → int8 so that a layer's output stays closest to the float one, not each weight (GPTQ).

The inputs of a layer are rounded one after the other; what each rounding loses is made up for by
the weights of those still to come, in proportion to how the layer's inputs go together on the
calibration images (Frantar et al., 2023). Scales stay those of rounding to the nearest: largest
magnitude of an output channel over 127.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ..core.errors import ExportError
from ..core.imaging import FloatArray
from .layers import Layer

LEVELS = 127
DAMPING = 0.01
"""Of the mean second moment, added to each: inputs that are never seen must not explode."""
ROWS = 1024
"""Tokens or windows drawn of each image; all of them would say the same and take hours."""
_BLOCK = 128

Codes = npt.NDArray[np.int8]
TextProgress = Callable[[str, int, int], None]
"""Called with a text, how much is done, and of how much."""
_Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Reading:
    """How a layer reads a tensor: its rows, or the windows of a convolution."""

    source: str
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()


@dataclass
class Moments:
    """Second moments of what enters each layer, summed over images.

    Args:
        model: the graph.
        layers: of it.
        seed: for the rows that are drawn.
    """

    model: onnx.ModelProto
    layers: Iterable[Layer]
    seed: int
    _readings: dict[str, _Reading] = field(default_factory=dict, init=False)
    _sums: dict[_Reading, FloatArray] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        nodes = {node.name: node for node in self.model.graph.node}
        dims = {tensor.name: tuple(tensor.dims) for tensor in self.model.graph.initializer}
        self._readings = {
            layer.node: _reading(layer, nodes[layer.node], dims[layer.weight])
            for layer in self.layers
        }
        self._rng = np.random.default_rng(self.seed)

    def add(self, tensors: dict[str, FloatArray]) -> None:
        """Take the tensors of one image in, by name."""
        for reading in dict.fromkeys(self._readings.values()):
            rows = _rows(tensors[reading.source], reading, self._rng)
            found = rows.T @ rows
            if reading in self._sums:
                found += self._sums[reading]
            self._sums[reading] = found

    def of(self, layer: Layer) -> FloatArray:
        """(inputs, inputs) of a layer, inputs as in its weight: channels, or channels × window.

        Raises:
            ExportError: no image was seen.
        """
        reading = self._readings[layer.node]
        if reading not in self._sums:
            raise ExportError(f"{layer.module}: rounding needs calibration images")
        return self._sums[reading]


def _reading(layer: Layer, node: onnx.NodeProto, dims: tuple[int, ...]) -> _Reading:
    if layer.op != "Conv":
        return _Reading(layer.source)
    lists = {a.name: tuple(a.ints) for a in node.attribute if a.name != "group"}
    return _Reading(
        layer.source,
        kernel=dims[2:],
        strides=lists.get("strides", (1, 1)),
        pads=lists.get("pads", (0, 0, 0, 0)),
        dilations=lists.get("dilations", (1, 1)),
    )


def _rows(values: FloatArray, reading: _Reading, rng: np.random.Generator) -> FloatArray:
    """(up to ROWS, inputs) of one image."""
    if not reading.kernel:
        flat = values.reshape(-1, values.shape[-1])
        return flat[rng.permutation(len(flat))[:ROWS]]
    top, left, bottom, right = reading.pads
    padded = np.pad(values[0], ((0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(reading.dilations, reading.kernel, strict=True)]
    sizes = [
        (n - r) // s + 1 for n, r, s in zip(padded.shape[1:], reach, reading.strides, strict=True)
    ]
    places = rng.permutation(sizes[0] * sizes[1])[:ROWS]
    y, x = np.unravel_index(places, sizes)
    window = np.meshgrid(*map(np.arange, reading.kernel), indexing="ij")
    rows = y[:, None, None] * reading.strides[0] + window[0] * reading.dilations[0]
    columns = x[:, None, None] * reading.strides[1] + window[1] * reading.dilations[1]
    return np.ascontiguousarray(padded[:, rows, columns].swapaxes(0, 1).reshape(len(places), -1))


def round_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    moments: Moments,
    *,
    progress: TextProgress = lambda text, done, total: None,
) -> dict[str, Codes]:
    """Weight's name → codes in its shape; weights that several nodes read are left out.

    Args:
        model: the float graph.
        layers: to round.
        moments: of their inputs.
        progress: called with (text, done, total) before each layer and at the end.

    Raises:
        ExportError: see `Moments.of`.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = [name for node in model.graph.node for name in node.input]
    found = {}
    for done, layer in enumerate(layers):
        progress(f"rounding {layer.module}", done, len(layers))
        if readers.count(layer.weight) > 1 or layer.op == "Gemm":
            continue  # rounded to the nearest
        weight = numpy_helper.to_array(tensors[layer.weight]).astype(np.float64)
        rows = weight.reshape(len(weight), -1) if layer.op == "Conv" else weight.T
        codes = round_rows(rows, moments.of(layer))
        found[layer.weight] = codes.reshape(weight.shape) if layer.op == "Conv" else codes.T.copy()
    progress("rounded", len(layers), len(layers))
    return found


def round_rows(weights: _Float64, moments: FloatArray) -> Codes:
    """Round (outputs, inputs), each output with a scale of its own, see the module.

    Args:
        weights: of a Linear layer.
        moments: (inputs, inputs), Σ x xᵀ over the layer's inputs x; symmetric.
    """
    count = weights.shape[1]
    step = np.abs(weights).max(axis=1) / LEVELS
    step[step == 0] = 1
    order = np.argsort(-np.diag(moments), kind="stable")  # the ones that matter most come first
    left = (weights / step[:, None])[:, order]
    wide = moments.astype(np.float64)[np.ix_(order, order)]
    wide[np.diag_indices(count)] += max(DAMPING * float(np.mean(np.diag(wide))), 1e-12)
    # Rows of the upper Cholesky factor of the inverse: how an error spreads over what is left.
    spread = np.linalg.cholesky(np.linalg.inv(wide)).T
    codes = np.zeros(left.shape)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        block = left[:, start:end].T.copy()  # an input's weights side by side: several times faster
        errors = np.empty((len(left), end - start))
        for i, column in enumerate(block):
            rounded = np.clip(np.round(column), -LEVELS, LEVELS)
            ahead = spread[start + i, start + i : end]
            error = (column - rounded) / ahead[0]
            block[i + 1 :] -= np.outer(ahead[1:], error)
            codes[:, start + i], errors[:, i] = rounded, error
        left[:, end:] -= errors @ spread[start:end, end:]
    found = np.empty(codes.shape, np.int8)
    found[:, order] = codes
    return found


def use_codes(model: onnx.ModelProto, original: onnx.ModelProto, codes: dict[str, Codes]) -> None:
    """Put codes in place of the ones that ONNX Runtime's tools rounded to the nearest.

    Args:
        model: with the tools' pairs; changed in place.
        original: the same graph before.
        codes: of `round_layers`; those of layers that are not quantised are passed over.

    Raises:
        ExportError: the tools took another scale than the codes were found for.
    """
    floats = {tensor.name: tensor for tensor in original.graph.initializer}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, found in codes.items():
        target = tensors.get(f"{name}_quantized")
        if target is None:
            continue
        weight = numpy_helper.to_array(floats[name]).astype(np.float64)
        axis = 0 if weight.ndim == 4 else 1
        others = tuple(i for i in range(weight.ndim) if i != axis)
        ours = np.abs(weight).max(axis=others) / LEVELS
        theirs = numpy_helper.to_array(tensors[f"{name}_scale"]).astype(np.float64)
        if theirs.shape != ours.shape or not np.allclose(theirs[ours > 0], ours[ours > 0], 1e-3):
            raise ExportError(f"{name}: its scales are not largest magnitude / {LEVELS}")
        target.CopyFrom(numpy_helper.from_array(found, target.name))
