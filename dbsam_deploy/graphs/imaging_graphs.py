"""Pixels in, masks out: what a GPU does before an encoder and behind a decoder, as ONNX.

Resizing is a table of each row and column, see `core.taps`: TensorRT has no `Resize` with
antialiasing, and that of ONNX Runtime rounds other than Pillow. Text below is ONNX's own, see
`onnx.parser`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import parser

from ..core.contract import (
    COLUMN_TAPS,
    COLUMN_WEIGHTS,
    IMAGE,
    MASK_BITS,
    MASK_LOGITS,
    PIXELS,
    ROW_TAPS,
    ROW_WEIGHTS,
    TensorSpec,
    encoder_spec,
    mask_bits_spec,
)
from ..core.graph_imaging import weights_are_whole
from ..core.imaging import UNIT_RANGE, Preprocessing
from ..core.taps import FIXED_POINT
from ..files.atomic import write_atomically
from ..files.onnx_files import check_valid
from .surroundings import TYPES, put_around, statistics, value_info

_IR_VERSION = 10
_FLOAT, _INT64 = TYPES["float32"], onnx.TensorProto.INT64
_DIGIT = math.isqrt(FIXED_POINT)


def put_pixels_before(path: Path, how: Preprocessing) -> None:
    """Let a finished encoder take an image's own pixels.

    Args:
        path: the encoder's file; weights beside it stay as they are.
        how: mode and size, with `pixels_in_graph`.

    Raises:
        ExportError: onnx's checker refuses the result.
    """
    encoder, spec = onnx.load(path, load_external_data=False), encoder_spec(how)
    before = parser.parse_graph(pixels_text(how))
    put_around(encoder, spec, before.node, (), name=spec.name)
    encoder.graph.value_info.extend(map(value_info, encoder_spec(how.on_host).inputs))
    _save(encoder, path)


def write_mask_bits(folder: Path, how: Preprocessing, opset: int) -> Path:
    """Write the graph that makes masks into `folder`, and return its file.

    Args:
        folder: existing output directory.
        how: mode and size, with `pixels_in_graph`.
        opset: of ONNX.

    Raises:
        ExportError: onnx's checker refuses it.
    """
    spec = mask_bits_spec(how)
    text = f'<ir_version: {_IR_VERSION}, opset_import: ["" : {opset}]>\n{mask_bits_text(how)}'
    model = parser.parse_model(text)
    model.producer_name, model.graph.name = "dbsam_deploy", spec.name
    path = folder / f"{spec.name}.onnx"
    _save(model, path)
    return path


def _save(model: onnx.ModelProto, path: Path) -> None:
    with write_atomically(path) as stream:
        stream.write(model.SerializeToString())
    check_valid(path)


def pixels_text(how: Preprocessing) -> str:
    """`core.graph_imaging.encoder_feed` → `image`, the numbers of `core.imaging.preprocess`."""
    tapped = _tapped_whole if weights_are_whole(how) else _tapped
    grey = "Round" if how.mode == "lite_medsam" else "Identity"
    image = encoder_spec(how.on_host).inputs[0]
    return f"""{_head(encoder_spec(how).inputs, image)} {{
            pixels_values = Cast <to = {_FLOAT}> ({PIXELS})
            pixels_columns = Transpose <perm = [0, 2, 1, 3]> (pixels_values)
            {tapped("pixels_columns", COLUMN_TAPS, COLUMN_WEIGHTS, "pixels_wide")}
            pixels_rows = Transpose <perm = [0, 2, 1, 3]> (pixels_wide)
            {tapped("pixels_rows", ROW_TAPS, ROW_WEIGHTS, "pixels_sized")}
            pixels_grey = {grey} (pixels_sized)
            pixels_planes = Transpose <perm = [0, 3, 1, 2]> (pixels_grey)
            {_FILLED}
            pixels_zero = Constant <value_float = 0.0> ()
            pixels_filled = Greater (pixels_sums, pixels_zero)
            {_UNIT_RANGE if how.mode in UNIT_RANGE else statistics("pixels_") + _Z_SCORED}
            {IMAGE} = Where (pixels_filled, pixels_scaled, pixels_zero)
        }}"""


def _tapped(source: str, taps: str, weights: str, target: str, *, axes: int = 1) -> str:
    """(B, n, a, b) → (B, k…, a, b): elements of the first axis behind the batch by their taps.

    Args:
        source: name of what is resized.
        taps: name of the places, (B, k…, T).
        weights: name of their weights.
        target: name of the result.
        axes: how many k are.
    """
    return _taken(source, taps, target, axes) + _summed(weights, target, target, axes)


def _tapped_whole(source: str, taps: str, weights: str, target: str) -> str:
    """The same in whole numbers, rounded and bounded to 0–255 as Pillow does.

    Weights have 22 bits, and are multiplied as two numbers of 11: so each sum is exact in float32,
    in whatever order it is added up. A runtime's division of integers may round as it likes.
    """
    return f"""
            {_taken(source, taps, target, axes=1)}
            {target}_digit = Constant <value_float = {_DIGIT}.0> ()
            {target}_in_digits = Div ({weights}, {target}_digit)
            {target}_first = Floor ({target}_in_digits)
            {target}_as_much = Mul ({target}_first, {target}_digit)
            {target}_second = Sub ({weights}, {target}_as_much)
            {_summed(f"{target}_first", target, f"{target}_high", axes=1)}
            {_summed(f"{target}_second", target, f"{target}_low", axes=1)}
            {target}_half = Constant <value_float = {FIXED_POINT // 2}.0> ()
            {target}_low_more = Add ({target}_low, {target}_half)
            {target}_low_digits = Div ({target}_low_more, {target}_digit)
            {target}_carried = Floor ({target}_low_digits)
            {target}_total = Add ({target}_high, {target}_carried)
            {target}_divided = Div ({target}_total, {target}_digit)
            {target}_whole = Floor ({target}_divided)
            {target}_least = Constant <value_float = 0.0> ()
            {target}_most = Constant <value_float = 255.0> ()
            {target} = Clip ({target}_whole, {target}_least, {target}_most)"""


def _taken(source: str, taps: str, target: str, axes: int) -> str:
    """What each element is made of, (B, k…, T, a, b), as `<target>_taken`."""
    return f"""
            {target}_index = Cast <to = {_INT64}> ({taps})
            {target}_last = Constant <value_ints = [{axes + 2}]> ()
            {target}_places = Unsqueeze ({target}_index, {target}_last)
            {target}_taken = GatherND <batch_dims = 1> ({source}, {target}_places)"""


def _summed(weights: str, target: str, result: str, axes: int) -> str:
    """The sum over T of `<target>_taken` by their weights, (B, k…, T)."""
    return f"""
            {result}_behind = Constant <value_ints = [{axes + 2}, {axes + 3}]> ()
            {result}_scale = Unsqueeze ({weights}, {result}_behind)
            {result}_parts = Mul ({target}_taken, {result}_scale)
            {result}_axis = Constant <value_ints = [{axes + 1}]> ()
            {result} = ReduceSum <keepdims = 0> ({result}_parts, {result}_axis)"""


_FILLED = f"""
            pixels_taps_axis = Constant <value_ints = [2]> ()
            pixels_across = Constant <value_ints = [1]> ()
            pixels_row_sums = ReduceSum <keepdims = 1> ({ROW_WEIGHTS}, pixels_taps_axis)
            pixels_column_sum = ReduceSum <keepdims = 0> ({COLUMN_WEIGHTS}, pixels_taps_axis)
            pixels_column_sums = Unsqueeze (pixels_column_sum, pixels_across)
            pixels_sum = Mul (pixels_row_sums, pixels_column_sums)
            pixels_sums = Unsqueeze (pixels_sum, pixels_across)"""

_Z_SCORED = """
            pixels_centred = Sub (pixels_planes, pixels_mean)
            pixels_scaled = Div (pixels_centred, pixels_std)"""

_UNIT_RANGE = """
            pixels_all = Constant <value_ints = [1, 2, 3]> ()
            pixels_white = Constant <value_float = 255.0> ()
            pixels_inside = Where (pixels_filled, pixels_planes, pixels_white)
            pixels_low = ReduceMin (pixels_inside, pixels_all)
            pixels_high = ReduceMax (pixels_planes, pixels_all)
            pixels_span = Sub (pixels_high, pixels_low)
            pixels_least = Constant <value_float = 1e-8> ()
            pixels_range = Max (pixels_span, pixels_least)
            pixels_above = Sub (pixels_planes, pixels_low)
            pixels_scaled = Div (pixels_above, pixels_range)"""


def mask_bits_text(how: Preprocessing) -> str:
    """`core.imaging.postprocess` of logits, packed."""
    rows = _tapped("bits_rows", ROW_TAPS, ROW_WEIGHTS, "bits_high")
    columns = _tapped("bits_columns", COLUMN_TAPS, COLUMN_WEIGHTS, "bits_sized", axes=2)
    spec = mask_bits_spec(how)
    return f"""{_head(spec.inputs, *spec.outputs)} {{
            bits_rows = Transpose <perm = [0, 2, 1, 3]> ({MASK_LOGITS})
            {rows}
            bits_columns = Transpose <perm = [0, 3, 2, 1]> (bits_high)
            {columns}
            bits_zero = Constant <value_float = 0.0> ()
            bits_inside = Greater (bits_sized, bits_zero)
            bits_one = Cast <to = {_FLOAT}> (bits_inside)
            bits_values = Constant <value = float[8,1,1] {{128, 64, 32, 16, 8, 4, 2, 1}}> ()
            bits_valued = Mul (bits_one, bits_values)
            bits_axis = Constant <value_ints = [2]> ()
            bits_sum = ReduceSum <keepdims = 0> (bits_valued, bits_axis)
            bits_bytes = Transpose <perm = [0, 2, 3, 1]> (bits_sum)
            {MASK_BITS} = Cast <to = {TYPES["uint8"]}> (bits_bytes)
        }}"""


def _head(inputs: Iterable[TensorSpec], output: TensorSpec) -> str:
    """Inputs and output of a graph in ONNX's text."""
    words = {"float32": "float", "int32": "int32", "uint8": "uint8"}
    told = [f"{words[t.dtype]}[{','.join(map(str, t.axes))}] {t.name}" for t in (*inputs, output)]
    return f"{output.name}_graph ({', '.join(told[:-1])}) => ({told[-1]})"
