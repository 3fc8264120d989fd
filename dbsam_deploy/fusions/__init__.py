"""Encoder graph → the same file with the library's own ops, for every runtime.

Each fused op is a node of the domain `dbsam` with a function body in standard ops: ONNX Runtime
runs the body, TensorRT-RTX inlines it, and TensorRT takes the plugin of the same name. A graph that
differs from a pattern in any size or constant is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..core.errors import ExportError
from ..extras import require

for _name in ("onnx", "onnx_ir", "onnxscript"):
    require(_name, extra="export", what_for="the export")

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.rewriter.pattern import RewriteRuleSet

from ..files.onnx_files import check_valid, save_onnx
from ..model import ModelConfig, TwoBranchConfig
from . import (
    channel_attention,
    depthwise_conv_gelu,
    layout,
    ms_deform_attn,
    rel_pos_attention,
    windowed_attention,
)
from .nodes import DOMAIN, VERSION

__all__ = ["expected_counts", "fuse", "fuse_file"]

_OPS = {
    "ms_deform_attn": ms_deform_attn,
    "channel_attention": channel_attention,
    "rel_pos_attention": rel_pos_attention,
    depthwise_conv_gelu.STEM: depthwise_conv_gelu,
    windowed_attention.STEM: windowed_attention,
}
"""Stem → op, in this order: the last one's pattern has the node of another."""
_OPTIONAL = (depthwise_conv_gelu.STEM, windowed_attention.STEM)
"""What a recipe may ask for (`recipe.OPTIONAL_FUSIONS`); the others always are fused."""


def fuse(model: ir.Model, optional: Collection[str] = ()) -> dict[str, int]:
    """Replace every occurrence of the patterns, in place.

    Args:
        model: an exported graph whose Reshape targets are constants.
        optional: stems of the optional ops that are fused as well.

    Returns:
        How many nodes of each fused op, by its stem, the graph now has, with those of an earlier
        call.
    """
    wanted = [op for stem, op in _OPS.items() if stem not in _OPTIONAL]
    wanted += [_OPS[stem] for stem in optional]
    rules = [rule for op in wanted for rule in op.rules()]
    if RewriteRuleSet(rules).apply_to_model(model):
        RewriteRuleSet(layout.RULES).apply_to_model(model)
        common_passes.IdentityEliminationPass()(model)
        common_passes.RemoveUnusedNodesPass()(model)
    found: dict[str, list[ir.Node]] = {op.NAME: [] for op in _OPS.values()}
    for node in model.graph:
        if node.domain == DOMAIN:
            found[node.op_type].append(node)
    for op in _OPS.values():
        if found[op.NAME]:
            in_groups = op in (rel_pos_attention, windowed_attention)
            body = op.body(rel_pos_attention.groups_of(found[op.NAME])) if in_groups else op.body()
            # Of the graph's own opset: a checker wants them to agree.
            body.opset_imports[""] = model.opset_imports.get("", body.opset_imports[""])
            model.functions[body.identifier()] = body
            model.graph.opset_imports[DOMAIN] = VERSION
    return {stem: len(found[op.NAME]) for stem, op in _OPS.items()}


def fuse_file(
    path: Path,
    config: ModelConfig,
    quantized: Collection[str] = (),
    optional: Collection[str] = (),
) -> dict[str, int]:
    """Fuse an exported encoder in its file; the file is replaced only by one that is valid.

    Args:
        path: ONNX file with its weights inside.
        config: the model that it was exported from.
        quantized: paths of modules that have Q/DQ pairs; blocks that hold one stay as they are.
        optional: stems of the optional ops that are fused as well.

    Raises:
        ExportError: other counts than `expected_counts`, or the result is not valid ONNX.
    """
    model = ir.load(path)
    counts = fuse(model, optional)
    expected = expected_counts(config, quantized, optional)
    if counts != expected:
        raise ExportError(
            f"{path.name}: fused {counts}, {config.name} has {expected}; the "
            "exported graph no longer has the form that dbsam_deploy.fusions looks for"
        )
    if not any(counts.values()):
        return counts
    save_onnx(model, path, check_valid)
    return counts


def expected_counts(
    config: ModelConfig, quantized: Collection[str] = (), optional: Collection[str] = ()
) -> dict[str, int]:
    """Fused nodes that a variant's encoder must have: those whose sizes the kernels run.

    Args:
        config: the variant.
        quantized: paths of modules with Q/DQ pairs. The channel attention block and the depthwise
            convolution hold layers, the windowed attention moves those before and behind it; the
            other ops lie between layers.
        optional: stems of the optional ops that are fused as well.

    Returns:
        The count of each op, by its stem.
    """
    adapter = config.adapter
    sampled = gated = attended = filtered = windowed = 0
    if adapter is not None:
        if depthwise_conv_gelu.STEM in optional and depthwise_conv_gelu.supports(
            4 * config.embed_dim
        ):
            filtered = 8 - depthwise_conv_gelu.kept_apart(quantized)
        levels = len(adapter.levels)
        # Sampling from the convolution maps (and, with four branches, the ViT's), four blocks each
        sources = (levels, 1) if isinstance(adapter, TwoBranchConfig) else (levels + 1, levels + 1)
        head_dim = config.embed_dim // adapter.num_heads
        sampled = 4 * sum(
            ms_deform_attn.supports(head_dim, count, adapter.num_points) for count in sources
        )
    if isinstance(adapter, TwoBranchConfig) and adapter.channel_attention != "none":
        whole = 4 - len(
            {path.split(".")[3] for path in quantized if path.startswith(channel_attention.BLOCKS)}
        )
        gated = whole * channel_attention.supports(config.embed_dim)
    if not (config.tiny_vit or config.efficient_vit or config.hiera):
        head_dim = config.embed_dim // config.num_heads
        local = (config.depth - 4) * rel_pos_attention.supports(head_dim, config.window_size)
        if windowed_attention.STEM in optional and local:
            windowed = local - windowed_attention.kept_apart(quantized, config.stage_depth)
        attended = local - windowed
        attended += 4 * rel_pos_attention.supports(head_dim, config.frame.grid)
    return {
        "ms_deform_attn": sampled,
        "channel_attention": gated,
        "rel_pos_attention": attended,
        depthwise_conv_gelu.STEM: filtered,
        windowed_attention.STEM: windowed,
    }
