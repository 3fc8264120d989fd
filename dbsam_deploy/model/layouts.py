"""Layouts of the same model under other names → the names that SAM's own code has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

HUGGING_FACE = "Hugging Face SamModel"
HUGGING_FACE_2 = "Hugging Face Sam2Model"
SAM = "SAM"
SAM2 = "SAM 2"
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
_HUGGING_FACE_2 = re.compile(
    r"vision_encoder\.backbone\."
    r"|mask_decoder\.transformer\.(.+\.o_proj|layers\.\d+\.mlp\.proj_(in|out))\."
)
"""The same of `Sam2Model`."""
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


_SAM2 = ("image_encoder.trunk.", "sam_mask_decoder.", "sam_prompt_encoder.")
"""Starts of names that only SAM 2 has: an adapter of its mask decoder has no trunk."""
_OF_SAM2 = (
    (r"^sam_mask_decoder\.(conv_s[01])\.", r"image_encoder.\1."),
    (r"^no_mem_embed$", "image_encoder.no_mem_embed"),
    (r"^sam_(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^sam_(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
    (r"^sam_(mask_decoder|prompt_encoder)\.", r"\1."),
)
"""Names of SAM 2 → ours, which are SAM's where there is one, likewise."""
_BLOCKS = r"^vision_encoder\.backbone\.blocks\.(\d+)"
_MLP_2 = r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)"
_RENAMED_2 = (
    (
        r"^vision_encoder\.backbone\.patch_embed\.projection\.",
        "image_encoder.trunk.patch_embed.proj.",
    ),
    (rf"{_BLOCKS}\.layer_norm(\d)\.", r"image_encoder.trunk.blocks.\1.norm\2."),
    (rf"{_BLOCKS}\.mlp\.proj_in\.", r"image_encoder.trunk.blocks.\1.mlp.layers.0."),
    (rf"{_BLOCKS}\.mlp\.proj_out\.", r"image_encoder.trunk.blocks.\1.mlp.layers.1."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^no_memory_embedding$", "image_encoder.no_mem_embed"),
    (r"^mask_decoder\.(conv_s[01])\.", r"image_encoder.\1."),
    (r"^(mask_decoder\.transformer\..+)\.o_proj\.", r"\1.out_proj."),
    (rf"{_MLP_2}\.proj_in\.", r"\1.lin1."),
    (rf"{_MLP_2}\.proj_out\.", r"\1.lin2."),
    *_RENAMED,
)
"""Names of transformers' `Sam2Model` and `Sam2VideoModel` → ours, likewise."""
_POINTS_2 = "prompt_encoder.point_embed.weight"
"""There one tensor with a row for each label."""
_TABLES = {SAM2: _OF_SAM2, HUGGING_FACE: _RENAMED, HUGGING_FACE_2: _RENAMED_2}


def layout_of(names: Iterable[str]) -> str:
    """Which layout a model's keys have, or those of an adapter of a part of it."""
    listed = list(names)
    if any(name.startswith(_SAM2) for name in listed):
        return SAM2
    if any(map(_HUGGING_FACE_2.match, listed)):
        return HUGGING_FACE_2
    return HUGGING_FACE if any(map(_HUGGING_FACE.match, listed)) else SAM


def own_name(name: str, layout: str = HUGGING_FACE) -> str:
    """A key of another layout under SAM's name, or as it is."""
    for pattern, replacement in _TABLES[layout]:
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
    layout = layout_of(tensors)
    to_own = _to_own(layout)
    renamed = {to_own(name): value for name, value in sorted(tensors.items(), reverse=True)}
    rows: Any = tensors.get(_POINTS_2)
    if layout == HUGGING_FACE_2 and rows is not None and rows.shape:
        del renamed[to_own(_POINTS_2)]
        for i in range(len(rows)):
            renamed[f"prompt_encoder.point_embeddings.{i}.weight"] = rows[i : i + 1]
    return renamed


def named_twice(names: Iterable[str]) -> tuple[str, ...]:
    """Two keys of a model that are one under SAM's names, where there are; but for `POSITIONS`."""
    found: dict[str, str] = {}
    listed = list(names)
    to_own = _to_own(layout_of(listed))
    for name in listed:
        before = found.setdefault(to_own(name), name)
        if before != name and {before, name} != set(POSITIONS):
            return before, name
    rows = [name for name in listed if name.startswith("prompt_encoder.point_embeddings.")]
    return (_POINTS_2, rows[0]) if rows and _POINTS_2 in listed else ()


def _to_own(layout: str) -> Callable[[str], str]:
    if layout == SAM:
        return partial(_MED2D.sub, r"\1.mlp.adapter.")
    return partial(own_name, layout=layout)
