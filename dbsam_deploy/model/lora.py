"""Low-rank adapters (LoRA) merged into the weights that they belong to: W + scale · B A.

Three forms are known. A file of SAMed has `w_a_000`, `w_b_000` … for the queries and values of each
block, its prompt encoder and its mask decoder, and needs the model that it was trained on. A folder
of peft has `adapter_config.json` with the scale, and likewise. A state dict of SAMed's whole model
has the adapters beside the layers that they change.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError, InputError
from ..files.damage import DAMAGED, reason_of
from ..files.regular import small_text
from .fitting import StateDict
from .layouts import SAM, own_name
from .weight_files import inspect_line

PEFT_CONFIG = "adapter_config.json"
MAX_RANK = 65536
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_SAMED = re.compile(r"w_([ab])_(\d{3})")
_IN_PLACE = re.compile(r"(.+\.attn\.qkv)\.linear_([ab])_([qv])\.weight")
_PEFT = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_AS_IT_WAS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin a LoRA that leave the base's weights alone; PiSSA, OLoRA and others change them."""
_PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none"}
_ABSENT = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "megatron_config", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config"),
    *("alora_invocation_tokens", "kasa_config", "monteclora_config"),
)
"""Facts of peft's configuration that a plain product of two matrices does not have."""
_PEFT_PART = re.compile(r"\.lora_|\.base_layer\.|\.lora_magnitude_vector")


def has_adapters(tensors: StateDict) -> bool:
    """Whether tensors of an adapter are among a file's."""
    return any(
        _SAMED.fullmatch(name) or _IN_PLACE.fullmatch(name) or _PEFT_PART.search(name)
        for name in tensors
    )


def merge_in_place(source: str, tensors: StateDict) -> StateDict:
    """Merge the adapters of a state dict that has them beside the layers, as SAMed's model has.

    Args:
        source: what is being loaded, for the message.
        tensors: of the file; without adapters they are returned as they are.

    Raises:
        CheckpointError: peft's layers, whose scale is in another file, or an adapter alone.
    """
    if any(_SAMED.fullmatch(name) for name in tensors):
        raise CheckpointError(
            f"{source} is an adapter of SAMed: name the model that it was trained on with "
            f"--checkpoint, and this file with --adapter"
        )
    if any(_PEFT_PART.search(name) for name in tensors):
        raise CheckpointError(
            f"{source} has layers of peft whose scale is not in it: name peft's folder with "
            "--adapter, or save model.merge_and_unload().state_dict()"
        )
    found: dict[str, dict[str, Tensor]] = {}
    merged = {}
    for name, tensor in tensors.items():
        if match := _IN_PLACE.fullmatch(name):
            found.setdefault(match[1], {})[match[2] + match[3]] = tensor
        elif name.endswith(".attn.qkv.w_identity"):
            continue  # SAMed keeps it in some versions, and never uses it
        else:
            own = name.replace(".attn.qkv.qkv.", ".attn.qkv.")
            if own in merged or (own != name and own in tensors):
                raise CheckpointError(f"{source} has {name}, and {own} besides: expected one")
            merged[own] = tensor
    for layer, parts in found.items():
        _add_queries_and_values(source, merged, f"{layer}.weight", parts)
    return merged


def _add_queries_and_values(
    source: str, tensors: StateDict, name: str, parts: dict[str, Tensor]
) -> None:
    """Add an adapter of queries and values to the fused weight (3 C, C) of one block.

    Raises:
        CheckpointError: a part of it is missing, or of another shape.
    """
    weight = tensors.get(name)
    if weight is None or parts.keys() != {"aq", "bq", "av", "bv"}:
        raise CheckpointError(f"{source}: the adapter of {name} is not whole")
    width = weight.shape[-1] if weight.dim() else 0
    if weight.shape != (3 * width, width):
        raise CheckpointError(
            f"{source}: {name} is {tuple(weight.shape)}, expected three times as many rows as "
            "columns"
        )
    _check_kind(source, name, weight)
    changed = weight.to(torch.float32, copy=True)
    for rows, kind in ((slice(None, width), "q"), (slice(-width, None), "v")):
        changed[rows] += _product(
            source, name, parts[f"a{kind}"], parts[f"b{kind}"], (width, width)
        )
    tensors[name] = changed


def _product(source: str, name: str, down: Tensor, up: Tensor, shape: tuple[int, ...]) -> Tensor:
    """B A as float32, of a `shape`.

    Raises:
        CheckpointError: of another one.
    """
    fits = down.dim() == up.dim() == 2 and up.shape[1] == down.shape[0]
    if not fits or (up.shape[0], down.shape[1]) != shape:
        raise CheckpointError(
            f"{source}: the adapter of {name} is {tuple(up.shape)} · {tuple(down.shape)}, expected "
            f"{shape}"
        )
    _check_kind(source, f"the adapter of {name}", down, up)
    return up.float() @ down.float()


def _check_kind(source: str, name: str, *tensors: Tensor) -> None:
    """Refuse whole numbers, which a sum would turn into floating-point ones that nobody meant.

    Raises:
        CheckpointError: one is of another kind.
    """
    for tensor in tensors:
        if not tensor.is_floating_point():
            word = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: {name} is {word}, expected float32: quantised weights cannot be taken"
            )


def adapter_file(path: Path) -> Path:
    """The file with the numbers of an adapter: the path itself, or the one in peft's folder.

    Raises:
        CheckpointError: a folder without one.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in PEFT_FILES if (path / name).is_file()]
    if len(found) != 1 or not (path / PEFT_CONFIG).is_file():
        raise CheckpointError(
            f"{path} is no folder of peft: expected {PEFT_CONFIG} and one of "
            f"{', '.join(PEFT_FILES)}"
        )
    return found[0]


def merge_adapter(base: StateDict, adapter: StateDict, path: Path, layout: str = SAM) -> StateDict:
    """A model's tensors with an adapter's merged into them.

    Args:
        base: the model that the adapter was trained on, by SAM's names.
        adapter: of the adapter's file, likewise, without the file's prefix.
        path: the adapter, a file of SAMed or a folder of peft.
        layout: in which the adapter's file has it, as far as its names tell.

    Raises:
        CheckpointError: neither form, or one that does not belong to the model.
    """
    if any(_SAMED.fullmatch(name) for name in adapter):
        return _merge_samed(base, adapter, path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no adapter of SAMed, and peft's is a folder with {PEFT_CONFIG}; "
            f"{inspect_line(path)}"
        )
    config = _peft_config(path)
    if config["of_sam_model"] and layout == SAM:  # names that both have, of other layers
        adapter = {own_name(name): tensor for name, tensor in adapter.items()}
    return _merge_peft(base, adapter, path, config)


def _merge_samed(base: StateDict, adapter: StateDict, path: Path) -> StateDict:
    blocks = sum(name.endswith(".attn.qkv.weight") for name in base)
    halves: dict[tuple[str, int], Tensor] = {}
    merged = dict(base)
    for name, tensor in adapter.items():
        if match := _SAMED.fullmatch(name):
            halves[match[1], int(match[2])] = tensor
        else:
            merged[name] = tensor  # its prompt encoder and mask decoder
    if halves.keys() != {(kind, i) for kind in "ab" for i in range(2 * blocks)}:
        raise CheckpointError(
            f"{path} adapts {len(halves) // 4} blocks, and the model has {blocks}: only adapters "
            "of all blocks can be told apart"
        )
    for block in range(blocks):
        parts = {
            f"{kind}{word}": halves[kind, 2 * block + i]
            for kind in "ab"
            for i, word in enumerate("qv")
        }
        name = f"image_encoder.blocks.{block}.attn.qkv.weight"
        _add_queries_and_values(str(path), merged, name, parts)
    return merged


def _peft_config(path: Path) -> dict[str, Any]:
    """The facts of a folder of peft.

    Raises:
        CheckpointError: not readable, or of a kind that cannot be merged into linear layers.
    """
    try:
        config = json.loads(small_text(path / PEFT_CONFIG))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        rooted = config.get("use_rslora", False)
    except (*DAMAGED, InputError) as error:
        raise CheckpointError(
            f"{path / PEFT_CONFIG} is no configuration of LoRA: {reason_of(error)}"
        ) from error
    if not 1 <= rank <= MAX_RANK or not math.isfinite(alpha):
        raise CheckpointError(f"{path / PEFT_CONFIG}: rank {rank} and lora_alpha {alpha}")
    wrong = [name for name, value in _PLAIN.items() if config.get(name, value) != value]
    wrong += [name for name in _ABSENT if config.get(name)]
    wrong += ["init_lora_weights"] * (config.get("init_lora_weights") not in _AS_IT_WAS)
    wrong += ["use_rslora"] * (rooted not in (True, False))
    if wrong:
        raise CheckpointError(
            f"{path / PEFT_CONFIG}: {wrong[0]} is {config[wrong[0]]!r:.60}, which is not merged "
            "here: save model.merge_and_unload() instead"
        )
    scale = alpha / (math.sqrt(rank) if rooted else rank)
    mapping = config.get("auto_mapping")
    of_sam_model = isinstance(mapping, dict) and mapping.get("base_model_class") == "SamModel"
    return {"rank": rank, "scale": scale, "of_sam_model": of_sam_model}


def _merge_peft(
    base: StateDict, adapter: StateDict, path: Path, config: dict[str, Any]
) -> StateDict:
    merged = dict(base)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        if match := _PEFT.fullmatch(name):
            key = f"{match[1]}.weight"
            if match[2] in layers.setdefault(key, {}):
                raise CheckpointError(f"{path} adapts {key} twice: save one adapter alone")
            layers[key][match[2]] = tensor
            continue
        key = name.replace(".modules_to_save.default.", ".")
        if key not in base:  # else of a module that was trained whole
            raise CheckpointError(
                f"{path} has {key}, which is no part of the model that --checkpoint names"
            )
        merged[key] = tensor
    if not layers:
        raise CheckpointError(f"{path} has no lora_A and lora_B; {inspect_line(path)}")
    for name, parts in layers.items():
        weight = base.get(name)
        if weight is None or weight.dim() != 2 or parts.keys() != {"A", "B"}:
            raise CheckpointError(
                f"{path} adapts {name}, which is no whole linear layer of the model that "
                "--checkpoint names"
            )
        if parts["A"].shape[:1] != (config["rank"],):
            raise CheckpointError(
                f"{path}: the adapter of {name} is {tuple(parts['A'].shape)}, and the rank in "
                f"{PEFT_CONFIG} is {config['rank']}"
            )
        _check_kind(str(path), name, weight)
        product = _product(str(path), name, parts["A"], parts["B"], tuple(weight.shape))
        merged[name] = weight.float() + config["scale"] * product
    return merged
