"""What a weights file holds, from its description alone: no model is built, no number is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..catalogue import CATALOGUE
from ..core.errors import CheckpointError, InputError
from . import VARIANTS
from .checkpoint import Checkpoint, Selected, select
from .contents import FoundTensor, about, find_models, flatten
from .fitting import StateDict, differences, fit_tensors, interpolate_position
from .layouts import own_names
from .lora import adapter_file, has_adapters, merge_adapter, merge_in_place
from .pickles import StoredTensor
from .shapes import shapes_of
from .weight_files import WeightsFile, inspect_line, open_weights
from .weights import ADAPTER, BLOCK_ADAPTER, infer_fusion, infer_variant, trained_size


def inspect_weights(
    path: Path,
    *,
    weights: str | None = None,
    key: str | None = None,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Facts about a weights file.

    Args:
        path: a file, or a folder that Hugging Face's libraries wrote.
        weights: see `read_checkpoint`.
        key: see `read_checkpoint`.
        adapter: see `load_model`.

    Returns:
        `file`, `form`, `bytes`, `sha256`, `models` (prefix → what it has), and of the one that
        would be loaded `model`, `layout`, `ignored`, `notes`, `family`, `variant`, `image_size`,
        `precision`, `parameters`, `adapters`, `differences`; `refused` says why it cannot be
        loaded, empty where it can.

    Raises:
        CheckpointError: missing, unreadable or damaged.
    """
    file = open_weights(path)
    facts: dict[str, Any] = {
        "file": str(file.file),
        "form": file.form,
        "bytes": file.size,
        "sha256": file.sha256,
        "models": _models(file),
    }
    refused = []
    try:
        facts |= _of_model(file, weights, key, adapter)
        refused.append(facts["refused"])
    except (CheckpointError, InputError) as error:
        refused.append(error.message.removesuffix(f"; {inspect_line(path)}"))
    try:
        file.check_names()
    except CheckpointError as error:
        refused.insert(0, error.message)
    return facts | {"refused": refused[0]}


def _models(file: WeightsFile) -> dict[str, str]:
    try:
        found = find_models(flatten(file.declared.content))
    except ValueError:
        return {}  # `select` says what is wrong
    return {model.label: about(model.tensors) for model in found}


def _of_model(
    file: WeightsFile, weights: str | None, key: str | None, adapter: Path | None
) -> dict[str, Any]:
    """Facts about the model that would be loaded.

    Raises:
        CheckpointError: none would be, or one of a family that is not known.
    """
    selected = select(file, weights, key)
    stored = own_names(_descriptions(selected))
    lora = has_adapters(stored) or adapter is not None
    tensors = merge_in_place(f"checkpoint {file.path}", stored) if adapter is None else stored
    if adapter is not None:
        found = select(open_weights(adapter_file(adapter)))
        added = own_names(_descriptions(found))
        tensors = merge_adapter(stored, added, adapter, found.layout)
    facts: dict[str, Any] = {
        "model": selected.model.label,
        "layout": selected.layout,
        "ignored": selected.ignored,
        "notes": list(selected.notes),
        "precision": _precision(selected.model.tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    variant = infer_variant(Checkpoint(file.path, file.sha256, tensors))
    size = trained_size(tensors)
    missing = _differences(tensors, variant, size)
    return facts | {
        "variant": variant,
        "family": CATALOGUE[variant].family,
        "image_size": size or VARIANTS[variant].image_size,
        "adapters": _adapters(tensors) + ["LoRA, merged when it is loaded"] * lora,
        "differences": missing,
        "refused": f"it does not fit {variant}" if missing else "",
    }


def _descriptions(selected: Selected) -> StateDict:
    """The tensors without their numbers."""
    found = {}
    for name, one in selected.model.tensors.items():
        if isinstance(one.tensor, StoredTensor):
            shape, dtype = one.tensor.shape, one.tensor.dtype
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def _precision(tensors: dict[str, FoundTensor]) -> str:
    counts: dict[str, int] = {}
    for one in tensors.values():
        if isinstance(one.tensor, StoredTensor) and one.tensor.dtype.is_floating_point:
            word = str(one.tensor.dtype).removeprefix("torch.")
            counts[word] = counts.get(word, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{word} ({count} tensors)" for word, count in counts.items())


def _differences(tensors: StateDict, variant: str, size: int | None) -> list[str]:
    """Missing, unexpected and mis-shaped keys, as loading would find them."""
    with torch.device("meta"):
        wanted = shapes_of(variant, image_size=size, fusion=infer_fusion(tensors))
        fitted = interpolate_position(fit_tensors(tensors, wanted), wanted, None)
    return differences(fitted, wanted)


def _adapters(tensors: StateDict) -> list[str]:
    fusion = infer_fusion(tensors)
    with_adapter = any(name.startswith(ADAPTER) for name in tensors)
    found = [f"DB-SAM's{f' (fusion {fusion})' if fusion else ''}"] if with_adapter else []
    return found + ["SAM-Med2D's"] * any(BLOCK_ADAPTER in name for name in tensors)
