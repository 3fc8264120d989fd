"""One weights file → a plain, hashed state dict that fits a model, or an error that says why not.

Where the model is in the file, and under which names, is found from its keys (`contents`,
`layouts`). How the file is read, so that nothing in it is ever executed: `weight_files`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..core.errors import CheckpointError, InputError
from ..files.atomic import write_atomically
from ..files.damage import reason_of
from .contents import (
    Candidate,
    FoundTensor,
    choose_model,
    find_models,
    flatten,
    ignored,
    is_swapped,
    shortened,
)
from .fitting import StateDict
from .layouts import (
    HUGGING_FACE,
    HUGGING_FACE_2,
    POSITIONS,
    SAM,
    layout_of,
    named_twice,
    own_names,
)
from .pickles import OddTensor, StoredTensor
from .weight_files import WeightsFile, inspect_line, open_weights

SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Statistics that SAM keeps beside its weights in some versions."""


@dataclass(frozen=True)
class Checkpoint:
    """A weights file as read.

    Attributes:
        path: the file, or its folder.
        sha256: of the file.
        tensors: by SAM's names.
        notes: what the user should know: where the model was found, and what was ignored.
        layout: one of `layouts`, in which the file has it.
    """

    path: Path
    sha256: str
    tensors: StateDict
    notes: tuple[str, ...] = ()
    layout: str = SAM


@dataclass(frozen=True)
class Selected:
    """The model of a file that is taken.

    Attributes:
        model: where it is.
        layout: one of `layouts`.
        ignored: names of what is no part of it.
        notes: as `Checkpoint.notes`.
    """

    model: Candidate
    layout: str
    ignored: list[str]
    notes: tuple[str, ...]


def read_checkpoint(
    path: Path, *, weights: str | None = None, key: str | None = None
) -> Checkpoint:
    """Read `.safetensors`, or a PyTorch file, whatever its writer wrapped the model in.

    Args:
        path: the file, or a folder that Hugging Face's libraries wrote.
        weights: `model` or `ema`, where the file has both.
        key: prefix of the model, where the file has several.

    Raises:
        CheckpointError: missing, unreadable, unsafe (would run code), holding no tensors, several
            models, or tensors that are no plain numbers.
    """
    file = open_weights(path)
    file.check_names()
    selected = select(file, weights, key)
    content = file.read()
    try:
        found = {name: _at(content, one.way) for name, one in selected.model.tensors.items()}
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: not read as its description says ({reason_of(error)})"
        ) from error
    _check_positions(path, found)
    notes = (*selected.notes, *_statistics(content, file, selected.ignored))
    return Checkpoint(path, file.sha256, own_names(found), notes, selected.layout)


def select(file: WeightsFile, weights: str | None = None, key: str | None = None) -> Selected:
    """Find the model in a file whose description was read.

    Raises:
        CheckpointError: see `read_checkpoint`.
    """
    content = file.declared.content
    try:
        found = flatten(content)
        models = find_models(found)
        if not models:
            raise InputError(_without_tensors(content))
        _check_plain(found)
        swapped = is_swapped(content)
        model, note = choose_model(models, weights, key, swapped=swapped)
        _check_shared(model, file.size)
        _check_width(model)
        if twice := named_twice(model.tensors):
            raise InputError(f"{' and '.join(twice)} are one tensor of the model; expected one")
    except ValueError as error:
        details = error.details if isinstance(error, InputError) else ()
        what = error.message if isinstance(error, InputError) else str(error)
        raise CheckpointError(
            f"checkpoint {file.path}: {what}; {inspect_line(file.path)}", *details
        ) from error
    layout, left = layout_of(model.tensors), ignored(content, found, model)
    notes = [note] if note else []
    if model.prefix and not note:
        notes.append(f"found under {model.prefix}")
    if layout in (HUGGING_FACE, HUGGING_FACE_2):
        notes.append(f"layout of {layout}")
    if left:
        notes.append(f"ignored: {shortened(left)}")
    return Selected(model, layout, left, tuple(notes))


def _without_tensors(content: Any) -> str:
    if not isinstance(content, dict):
        kind = {"StoredTensor": "Tensor", "NoneType": "object without tensors"}
        name = type(content).__name__
        return f"holds a {kind.get(name, name)}, expected a state dict"
    return f"{'no tensors in it' if content else 'it is empty'}; expected tensors by name"


def _check_plain(found: Mapping[str, FoundTensor]) -> None:
    """Refuse tensors that are no plain numbers.

    Raises:
        ValueError: with the name of one.
    """
    for name, one in found.items():
        if isinstance(one.tensor, OddTensor):
            raise ValueError(f"{name} is {one.tensor.what}; expected a tensor of plain numbers")
        if one.tensor.dtype.is_complex:
            raise ValueError(f"{name} is complex; expected a tensor of real numbers")


def _check_width(model: Candidate) -> None:
    """Refuse numbers of one byte, which go with a scale that is elsewhere.

    Raises:
        ValueError: with the name of a tensor.
    """
    for name, one in model.tensors.items():
        dtype = one.tensor.dtype if isinstance(one.tensor, StoredTensor) else torch.float32
        if dtype.is_floating_point and dtype.itemsize < 2:
            word = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {word}: quantised weights cannot be taken")


def _check_shared(model: Candidate, size: int) -> None:
    """Refuse tensors that share their numbers so often that copies of them fill the memory.

    Args:
        model: of the file.
        size: bytes of the file.

    Raises:
        ValueError: together they are larger than two such files.
    """
    tensors = [one.tensor for one in model.tensors.values()]
    needed = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize
        for tensor in tensors
        if isinstance(tensor, StoredTensor)
    )
    if needed > 2 * size:
        raise ValueError(f"its tensors have {needed} bytes, and the file has {size}: they overlap")


def _at(content: Any, way: tuple[Any, ...]) -> Tensor:
    for name in way:
        content = content[name]
    tensor: Tensor = content.detach().clone()  # the file may change once it was read
    return tensor


def _check_positions(path: Path, tensors: StateDict) -> None:
    """Refuse two position matrices, where the layout has one under two names.

    Raises:
        CheckpointError: they differ.
    """
    both = [tensors[name] for name in POSITIONS if name in tensors]
    if len(both) == 2 and not torch.equal(*both):
        raise CheckpointError(
            f"checkpoint {path}: {POSITIONS[0]} and {POSITIONS[1]} differ, expected one matrix; "
            f"{inspect_line(path)}"
        )


def _statistics(content: Any, file: WeightsFile, left: list[str]) -> list[str]:
    """A note where the file's own image statistics are not SAM's."""
    found = flatten(file.declared.content)
    for name in left:
        for word, expected in (("pixel_mean", SAM_MEAN), ("pixel_std", SAM_STD)):
            if name.rpartition(".")[2] == word and name in found:
                values = _at(content, found[name].way).flatten()[: len(expected) + 1].tolist()
                if len(values) != 3 or any(
                    abs(a - b) > 1e-3 for a, b in zip(values, expected, strict=True)
                ):
                    listed = ", ".join(f"{value:g}" for value in values[:3])
                    return [f"its {word} ({listed}) is not SAM's: prepare images as it was trained"]
    return []


def read_training_state(path: Path) -> dict[str, Any]:
    """Read a resume file of `dbsam_deploy.train`: a table of tensors, numbers and text.

    Raises:
        CheckpointError: missing, unreadable, unsafe, or not a table.
    """
    content = open_weights(path).read(mapped=False)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(content).__name__}, expected a training state"
        )
    return content


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a state dict as half-precision `.safetensors`, atomically.

    Args:
        path: the file.
        tensors: state dict; floating-point tensors are stored as float16, all others as they are.
        about: what it is, kept in the file's header.

    Raises:
        CheckpointError: a value that float16 cannot hold.
    """
    stored = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.is_floating_point():
            value = value.to(torch.float16)
            if not torch.isfinite(value).all():
                raise CheckpointError(f"{name} holds values that float16 cannot; not written")
        stored[name] = value
    content = save(stored, metadata=dict(about))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    # `save` puts its metadata in another order each time; equal weights shall be equal files.
    header["__metadata__"] = dict(sorted(about.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.write(memoryview(content)[8 + size :])


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
