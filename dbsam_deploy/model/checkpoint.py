"""One weights file → a plain, hashed state dict that fits a model, or an error that says why not.

Nothing in a file is ever executed: pickles are read with `weights_only=True`. What a file declares
is compared with what it holds before anything is allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..core.errors import CheckpointError
from ..files.atomic import write_atomically
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from ..files.zip_files import open_zip, plain_sizes
from .pickles import declared_storages

StateDict = dict[str, Tensor]

WRAPPERS = ("net", "model", "state_dict", "model_state_dict")
"""Keys under which training scripts put the state dict; `net` is DB-SAM's own."""

MAX_CHECKPOINT_BYTES = 16 * 1024 * 1024 * 1024
"""Largest file that is read: SAM's ViT-H with its optimiser has 8 GB."""
MAX_PICKLE_BYTES = 32 * 1024 * 1024
"""Longest pickle within a file, or header of a safetensors file; real ones have kilobytes."""

_COUNT_BYTES = 8
"""What precedes the numbers of a storage in files from before 2020."""

DIFF_LINES = 8
"""How many keys of each kind an error lists; with its heading a diff fits one screen."""


@dataclass(frozen=True)
class Checkpoint:
    """A weights file as read: `tensors` by name, its `path` and the file's SHA-256."""

    path: Path
    sha256: str
    tensors: StateDict


def read_checkpoint(path: Path) -> Checkpoint:
    """Read `.safetensors`, or a PyTorch file in any of the known layouts.

    Layouts: a plain state dict (SAM, MedSAM), `{"net": …}` (DB-SAM), `{"model": …}`, with or
    without the `module.` prefix of a data-parallel run.

    Raises:
        CheckpointError: missing, unreadable, unsafe (would run code), or holding no tensors.
    """
    _size(path)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    tensors = _tensors(path, _read(path))
    return Checkpoint(path, sha256, tensors)


def read_training_state(path: Path) -> dict[str, Any]:
    """Read a resume file of `dbsam_deploy.train`: a table of tensors, numbers and text.

    Raises:
        CheckpointError: missing, unreadable, unsafe, or not a table.
    """
    _size(path)
    content = _read(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(content).__name__}, expected a training state"
        )
    return content


def _size(path: Path) -> int:
    """Bytes of a file that is small enough to be read.

    Raises:
        CheckpointError: no such file, none at all, or too large.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"checkpoint {path}: no such file")
    size = regular_size(path, CheckpointError)
    if size > MAX_CHECKPOINT_BYTES:
        raise CheckpointError(
            f"checkpoint {path}: {size} bytes; at most {MAX_CHECKPOINT_BYTES} are read; save the "
            "state dict alone"
        )
    return size


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            _check_declared(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch begins with advice to load it unsafely; what it found comes after that.
        reason = reason_of(ValueError(str(error).rpartition("WeightsUnpickler error:")[2]))
        match = re.search(r"(?:GLOBAL|global) (\S+)", reason)
        what = f"it asks for {match.group(1)[:100]}" if match else reason
        raise CheckpointError(
            f"checkpoint {path}: refused, it holds more than tensors ({what}) and loading it could "
            "run code; save the state dict alone, best as .safetensors"
        ) from error
    except DAMAGED as error:
        raise CheckpointError(
            f"checkpoint {path}: not a PyTorch weights file ({reason_of(error)})"
        ) from error


def _read_safetensors(path: Path) -> StateDict:
    try:
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > MAX_PICKLE_BYTES:
            raise ValueError(f"its header has {header} bytes; at most {MAX_PICKLE_BYTES} are read")
        return load_file(path)
    except (SafetensorError, *DAMAGED) as error:
        raise CheckpointError(
            f"checkpoint {path}: not a safetensors file ({reason_of(error)})"
        ) from error


def _check_declared(path: Path) -> None:
    """Compare what a PyTorch file declares with what it holds, before `torch.load` believes it.

    Raises:
        Those of `pickles.declared_storages` and `zip_files.plain_sizes`; ValueError: storages that
            the file does not hold.
    """
    size = _size(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # a file from before 2020: five pickles, then numbers
            stream.seek(0)
            declared = declared_storages(stream, pickles=5)
            left = size - stream.tell() - _COUNT_BYTES * len(declared)
            _check_held(sum(declared.values()), left, "its storages")
            return
    with open_zip(path, CheckpointError) as archive:
        sizes = plain_sizes(archive, size)
        records = [name for name in sizes if name.endswith("/data.pkl")]
        if len(records) != 1:
            raise ValueError(f"{len(records)} data.pkl in it; expected one")
        record = records[0]
        if sizes[record] > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {sizes[record]} bytes")
        declared = declared_storages(io.BytesIO(archive.read(record)))
        for key, count in declared.items():
            name = f"{record.removesuffix('.pkl')}/{key}"
            _check_held(count, sizes.get(name, 0), f"its storage {key}")
        damaged = archive.testzip()  # PyTorch does not compare checksums
    if damaged is not None:
        raise ValueError(f"the checksum of its {damaged} is wrong: fetch it again")


def _check_held(declared: int, held: int, what: str) -> None:
    if declared != held:
        raise ValueError(f"{what} should have {declared} bytes, and the file holds {held}")


def _tensors(path: Path, content: object) -> StateDict:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(content).__name__}, expected a state dict"
        )
    tensors = {str(k).removeprefix("module."): v for k, v in content.items()}
    wrong = [k for k, v in tensors.items() if not isinstance(v, Tensor)]
    if wrong or not tensors:
        found = f"{wrong[0]!r} is a {type(tensors[wrong[0]]).__name__}" if wrong else "it is empty"
        raise CheckpointError(
            f"checkpoint {path}: {found}; expected tensors by name, plain or in one of {WRAPPERS}"
        )
    return tensors


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


def fit_tensors(tensors: StateDict, wanted: Mapping[str, Tensor]) -> StateDict:
    """Apply the small remap table: names and shapes on which DB-SAM checkpoints are known to vary.

    - `mlp.dwconv.weight` ↔ `mlp.dwconv.dwconv.weight` (and bias);
    - a 1×1 convolution (out, in, 1, 1) where a Linear (out, in) is wanted, and the reverse;
    - a missing `num_batches_tracked` counts as 0.

    Args:
        tensors: the file's tensors.
        wanted: the model's state dict, for its names and shapes.

    Returns:
        The tensors under the model's names where the table applies, all others unchanged.
    """
    fitted = {}
    for name, tensor in tensors.items():
        target = name
        if name not in wanted:
            for variant in (
                name.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv."),
                name.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv."),
            ):
                target = variant if variant in wanted and variant not in tensors else target
        shape = wanted[target].shape if target in wanted else tensor.shape
        if tensor.shape != shape and (*tensor.shape, 1, 1) == shape:
            tensor = tensor[..., None, None]
        elif tensor.shape != shape and tensor.shape == (*shape, 1, 1):
            tensor = tensor[..., 0, 0]
        fitted[target] = tensor
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked") and name not in fitted:
            fitted[name] = torch.zeros_like(tensor)
    return fitted


def check_fit(source: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare a state dict with a model's, strictly.

    Args:
        source: what is being loaded, for the message.
        tensors: the candidate.
        wanted: the model's own state dict.

    Raises:
        CheckpointError: with a one-screen diff of missing, unexpected and mis-shaped keys, or the
            name of a tensor that holds NaN or infinity.
    """
    missing = [k for k in wanted if k not in tensors]
    unexpected = [k for k in tensors if k not in wanted]
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {kind}: {'; '.join(keys[:DIFF_LINES])}"
            + (f"; and {len(keys) - DIFF_LINES} more" if len(keys) > DIFF_LINES else "")
            for kind, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise CheckpointError(
            f"{source} does not fit the model; name the variant the file was trained as "
            "with --variant",
            *parts,
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds NaN or infinity; the file is damaged")
