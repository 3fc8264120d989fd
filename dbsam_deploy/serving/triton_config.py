"""Renders each `config.pbtxt` of the Triton model repository from the contract's specs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Literal

from ..core.bls import MODEL_STEM
from ..core.contract import (
    BATCH,
    BOX_IOU_SCORES,
    BOX_MASKS,
    IOU_SCORES,
    MASK_BITS,
    MASKS,
    MAX_POINTS,
    NUM_BOXES,
    NUM_POINTS,
    NUM_PROMPTS,
    TRITON_TYPES,
    Geometry,
    GraphSpec,
    TensorSpec,
    ensemble_spec,
    graph_specs,
    interactive_spec,
    prompts_ensemble_spec,
)
from ..core.imaging import Preprocessing
from ..core.points import NATIVE, PARAMETER, PointRules
from ..core.settings import WEIGHTS_NOTE, FrontSettings
from ..engines.profiles import MAX_BATCH, plan_ranges, profile_shapes

Platform = Literal["onnxruntime", "tensorrt"]

_HEAD = "# Rendered from dbsam_deploy/core/contract.py; do not edit by hand."

BACKENDS = {
    "onnxruntime": 'backend: "onnxruntime"',
    "tensorrt": 'platform: "tensorrt_plan"',
    "openvino": 'backend: "openvino"',
}
"""What runs a graph → how a configuration says it; OpenVINO is a server's choice when it starts."""

_MAX_SIZES = {
    NUM_BOXES: FrontSettings.chunk,
    NUM_PROMPTS: FrontSettings.chunk,
    NUM_POINTS: MAX_POINTS,
}
"""Free axis of a graph → the largest size that the front model sends, so that none needs more."""

BYTECODE = "__pycache__"
"""Folder that Triton's Python leaves beside the code of a model."""
GRAPH_MODELS = {
    name: MODEL_STEM + name for name in ("encoder", "decoder", "prompt_decoder", MASK_BITS)
}
"""Exported graph → the Triton model that runs it, where the export has it."""


def render_configs(
    how: Preprocessing,
    platforms: Mapping[str, Platform],
    *,
    note: str | None = None,
    points: PointRules = NATIVE,
) -> dict[str, str]:
    """Every `config.pbtxt` of a repository.

    Args:
        how: sizes and mode of the exported model.
        platforms: exported graph → what runs it; `prompt_decoder` may be absent.
        note: what users must know of the weights; None for no weights.
        points: how prompts with points are answered.

    Returns:
        Triton model name → text of its configuration.
    """
    prompts = "prompt_decoder" in platforms
    graphs = {name: spec for name, spec in graph_specs(how).items() if name in platforms}
    configs = {GRAPH_MODELS[name]: _graph_model(graphs[name], platforms[name]) for name in graphs}
    front = front_spec(how, prompts=prompts)
    configs[front.name] = _front_model(front, how, platforms, points)
    if note is not None:
        configs[front.name] += _text([parameter(WEIGHTS_NOTE, note)], head="")
    renames = {MASKS.name: BOX_MASKS.name, IOU_SCORES.name: BOX_IOU_SCORES.name}
    boxes = ensemble_spec(how.mask_side)
    configs[boxes.name] = _through_front(boxes, front, renames)
    if prompts:
        sets = prompts_ensemble_spec(how.mask_side)
        configs[sets.name] = _through_front(sets, front, {})
    return configs


def front_spec(size: Geometry, *, prompts: bool) -> GraphSpec:
    """The one Python model of a repository."""
    return interactive_spec(size.mask_side, prompts=prompts)


def _graph_model(spec: GraphSpec, platform: Platform) -> str:
    lines = [
        f'name: "{GRAPH_MODELS[spec.name]}"',
        BACKENDS[platform],
        f"max_batch_size: {MAX_BATCH[platform][spec.name]}",
        *_tensors("input", spec.inputs, drop_batch=True),
        *_tensors("output", spec.outputs, drop_batch=True),
        "dynamic_batching { }",
        "instance_group [ { count: 1 } ]",  # the CPU default of two would load the weights twice
    ]
    ranges = plan_ranges(spec)
    for axis in sorted(ranges.keys() - {BATCH}):
        lines.append(parameter(f"max_{axis}", _MAX_SIZES.get(axis, ranges[axis].most)))
    if platform == "tensorrt" and spec.name == "encoder":
        lines.append("optimization { cuda { graphs: true } }")
    if spec.name == "encoder":
        types = {tensor.name: _type(tensor) for tensor in spec.inputs}
        lines += ["model_warmup [", "  {", '    name: "zeros"', "    batch_size: 1"]
        for name, (_, usual, _) in profile_shapes(spec, ranges).items():
            dims = ", ".join(map(str, usual[1:]))
            lines += [
                "    inputs {",
                f'      key: "{name}"',
                f"      value {{ data_type: {types[name]} dims: [ {dims} ] zero_data: true }}",
                "    }",
            ]
        lines += ["  }", "]"]
    return _text(lines)


def _front_model(
    spec: GraphSpec, how: Preprocessing, platforms: Mapping[str, Platform], points: PointRules
) -> str:
    # Enough requests at once to fill the encoder's batch.
    batch = MAX_BATCH[platforms["encoder"]]["encoder"]
    settings = FrontSettings(image_workers=max(batch, FrontSettings.image_workers))
    lines = [
        f'name: "{spec.name}"',
        'backend: "python"',
        "max_batch_size: 0",
        *_tensors("input", spec.inputs),
        *_tensors("output", spec.outputs),
        # Without a kind Triton makes one on every GPU, each with a cache of its own.
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
    ]
    values = {key: getattr(how, key) for key in ("image_size", "embedding_stride", "mode")}
    if how.frame_size is not None:
        values["frame_size"] = how.frame_size
    for name in ("high_res", "pixels_in_graph"):
        if getattr(how, name):
            values[name] = True
    rules = {PARAMETER + kind: answered for kind, answered in asdict(points).items()}
    for key, value in {**values, **rules, **asdict(settings)}.items():
        lines.append(parameter(key, value))
    return _text(lines)


def _through_front(spec: GraphSpec, front: GraphSpec, renames: Mapping[str, str]) -> str:
    """An ensemble that is the front model with fewer tensors.

    Args:
        spec: the ensemble.
        front: the front model.
        renames: output of the ensemble → of the front model, where they differ.
    """
    maps = [
        *(("input_map", name, name) for name in spec.input_names),
        *(("output_map", renames.get(name, name), name) for name in spec.output_names),
    ]
    lines = [
        f'name: "{spec.name}"',
        'platform: "ensemble"',
        "max_batch_size: 0",
        *_tensors("input", spec.inputs),
        *_tensors("output", spec.outputs),
        "ensemble_scheduling {",
        "  step [",
        "    {",
        f'      model_name: "{front.name}"',
        "      model_version: -1",
        *(f'      {kind} {{ key: "{key}" value: "{value}" }}' for kind, key, value in maps),
        "    }",
        "  ]",
        "}",
    ]
    return _text(lines)


def _tensors(kind: str, specs: Iterable[TensorSpec], *, drop_batch: bool = False) -> list[str]:
    rows = []
    for spec in specs:
        axes = spec.axes[1:] if drop_batch and spec.axes[0] == BATCH else spec.axes
        dims = ", ".join("-1" if isinstance(axis, str) else str(axis) for axis in axes)
        optional = " optional: true" if spec.optional else ""
        rows.append(
            f'  {{ name: "{spec.name}" data_type: {_type(spec)} dims: [ {dims} ]{optional} }}'
        )
    return [f"{kind} [", ",\n".join(rows), "]"]


def parameter(key: str, value: object) -> str:
    """A line with a model's parameter, which is text."""
    text = json.dumps(str(value), ensure_ascii=False)  # the same escapes
    return f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}'


def _type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.dtype == "bytes" else f"TYPE_{TRITON_TYPES[spec.dtype]}"


def _text(lines: Iterable[str], head: str = _HEAD) -> str:
    return "\n".join([*([head] if head else []), *lines]) + "\n"
