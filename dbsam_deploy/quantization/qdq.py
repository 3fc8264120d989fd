"""ONNX in standard operators + ranges → the same graph with Q/DQ, in int8, fp8 or int8 weights.

ONNX Runtime's tools place the pairs around the chosen layers: weights symmetrically with a scale
for each output channel, activations symmetrically with one scale (what TensorRT takes, too). Then
the pairs are retyped where the format is not int8. Attention's products, softmax and LayerNorm have
no constant weight and are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..core.errors import ExportError
from ..core.imaging import FloatArray
from ..extras import require
from ..files.onnx_files import check_valid, save_onnx
from ..recipe import Quantization
from .layers import Layer, find_layers, is_excluded
from .modelopt_tool import place_modelopt_pairs
from .observers import observe
from .one_sided import find_centres, recentre
from .qdq_types import keep_relus, keep_weights_only, to_float8
from .rounding import Codes, Moments, TextProgress, round_layers, use_codes
from .shared_tables import share_tables
from .smoothing import smooth

Feeds = Callable[[], Iterable[dict[str, FloatArray]]]

_TOOL_OPTIONS = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}


@dataclass(frozen=True)
class Calibrated:
    """A float graph that is ready to be quantised in any choice of layers.

    Attributes:
        path: the graph, smoothed if the recipe says so.
        layers: all that the recipe's operators name, those of `exclude` as well.
        thresholds: tensor → magnitude that the largest whole number stands for; empty if only
            weights are quantised.
        lowest: tensor → least value that was seen, at most 0.
        codes: weight → int8 codes, where the recipe's rounding is not to the nearest.
        feeds: gives the images again, for a tool that finds the ranges itself.
    """

    path: Path
    layers: tuple[Layer, ...]
    thresholds: dict[str, float]
    lowest: dict[str, float] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    feeds: Feeds | None = None


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize_graph`.

    Attributes:
        path: the file.
        modules: paths of the modules that are quantised.
        excluded: those that the recipe's operators name and that stay as they were.
        weights_only: those of `modules` whose weights alone are.
        mac_share: part of the work of all Linear and Conv layers that is done in eight bits, 0–1.
    """

    path: Path
    modules: tuple[str, ...]
    excluded: tuple[str, ...]
    weights_only: tuple[str, ...]
    mac_share: float


def calibrate(
    source: Path,
    plan: Quantization,
    feeds: Feeds,
    folder: Path,
    *,
    progress: TextProgress = lambda text, done, total: None,
) -> Calibrated:
    """Observe the activations of every layer on real images, and smooth if the recipe says so.

    Args:
        source: graph in standard operators, left as it is.
        plan: the recipe's table.
        feeds: gives the graph's inputs image by image; called once, or twice with smoothing.
        folder: for the smoothed graph.
        progress: of rounding the weights, see `round_layers`.

    Raises:
        ExportError: the graph has no such layer.
        EngineError: an activation is not finite.
        InputError: no image.
    """
    model = onnx.load(source)
    layers = find_layers(model, plan.operators)
    if not layers:
        raise ExportError(f"{source.name}: no {', '.join(plan.operators)} with a constant weight")
    if plan.calibration is None:
        return Calibrated(source, layers, {})
    axes = _channel_axes(layers, plan)
    kept = [layer for layer in layers if not is_excluded(layer.module, plan.exclude)]
    rounded = kept if plan.rounding == "gptq" else []
    moments = Moments(model, rounded, plan.calibration.seed)
    path = source
    if plan.smoothing > 0:
        seen = observe(source, axes, feeds())
        largest = {name: h.channels for name, h in seen.items() if h.channels is not None}
        if smooth(model, [layer.node for layer in kept], largest, plan.smoothing):
            path = folder / f"{source.stem}.smooth.onnx"
            save_onnx(model, path)
    seen = observe(path, axes, feeds(), watch=moments.add)
    how = plan.calibration
    return Calibrated(
        path,
        layers,
        {name: h.threshold(how.calibrator, how.percentile) for name, h in seen.items()},
        {name: h.lowest for name, h in seen.items()},
        round_layers(model, rounded, moments, progress=progress),
        feeds,
    )


def _channel_axes(layers: Iterable[Layer], plan: Quantization) -> dict[str, int]:
    """Each tensor that gets a range, and which of its axes is the channels."""
    axes = {}
    for layer in layers:
        axis = 1 if layer.op == "Conv" else -1
        axes[layer.source] = axis
        if layer.op in plan.outputs:
            axes[layer.output] = axis
    return axes


def chosen_layers(
    calibrated: Calibrated, plan: Quantization, exclude: Iterable[str] = ()
) -> list[Layer]:
    """The layers that neither the recipe nor `exclude` leaves out."""
    patterns = (*plan.exclude, *exclude)
    chosen = [x for x in calibrated.layers if not is_excluded(x.module, patterns)]
    # A layer that never sees anything but zeros has no range; nothing is lost by leaving it.
    if plan.calibration is not None:
        chosen = [x for x in chosen if calibrated.thresholds[x.source] > 0]
    return chosen


def mac_share(calibrated: Calibrated, plan: Quantization, chosen: Iterable[Layer]) -> float:
    """Part of the work of all layers that is done in eight bits: the chosen ones', 0–1."""
    total = sum(layer.macs for layer in calibrated.layers)
    whole = (x.macs for x in chosen if not is_excluded(x.module, plan.weights_only))
    return sum(whole) / total


def quantize_graph(
    calibrated: Calibrated,
    plan: Quantization,
    destination: Path,
    *,
    exclude: Collection[str] = (),
) -> Quantized:
    """Quantise the layers that neither the recipe nor `exclude` leaves out.

    Args:
        calibrated: of `calibrate` with the same plan.
        plan: the recipe's table.
        destination: file that is written, only if it is valid; may be the calibrated one.
        exclude: further patterns of module paths.

    Raises:
        ExportError: no layer is left, or the result is not valid ONNX.
        InputError: the recipe's tool cannot do what the recipe asks for.
        EngineError: modelopt is not installed, or it failed.
    """
    chosen = chosen_layers(calibrated, plan, exclude)
    if not chosen:
        raise ExportError(
            f"{calibrated.path.name}: every layer is excluded ({', '.join(plan.exclude)}, "
            f"{', '.join(exclude)}); nothing is left to quantise"
        )
    half = [x.node for x in chosen if is_excluded(x.module, plan.weights_only)]
    if plan.tool == "modelopt":
        nodes, feeds = [layer.node for layer in chosen], calibrated.feeds
        model, placed = place_modelopt_pairs(calibrated.path, nodes, plan, feeds() if feeds else ())
        chosen = [layer for layer in chosen if layer.node in placed]
    else:
        model = _own_pairs(calibrated, plan, chosen, half)
    keep_weights_only(model, half)
    if plan.format == "fp8":
        keep_relus(model)
    share_tables(model)
    save_onnx(model, destination, check_valid)
    modules = tuple(layer.module for layer in chosen)
    left = tuple(x.module for x in calibrated.layers if x.module not in set(modules))
    partly = tuple(x.module for x in chosen if x.node in set(half))
    return Quantized(destination, modules, left, partly, mac_share(calibrated, plan, chosen))


def _own_pairs(
    calibrated: Calibrated, plan: Quantization, chosen: list[Layer], half: list[str]
) -> onnx.ModelProto:
    """Pairs in the plan's format, with its rounding; whole even for the nodes in `half`."""
    original = onnx.load(calibrated.path)
    whole: list[Layer] = []
    if plan.recentre and "MatMul" not in plan.outputs:  # a bias behind a pair cannot move
        as_is = {layer.source for layer in chosen if layer.node in half}
        whole = [layer for layer in chosen if layer.source not in as_is]
    centres = find_centres(original, whole, calibrated.thresholds, calibrated.lowest)
    ranges = {**calibrated.thresholds, **{name: c.half for name, c in centres.items()}}
    model = place_pairs(original, chosen, plan, ranges)
    use_codes(model, original, calibrated.codes)
    if plan.format == "fp8":
        to_float8(model, original)
    elif plan.format == "int8-weights":
        keep_weights_only(model)
    recentre(model, whole, centres)
    return model


def place_pairs(
    model: onnx.ModelProto, layers: list[Layer], plan: Quantization, thresholds: dict[str, float]
) -> onnx.ModelProto:
    """Q/DQ in int8 around the layers, by ONNX Runtime's tools; every other node is as before.

    Args:
        model: left unchanged.
        layers: what is quantised.
        plan: says whose outputs are.
        thresholds: see `Calibrated`; tensors that are missing get the range ±1.

    Raises:
        InputError: ONNX Runtime's tools are not installed.
    """
    require("onnxruntime.quantization.qdq_quantizer", extra="cpu", what_for="quantisation")
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    kind: Any = np.float16 if half else np.float32
    tensors = {t for layer in layers for t in (layer.source, layer.output)}
    ranges = {t: (kind(-thresholds.get(t, 1)), kind(thresholds.get(t, 1))) for t in tensors}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[layer.node for layer in layers],
        nodes_to_exclude=[],
        op_types_to_quantize=list(plan.operators),
        extra_options={
            **_TOOL_OPTIONS,
            "OpTypesToExcludeOutputQuantization": sorted(set(plan.operators) - set(plan.outputs)),
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    found = quantizer.model.model
    spare_other_readers(found, layers, set(plan.outputs))
    found.producer_name = "dbsam_deploy"
    return found


def spare_other_readers(model: onnx.ModelProto, layers: list[Layer], outputs: set[str]) -> None:
    """Give the original tensor back to nodes that are not quantised but read a quantised one.

    The tools redirect every reader of a tensor to its dequantised copy: residual additions, and the
    layers that were excluded.

    Args:
        model: changed in place.
        layers: that are quantised.
        outputs: operators whose output is quantised as well.
    """
    kept = {layer.output for layer in layers if layer.op in outputs}
    nodes = {layer.node for layer in layers}
    origin = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    dequantized = {
        n.output[0]: origin[n.input[0]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in origin
    }
    for node in model.graph.node:
        if node.name in nodes:
            continue
        for index, name in enumerate(node.input):
            if name in dequantized and dequantized[name] not in kept:
                node.input[index] = dequantized[name]


def describe(quantized: Quantized, plan: Quantization) -> dict[str, Any]:
    """Facts for an artefact's manifest."""
    how = plan.calibration
    return {
        "format": plan.format,
        "tool": plan.tool,
        "calibrator": None if how is None else how.calibrator,
        "smoothing": plan.smoothing,
        "rounding": plan.rounding,
        "recentre": plan.recentre,
        "layers": len(quantized.modules),
        "excluded": list(quantized.excluded),
        "weights_only": list(quantized.weights_only),
        "mac_share": quantized.mac_share,
    }
