"""All that an artefact is made from: what is the same is not made twice, what is not is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.inputs import Inputs, code_digest, digest
from ..machine.hardware import installed_versions
from ..recipe import Recipe
from .cases import Case

if TYPE_CHECKING:
    from ..model.held import HeldModel

GRAPH_MODULES = ("model.weights", "graphs.onnx_export", "quantization.quantizer", "fusions")
"""What the ONNX files come from, with all that these modules import."""
IMAGING_MODULES = ("graphs.imaging_graphs",)
"""Likewise, of what resizes images and makes masks in the export."""
GATE_MODULES = (
    "sessions.pytorch_session",
    "sessions.onnxruntime_session",
    "verification.answers",
    "verification.points",
)
"""What the figures come from, likewise."""
_TRACED = ("torch", "segment-anything", "onnx", "onnxscript", "onnx-ir", "numpy")
_COMPARED = ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "pillow")
_QUANTIZED = ("onnxruntime", "onnxruntime-gpu", "ml-dtypes", "pillow")
_MODELOPT = ("nvidia-modelopt", "onnx-graphsurgeon", "onnxslim")
"""Packages that change the ONNX files of every recipe, the figures, the files of a recipe that
quantises, and of one that leaves it to modelopt. Others do not take part."""


def graph_inputs(
    loaded: HeldModel, recipe: Recipe, quantizer_key: str, *, pixels_in_graph: bool = False
) -> Inputs:
    """All that determines the ONNX files: weights, recipe, versions and the code.

    Args:
        loaded: the model.
        recipe: precision of the export.
        quantizer_key: see `Quantizer.key`.
        pixels_in_graph: see `Geometry`.
    """
    packages: tuple[str, ...] = _TRACED
    if recipe.quantization is not None:
        packages += (*_QUANTIZED, *_resize_packages(loaded))
        packages += _MODELOPT if recipe.quantization.tool == "modelopt" else ()
    return {
        "weights": str(loaded.weights["sha256"]),
        "model": digest(repr(loaded.config)),
        "recipe": digest(repr(recipe)),
        "calibration": digest(quantizer_key),
        **({"imaging": "graph"} if pixels_in_graph else {}),
        "code of the export": code_digest(
            (*GRAPH_MODULES, *(IMAGING_MODULES if pixels_in_graph else ()))
        ),
        **installed_versions(packages),
    }


def compared_inputs(loaded: HeldModel, cases: list[Case]) -> Inputs:
    """All else that determines an artefact: the images, and their comparison."""
    images = (digest(c.name, c.image.tobytes(), c.boxes.tobytes()) for c in cases)
    return {
        "images of the comparison": digest(*images),
        "code of the comparison": code_digest(GATE_MODULES),
        **installed_versions((*_COMPARED, *_resize_packages(loaded))),
    }


def _resize_packages(loaded: HeldModel) -> tuple[str, ...]:
    """What MedSAM's preprocessing takes to resize an image; SAM's takes Pillow."""
    return ("scikit-image",) if loaded.preprocessing.mode == "medsam" else ()
