"""Layouts of the same model under other names → the names that SAM's own code has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

T = TypeVar("T")

HUGGING_FACE = "Hugging Face SamModel"
SAM = "SAM"
HUGGING_FACE_EPS = 1e-6
"""eps of the LayerNorms in the mask decoder's blocks with which `SamModel` computes."""

POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
"""Two names of `SamModel` for one matrix."""
_POSITION = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_MED2D = re.compile(r"^(image_encoder\.blocks\.\d+)\.Adapter\.")
"""The adapters of SAM-Med2D, see `block_adapter`."""
_HUGGING_FACE = re.compile(
    r"vision_encoder\.|shared_image_embedding\."
    r"|prompt_encoder\.(point_embed|mask_embed|shared_embedding)\."
    r"|mask_decoder\.(upscale_|.*\.(layer_norm\w*|proj_in|proj_out)\.)"
)
"""Names that only `SamModel` has: an adapter of the mask decoder has no `vision_encoder`."""
_MLP = r"mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)"
_RENAMED = (
    (r"^(shared_image|prompt_encoder\.shared)_embedding\.positional_embedding$", _POSITION),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^(mask_decoder\.transformer)\.layer_norm_final_attn\.", r"\1.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (rf"^({_MLP})\.proj_in\.", r"\1.layers.0."),
    (rf"^({_MLP})\.layers\.0\.", r"\1.layers.1."),
    (rf"^({_MLP})\.proj_out\.", r"\1.layers.2."),
)
"""Names of transformers' `SamModel` → SAM's; the first that matches counts."""


def layout_of(names: Iterable[str]) -> str:
    """Which layout a model's keys have, or those of an adapter of a part of it."""
    return HUGGING_FACE if any(map(_HUGGING_FACE.match, names)) else SAM


def own_name(name: str) -> str:
    """A key of `SamModel` under SAM's name, or as it is."""
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def own_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """A model's tensors under SAM's names.

    Args:
        tensors: of one model, in one of the known layouts. `SamModel` has its position matrix
            twice, under two names for one tensor, or once; the prompt encoder's is taken.
    """
    to_own = _to_own(layout_of(tensors))
    return {to_own(name): value for name, value in sorted(tensors.items(), reverse=True)}


def named_twice(names: Iterable[str]) -> tuple[str, ...]:
    """Two keys of a model that are one under SAM's names, where there are; but for `POSITIONS`."""
    found: dict[str, str] = {}
    listed = list(names)
    to_own = _to_own(layout_of(listed))
    for name in listed:
        before = found.setdefault(to_own(name), name)
        if before != name and {before, name} != set(POSITIONS):
            return before, name
    return ()


def _to_own(layout: str) -> Callable[[str], str]:
    return own_name if layout == HUGGING_FACE else partial(_MED2D.sub, r"\1.mlp.adapter.")
