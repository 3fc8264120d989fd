"""What the builder made of a graph: plugin layers and fused attention, from its own inspector."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import EngineError
from ..kernels.quick_plugins import QUICK_OPERATORS

DOMAIN = "dbsam"
"""ONNX domain of our fused operators; their names are those of the plugins."""

ATTENTION_OPERATORS = ("RelPosAttention", "WindowedAttention")
"""Fused operators that are a whole attention; taken apart, TensorRT's own kernels may fuse them."""

_NAMING_KEYS = ("Name", "LayerType", "PluginType", "Metadata")


@dataclass(frozen=True)
class PlacedAttention:
    """What an ONNX graph holds that has to be fused.

    Attributes:
        operators: our fused operators, node name → operator.
        softmax: attentions in standard operators, counted as Softmax nodes.
    """

    operators: dict[str, str]
    softmax: int

    @property
    def taken_apart(self) -> int:
        """Attentions that are left to TensorRT where no plugin runs."""
        names = list(self.operators.values())
        return self.softmax + sum(names.count(name) for name in ATTENTION_OPERATORS)

    def of_quick_plugins(self) -> PlacedAttention:
        """Without the operators that have no quickly deployable plugin and are taken apart."""
        kept = {node: name for node, name in self.operators.items() if name in QUICK_OPERATORS}
        return replace(self, operators=kept)


@dataclass(frozen=True)
class LayerReport:
    """Layers of one plan.

    Attributes:
        layers: all of them.
        plugins: layers that run one of our plugins.
        operators: nodes of our fused operators in the ONNX graph.
        fused_attention: layers in TensorRT's own fused attention kernels.
        attention: attentions in the graph that are left to those.
    """

    layers: int
    plugins: int
    operators: int
    fused_attention: int
    attention: int

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


def read_attention(path: Path) -> PlacedAttention:
    """Look for attention in an ONNX file's main graph; function bodies are not entered."""
    import onnx  # here alone: what engines can be asked for is known without it

    nodes = onnx.load(path, load_external_data=False).graph.node
    return PlacedAttention(
        operators={node.name: node.op_type for node in nodes if node.domain == DOMAIN},
        softmax=sum(node.op_type == "Softmax" for node in nodes),
    )


def read_layers(text: str, attention: PlacedAttention) -> LayerReport:
    """Count in an engine inspector's JSON.

    A plugin layer has a type that starts with `Plugin` and carries the name of its node or of its
    operator; TensorRT's fused attention has `mha` in its name or tactic.

    Args:
        text: `EngineInspector.get_engine_information` of an engine built with detailed verbosity.
        attention: what the ONNX file holds.

    Raises:
        EngineError: the text is no such JSON, or holds names only.
    """
    try:
        layers = json.loads(text)["Layers"]
        detailed = bool(layers) and all("LayerType" in layer for layer in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"the engine inspector's answer is not understood: {error}") from error
    if not detailed:
        raise EngineError(
            "the engine inspector gives no details of the layers: the engine was not built with "
            "detailed profiling verbosity; build it again"
        )
    words = {*attention.operators, *attention.operators.values()}
    plugins = sum(_is_plugin(layer) and _names_one(layer, words) for layer in layers)
    return LayerReport(
        layers=len(layers),
        plugins=plugins,
        operators=len(attention.operators),
        fused_attention=sum(_is_fused_attention(layer) for layer in layers),
        attention=attention.softmax if plugins else attention.taken_apart,
    )


def _is_plugin(layer: dict[str, Any]) -> bool:
    return str(layer["LayerType"]).startswith("Plugin")


def _names_one(layer: dict[str, Any], words: set[str]) -> bool:
    text = " ".join(str(layer.get(key, "")) for key in _NAMING_KEYS)
    return any(word in text for word in words)


def _is_fused_attention(layer: dict[str, Any]) -> bool:
    names = f"{layer.get('Name', '')} {layer.get('TacticName', '')}".lower()
    return "mha" in names and not _is_plugin(layer)


def check_plugins(report: LayerReport, what: str) -> None:
    """Compare plugin layers with the graph's fused operators.

    Raises:
        EngineError: fewer layers run plugins than the graph has fused operators, so that some were
            taken apart into standard ones.
    """
    if report.plugins < report.operators:
        raise EngineError(
            f"{what}: {report.plugins} plugin layers for {report.operators} fused operators, so "
            "the others were taken apart; is the plugin library built for this version? To build "
            "it: python -m dbsam_deploy.plugins build"
        )
