"""What the pickle of a PyTorch file declares, from its opcodes: nothing is built or allocated.

`torch.load(weights_only=True)` runs no code, but it believes what it reads: it calls `bytearray`
with any number, enlarges a storage to the size of its tensor, reads past the end of a record that
is shorter than its storage, and hashes tuples of any depth. So a pickle is walked first.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

MAX_OPCODES = 2_000_000
"""Most opcodes of one pickle; a model of a thousand tensors has fifty thousand."""
MAX_DEPTH = 16
"""Deepest tuple in tuples."""

_CALLED = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
    }
)
_ELEMENT_BYTES = {
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_CONSTANTS = frozenset(
    {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
)
_OTHERS = frozenset(
    {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_AXES = 64
"""Most axes of a tensor; PyTorch has the same limit."""


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]
    depth: int


@dataclass(frozen=True)
class _Storage:
    count: int
    element_bytes: int


@dataclass
class _Walk:
    """The unpickler's stack, with what sizes depend on; None stands for all else."""

    storages: dict[str, _Storage]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, value: Any) -> None:
        """Take one opcode."""
        if name in _CONSTANTS:
            self.stack.append(value)
        elif name in _OTHERS:
            self.stack.append(_Tuple((), 0) if name == "EMPTY_TUPLE" else None)
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in _TUPLES:
            self.stack.append(_tuple([self.stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, self.stack = self.stack, self.marks.pop()
            if name == "SETITEMS":
                _check_keys(items[::2])
            self.stack += [_tuple(items)] if name == "TUPLE" else []
        elif name in ("APPEND", "BUILD"):
            self.stack.pop()
        elif name == "SETITEM":
            _check_keys(self.stack[-2:-1])
            del self.stack[-2:]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = self.stack[-1]
        else:
            self._make(name, value)

    def _make(self, name: str, value: Any) -> None:
        """Push what a name, a call or the memo gives."""
        if name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif name == "GLOBAL":
            self.stack.append(_allowed(value.replace(" ", ".")))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            given, called = self.stack.pop(), self.stack.pop()
            _check_call(called, given)
            self.stack.append(None)
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"opcode {name}, which no weights of torch.save have")

    def _storage(self, given: Any) -> _Storage:
        items = given.items if isinstance(given, _Tuple) else ()
        if not (len(items) in (5, 6) and items[0] == "storage" and isinstance(items[1], _Name)):
            raise ValueError("a storage without its description")
        element = _ELEMENT_BYTES.get(items[1].text.rpartition(".")[2])
        key, count = items[2], items[4]
        if not isinstance(key, str) or element is None or not isinstance(count, int) or count < 0:
            raise ValueError(f"a storage of {items[1].text} without name or size")
        found = _Storage(count, element)
        if self.storages.setdefault(key, found) != found or items[5:] not in ((), (None,)):
            raise ValueError("a storage that is described in two ways")
        return found


def declared_storages(stream: BinaryIO, *, pickles: int = 1) -> dict[str, int]:
    """Key → bytes of every storage that the tensors of a pickle need.

    Args:
        stream: at the start of the pickle; left behind it.
        pickles: how many follow each other.

    Raises:
        UnpicklingError: more than tensors, which could run code or take any memory.
        ValueError, LookupError, AttributeError: damaged, a tensor that its storage does not hold.
    """
    storages: dict[str, _Storage] = {}
    for _ in range(pickles):
        walk = _Walk(storages)
        for count, (opcode, value, _at) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise ValueError(f"a pickle of more than {MAX_OPCODES} opcodes")
            walk.step(opcode.name, value)
    return {key: found.count * found.element_bytes for key, found in storages.items()}


def _tuple(items: list[Any]) -> _Tuple:
    depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"tuples {depth} deep; expected at most {MAX_DEPTH}")
    return _Tuple(tuple(items), depth)


def _check_keys(keys: list[Any]) -> None:
    """Refuse tuples as keys: the hash of one in which others are shared may take for ever."""
    if any(isinstance(key, _Tuple) for key in keys):
        raise ValueError("a table with tuples as names")


def _allowed(name: str) -> _Name:
    module, _, last = name.rpartition(".")
    is_dtype = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    is_storage = module in ("torch", "torch.storage") and last in _ELEMENT_BYTES
    if not (name in _CALLED or is_dtype or is_storage):
        raise pickle.UnpicklingError(f"GLOBAL {name}")
    return _Name(name)


def _check_call(called: Any, given: Any) -> None:
    """Refuse a call that makes more than its arguments hold.

    Raises:
        UnpicklingError: something is called that makes no weights.
        ValueError: a tensor that reaches beyond its storage, or repeats it.
    """
    if not (isinstance(called, _Name) and called.text in _CALLED and isinstance(given, _Tuple)):
        name = called.text if isinstance(called, _Name) else type(called).__name__
        raise pickle.UnpicklingError(f"GLOBAL {name}")
    if called.text == "collections.OrderedDict" and given.items:
        raise ValueError("a table that is made from another object")
    if not called.text.startswith("torch._utils._rebuild_tensor"):
        return
    storage, offset, sizes, strides = given.items[:4]
    element = storage.element_bytes
    if called.text.endswith("v3"):  # a storage of bytes, and the type of its numbers
        element = getattr(torch, given.items[6].text.rpartition(".")[2]).itemsize
    numbers = [offset, *sizes.items, *strides.items]
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    if not whole or not len(sizes.items) == len(strides.items) <= MAX_AXES:
        raise ValueError("a tensor whose sizes are no whole numbers")
    pairs = zip(sizes.items, strides.items, strict=True)
    reach = offset + sum((size - 1) * stride for size, stride in pairs) + 1
    held = storage.count * storage.element_bytes
    count = math.prod(sizes.items)
    if count and max(reach, count) * element > held:
        raise ValueError(f"a tensor of {count} numbers in a storage of {held} bytes")
