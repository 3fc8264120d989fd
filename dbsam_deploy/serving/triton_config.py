"""Renders each `config.pbtxt` of the Triton model repository from the contract's specs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.contract import (
    BATCH,
    BOXES,
    MODEL_BOXES,
    TRITON_TYPES,
    Geometry,
    GraphSpec,
    TensorSpec,
    decoder_spec,
    encoder_spec,
    ensemble_spec,
    postprocess_prompts_spec,
    postprocess_spec,
    preprocess_prompts_spec,
    preprocess_spec,
    prompt_decoder_spec,
    prompts_ensemble_spec,
)
from ..core.imaging import Preprocessing
from ..engines.profiles import MAX_BATCH

Platform = Literal["onnxruntime", "tensorrt"]

_HEAD = "# Rendered from dbsam_deploy/core/contract.py; do not edit by hand."

_BACKENDS = {"onnxruntime": 'backend: "onnxruntime"', "tensorrt": 'platform: "tensorrt_plan"'}

BYTECODE = "__pycache__"
"""Folder that Triton's Python leaves beside the code of a model."""
GRAPH_MODELS = {
    "encoder": "dbsam_encoder",
    "decoder": "dbsam_decoder",
    "prompt_decoder": "dbsam_prompt_decoder",
}
"""Exported graph → the Triton model that runs it."""


@dataclass(frozen=True)
class EnsembleStep:
    """One model of an ensemble; `renames` maps its tensor names to other names in the ensemble."""

    model: str
    spec: GraphSpec
    renames: Mapping[str, str] = field(default_factory=dict)


def python_specs(size: Geometry, *, prompts: bool) -> tuple[GraphSpec, ...]:
    """Specs of the Python models; `prompts` adds those of the `dbsam_prompts` ensemble."""
    specs = [preprocess_spec(size), postprocess_spec(size)]
    if prompts:
        specs += [preprocess_prompts_spec(size), postprocess_prompts_spec(size)]
    return tuple(specs)


def render_configs(how: Preprocessing, platforms: Mapping[str, Platform]) -> dict[str, str]:
    """Every `config.pbtxt` of a repository.

    Args:
        how: sizes and mode of the exported model.
        platforms: exported graph → what runs it; `prompt_decoder` may be absent.

    Returns:
        Triton model name → text of its configuration.
    """
    prompts = "prompt_decoder" in platforms
    graphs = {"encoder": encoder_spec(how), "decoder": decoder_spec(how)}
    if prompts:
        graphs["prompt_decoder"] = prompt_decoder_spec(how)
    configs = {spec.name: _python_model(spec, how) for spec in python_specs(how, prompts=prompts)}
    for graph, spec in graphs.items():
        configs[GRAPH_MODELS[graph]] = _graph_model(spec, platforms[graph])
    box_steps = (
        _step(preprocess_spec(how)),
        _step(graphs["encoder"]),
        _step(graphs["decoder"], **{BOXES: MODEL_BOXES}),
        _step(postprocess_spec(how)),
    )
    configs["dbsam"] = _ensemble(ensemble_spec(how.mask_side), box_steps)
    if prompts:
        # The graph's prompt inputs are the preprocessing's outputs of the name `model_…`.
        renames = {name: f"model_{name}" for name in graphs["prompt_decoder"].input_names[1:]}
        steps = (
            _step(preprocess_prompts_spec(how)),
            _step(graphs["encoder"]),
            _step(graphs["prompt_decoder"], **renames),
            _step(postprocess_prompts_spec(how)),
        )
        configs["dbsam_prompts"] = _ensemble(prompts_ensemble_spec(how.mask_side), steps)
    return configs


def _step(spec: GraphSpec, **renames: str) -> EnsembleStep:
    return EnsembleStep(GRAPH_MODELS.get(spec.name, spec.name), spec, renames)


def _graph_model(spec: GraphSpec, platform: Platform) -> str:
    lines = [
        f'name: "{GRAPH_MODELS[spec.name]}"',
        _BACKENDS[platform],
        f"max_batch_size: {MAX_BATCH[platform][spec.name]}",
        *_tensors("input", spec.inputs, drop_batch=True),
        *_tensors("output", spec.outputs, drop_batch=True),
        "dynamic_batching { }",
        "instance_group [ { count: 1 } ]",  # the CPU default of two would load the weights twice
    ]
    if platform == "tensorrt" and spec.name == "encoder":
        lines.append("optimization { cuda { graphs: true } }")
    if spec.name == "encoder":
        image = spec.inputs[0]
        dims = ", ".join(str(axis) for axis in image.axes[1:])
        lines += [
            "model_warmup [",
            "  {",
            '    name: "zeros"',
            "    batch_size: 1",
            "    inputs {",
            f'      key: "{image.name}"',
            f"      value {{ data_type: {_type(image)} dims: [ {dims} ] zero_data: true }}",
            "    }",
            "  }",
            "]",
        ]
    return _text(lines)


def _python_model(spec: GraphSpec, how: Preprocessing) -> str:
    lines = [
        f'name: "{spec.name}"',
        'backend: "python"',
        "max_batch_size: 0",
        *_tensors("input", spec.inputs),
        *_tensors("output", spec.outputs),
    ]
    for key in ("image_size", "embedding_stride", "mode"):
        value = getattr(how, key)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    return _text(lines)


def _ensemble(spec: GraphSpec, steps: Iterable[EnsembleStep]) -> str:
    lines = [
        f'name: "{spec.name}"',
        'platform: "ensemble"',
        "max_batch_size: 0",
        *_tensors("input", spec.inputs),
        *_tensors("output", spec.outputs),
        "ensemble_scheduling {",
        "  step [",
    ]
    blocks = []
    for step in steps:
        block = ["    {", f'      model_name: "{step.model}"', "      model_version: -1"]
        for kind, tensors in (("input_map", step.spec.inputs), ("output_map", step.spec.outputs)):
            for tensor in tensors:
                value = step.renames.get(tensor.name, tensor.name)
                block.append(f'      {kind} {{ key: "{tensor.name}" value: "{value}" }}')
        blocks.append("\n".join([*block, "    }"]))
    return _text([*lines, ",\n".join(blocks), "  ]", "}"])


def _tensors(kind: str, specs: Iterable[TensorSpec], *, drop_batch: bool = False) -> list[str]:
    rows = []
    for spec in specs:
        axes = spec.axes[1:] if drop_batch and spec.axes[0] == BATCH else spec.axes
        dims = ", ".join("-1" if isinstance(axis, str) else str(axis) for axis in axes)
        rows.append(f'  {{ name: "{spec.name}" data_type: {_type(spec)} dims: [ {dims} ] }}')
    return [f"{kind} [", ",\n".join(rows), "]"]


def _type(spec: TensorSpec) -> str:
    return f"TYPE_{TRITON_TYPES[spec.dtype]}"


def _text(lines: Iterable[str]) -> str:
    return "\n".join([_HEAD, *lines]) + "\n"
