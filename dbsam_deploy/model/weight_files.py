"""One weights file, opened: what it declares, and its content. Nothing in it is ever executed.

Pickles are read with `weights_only=True`, after what a file declares was compared with what it
holds; what stands for the classes in it is in `inert`.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shlex
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..core.errors import CheckpointError
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from ..files.zip_files import open_zip, plain_sizes
from ..resources import WEIGHTS_IN_FOLDERS
from .inert import safe_globals
from .pickles import Declared, OddTensor, StoredTensor, declared

MAX_CHECKPOINT_BYTES = 16 * 1024 * 1024 * 1024
"""Largest file that is read: SAM's ViT-H with its optimiser has 8 GB."""
MAX_PICKLE_BYTES = 32 * 1024 * 1024
"""Longest pickle within a file, or header of a safetensors file; real ones have kilobytes."""

_COUNT_BYTES = 8
"""What precedes the numbers of a storage in files from before 2020."""
_SAFETENSORS_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class WeightsFile:
    """A weights file of which only the description was read.

    Attributes:
        path: as it was named: a file, or a folder that Hugging Face's libraries wrote.
        file: the file.
        form: `PyTorch`, `PyTorch before 2020` or `safetensors`.
        size: bytes.
        sha256: of the file.
        declared: what it holds; its tensors are descriptions.
    """

    path: Path
    file: Path
    form: str
    size: int
    sha256: str
    declared: Declared

    def read(self, *, mapped: bool = True) -> Any:
        """The content, in the shape of `declared.content`.

        Args:
            mapped: whether the numbers stay in the file until they are used, where it allows that.

        Raises:
            CheckpointError: it cannot be read, would run code, or has tensors of other kinds.
        """
        self.check_names()
        if self.declared.odd:  # PyTorch makes them as it is told, kept in the content or not
            raise CheckpointError(
                f"checkpoint {self.path}: a tensor in it is {self.declared.odd[0]}; expected "
                f"tensors of plain numbers; {inspect_line(self.path)}"
            )
        return read_content(self.file, mapped=mapped and self.form == "PyTorch")

    def check_names(self) -> None:
        """Refuse a file that asks for what makes no weights.

        Raises:
            CheckpointError: with the first name.
        """
        if self.declared.asked:
            name = reason_of(ValueError(self.declared.asked[0][:100]))
            raise _unsafe(self.file, f"it asks for {name}")


def inspect_line(path: Path) -> str:
    """What a refusal ends with: the command that shows what a file holds."""
    return f"`python -m dbsam_deploy.inspect_file {shlex.quote(str(path))}` shows what it holds"


def weights_file(path: Path) -> Path:
    """The file that a path names, which may be a folder with one.

    Raises:
        CheckpointError: nothing there, or a folder without weights, with several or in parts.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"checkpoint {path}: no such file")
    if not path.is_dir():
        return path
    found = [path / name for name in WEIGHTS_IN_FOLDERS if (path / name).is_file()]
    if len(found) == 1:
        return found[0]
    parts = [f"{name}.index.json" for name in WEIGHTS_IN_FOLDERS]
    in_parts = next((part for part in parts if (path / part).is_file()), None)
    what = f"weights in parts ({in_parts})" if in_parts else f"{len(found)} such files"
    raise CheckpointError(
        f"checkpoint {path} is a folder with {what}: expected a regular file, or a folder with "
        f"one {' or '.join(WEIGHTS_IN_FOLDERS)}"
    )


def file_size(path: Path) -> int:
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


def open_weights(path: Path) -> WeightsFile:
    """Read the description of a weights file, and compare it with what the file holds.

    Args:
        path: a file, or a folder that Hugging Face's libraries wrote.

    Raises:
        CheckpointError: missing, unreadable or damaged.
    """
    file = weights_file(path)
    size = file_size(file)
    with ThreadPoolExecutor(1) as pool:  # both take seconds for a file of gigabytes
        digest = pool.submit(_sha256, file)
        form, found = _describe(file)
        return WeightsFile(path, file, form, size, digest.result(), found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(file: Path) -> tuple[str, Declared]:
    if file.suffix == ".safetensors":
        return "safetensors", _describe_safetensors(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return _describe_pytorch(file)
    except pickle.UnpicklingError as error:
        raise _unsafe(file, reason_of(error)) from error
    except DAMAGED as error:
        raise _damaged(file, "a PyTorch weights", error) from error


def _describe_safetensors(file: Path) -> Declared:
    try:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > MAX_PICKLE_BYTES:
            raise ValueError(f"its header has {header} bytes; at most {MAX_PICKLE_BYTES} are read")
        with safe_open(file, "pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            return Declared({}, {name: _stored(name, part) for name, part in slices.items()})
    except (SafetensorError, *DAMAGED) as error:
        raise _damaged(file, "a safetensors", error) from error


def _stored(name: str, part: Any) -> StoredTensor | OddTensor:
    dtype = _SAFETENSORS_TYPES.get(part.get_dtype())
    if dtype is None:
        return OddTensor(f"of type {part.get_dtype()}")
    shape = tuple(part.get_shape())
    stride = torch.empty(shape, device="meta").stride()
    return StoredTensor(name, dtype, 0, shape, stride)


def _describe_pytorch(file: Path) -> tuple[str, Declared]:
    """Compare what a PyTorch file declares with what it holds, before `torch.load` believes it.

    Raises:
        Those of `pickles.declared` and `zip_files.plain_sizes`; ValueError: storages that the file
            does not hold.
    """
    size = file_size(file)
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # a file from before 2020: five pickles, then numbers
            stream.seek(0)
            found = declared(stream, pickles=5, content=3)
            if found.asked:
                return "PyTorch before 2020", found  # it is refused, whatever else it holds
            left = size - stream.tell() - _COUNT_BYTES * len(found.storages)
            _check_held(sum(found.storages.values()), left, "its storages")
            return "PyTorch before 2020", found
    with open_zip(file, CheckpointError) as archive:
        _refuse_programs(archive)
        sizes = plain_sizes(archive, size)
        records = [name for name in sizes if name.endswith("/data.pkl")]
        if len(records) != 1:
            raise ValueError(f"{len(records)} data.pkl in it; expected one")
        _check_entry_names(archive)
        record = records[0]
        if sizes[record] > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {sizes[record]} bytes")
        found = declared(io.BytesIO(archive.read(record)))
        if found.asked:
            return "PyTorch", found
        for key, count in found.storages.items():
            name = f"{record.removesuffix('.pkl')}/{key}"
            _check_held(count, sizes.get(name, 0), f"its storage {key}")
        damaged = archive.testzip()  # PyTorch does not compare checksums
    if damaged is not None:
        raise ValueError(f"the checksum of its {damaged} is wrong: fetch it again")
    return "PyTorch", found


def _refuse_programs(archive: zipfile.ZipFile) -> None:
    """Refuse a TorchScript archive, whose weights come with a program.

    Raises:
        ValueError: it has one.
    """
    if any(re.search(r"/code/|/constants\.pkl$", name) for name in archive.namelist()):
        raise ValueError("a TorchScript program: save the model's state dict instead")


def _check_entry_names(archive: zipfile.ZipFile) -> None:
    """Refuse names of entries that PyTorch may take for others than Python does.

    It ignores the case of letters, and knows no encodings and no second name of an entry.

    Raises:
        ValueError: with such a name.
    """
    seen: set[str] = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        _folder, _, alike = name.lower().partition("/")
        if name != entry.filename or not name.isascii() or alike in seen:
            raise ValueError(f"readers may take its entry {name} for another")
        seen.add(alike)


def _check_held(declared_bytes: int, held: int, what: str) -> None:
    if declared_bytes != held:
        raise ValueError(f"{what} should have {declared_bytes} bytes, and the file holds {held}")


def read_content(file: Path, *, mapped: bool = False) -> Any:
    """The whole content of a file whose description was compared with what it holds.

    Args:
        file: as `open_weights` found it.
        mapped: whether the numbers stay in the file until they are used.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe_globals()):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # PyTorch begins with advice to load it unsafely; what it found comes after that.
        reason = reason_of(ValueError(str(error).rpartition("WeightsUnpickler error:")[2]))
        match = re.search(r"(?:GLOBAL|global) (\S+)", reason)
        raise _unsafe(file, f"it asks for {match.group(1)[:100]}" if match else reason) from error
    except (SafetensorError, *DAMAGED) as error:
        kind = "a safetensors" if file.suffix == ".safetensors" else "a PyTorch weights"
        raise _damaged(file, kind, error) from error


def _unsafe(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {file}: refused, it holds more than tensors ({what}) and loading it could "
        "run code; save the state dict alone, best as .safetensors"
    )


def _damaged(file: Path, kind: str, error: BaseException) -> CheckpointError:
    return CheckpointError(f"checkpoint {file}: not {kind} file ({reason_of(error)})")
