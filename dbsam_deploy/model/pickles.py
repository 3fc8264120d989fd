"""What the pickle of a PyTorch file declares, from its opcodes: nothing is built or allocated.

`torch.load(weights_only=True)` runs no code, but it believes what it reads: it calls `bytearray`
with any number, enlarges a storage to the size of its tensor, reads past the end of a record that
is shorter than its storage, copies what it is given as often as it is told, and hashes tuples of
any depth. So a pickle is walked first, and what it holds is known from that.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from .inert import COPIED, GETATTR, HISTORY, INERT

MAX_OPCODES = 2_000_000
"""Most opcodes of one pickle; a model of a thousand tensors has fifty thousand."""
MAX_DEPTH = 16
"""Deepest tuple in tuples."""
MAX_COPIED = 32 * 1024 * 1024
"""Most bytes, in all, that a pickle has copied into other objects."""
_ITEM_BYTES = 128
"""What an item takes at most in a copied table or set; a letter of a text takes one byte."""
MAX_NAME_NUMBER = 2**48
"""Largest number as a name in a table; larger ones can have one hash for all."""

_REBUILT = "torch._utils._rebuild_tensor"
_PARAMETERS = ("torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter")
_TABLE = "collections.OrderedDict"
_CALLED = frozenset(
    {_TABLE, "torch.Size", "torch.device", _REBUILT, f"{_REBUILT}_v2", f"{_REBUILT}_v3"}
    | {*_PARAMETERS}
)
_ODD = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_meta_tensor_no_storage": "without numbers (device meta)",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_wrapper_subclass": "of a class of its own",
    "torch._tensor._rebuild_from_type_v2": "of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another kind of device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another kind of device",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes",
}
"""What makes tensors that are no plain numbers → what these are."""
_LAYOUT = "torch.serialization._get_layout"
_ODD_PARTS = frozenset(
    {_LAYOUT, "torch.Tensor"}
    | {f"torch.per_{kind}_{way}" for kind in ("tensor", "channel") for way in ("affine",)}
)
"""Names among the arguments of `_ODD`."""
_STORAGES = {
    **{f"{name}Storage": torch.uint8 for name in ("Untyped", "Byte")},
    "CharStorage": torch.int8,
    "BoolStorage": torch.bool,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ShortStorage": torch.int16,
    "FloatStorage": torch.float32,
    "IntStorage": torch.int32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
"""Class of a storage → what its numbers are."""
_CONSTANTS = frozenset(
    {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
)
_MADE = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_ENCODED = "_codecs.encode"
_OTHERS = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_SET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_AXES = 64
"""Most axes of a tensor; PyTorch has the same limit."""


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(frozen=True)
class Items:
    """A tuple of the pickle."""

    items: tuple[Any, ...]
    depth: int


@dataclass(frozen=True)
class _Storage:
    key: str
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it.

    Attributes:
        storage: key of the storage that its numbers lie in.
        dtype: of its numbers.
        offset: of the first one within the storage, in numbers.
        shape: its shape.
        stride: its strides, in numbers.
    """

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class OddTensor:
    """A tensor that is no plain numbers; `what` it is, for a sentence."""

    what: str


@dataclass(frozen=True)
class Thing:
    """Anything else that the pickle makes, by the name of what it calls."""

    name: str


@dataclass(frozen=True)
class Declared:
    """What a file's pickles declare.

    Attributes:
        storages: key → bytes of every storage that the tensors need.
        content: the saved object: dict, list, `Items`, `StoredTensor`, `OddTensor`, `Thing`,
            numbers and text; None stands for all else.
        asked: what is called that makes no weights and is not in `inert.INERT`.
        odd: kinds of the `OddTensor` that are made anywhere, kept in the content or not.
    """

    storages: dict[str, int]
    content: Any
    asked: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()


@dataclass
class _Walk:
    """The unpickler's stack, with what sizes depend on."""

    storages: dict[str, _Storage]
    asked: dict[str, None]
    odd: dict[str, None]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    copied: int = 0

    def step(self, name: str, value: Any) -> None:
        """Take one opcode."""
        if name in _CONSTANTS:
            self.stack.append(_constant(name, value))
        elif name in _MADE:
            self.stack.append(_MADE[name]())
        elif name == "EMPTY_TUPLE" or name in _OTHERS:
            self.stack.append(Items((), 0) if name == "EMPTY_TUPLE" else None)
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in _TUPLES:
            self.stack.append(_tuple([self.stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, self.stack = self.stack, self.marks.pop()
            if name == "TUPLE":
                self.stack.append(_tuple(items))
            else:
                _put(self.stack[-1], items, in_table=name == "SETITEMS")
        elif name in ("APPEND", "SETITEM"):
            items = [self.stack.pop() for _ in range(1 + (name == "SETITEM"))][::-1]
            _put(self.stack[-1], items, in_table=name == "SETITEM")
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = self.stack[-1]
        else:
            self._make(name, value)

    def _make(self, name: str, value: Any) -> None:
        """Push what a name, a call or the memo gives."""
        if name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif name == "GLOBAL":
            self.stack.append(self._named(value.replace(" ", ".")))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            given, called = self.stack.pop(), self.stack.pop()
            self.stack.append(self._call(called, given))
        elif name == "BUILD":
            self._build(self.stack.pop(), self.stack[-1])
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"opcode {name}, which no weights of torch.save have")

    def _named(self, name: str) -> _Name:
        module, _, last = name.rpartition(".")
        is_dtype = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
        is_storage = module in ("torch", "torch.storage") and last in _STORAGES
        known = name in _CALLED or name in _ODD or name in _ODD_PARTS or name in INERT
        if not (known or is_dtype or is_storage):
            self.asked[name] = None
        return _Name(name)

    def _storage(self, given: Any) -> _Storage:
        items = given.items if isinstance(given, Items) else ()
        if not (len(items) in (5, 6) and items[0] == "storage" and isinstance(items[1], _Name)):
            raise ValueError("a storage without its description")
        dtype = _STORAGES.get(items[1].text.rpartition(".")[2])
        key, count = items[2], items[4]
        if not isinstance(key, str) or dtype is None or not isinstance(count, int) or count < 0:
            raise ValueError(f"a storage of {items[1].text} without name or size")
        found = _Storage(key, count, dtype)
        if self.storages.setdefault(key, found) != found or items[5:] not in ((), (None,)):
            raise ValueError("a storage that is described in two ways")
        return found

    def _call(self, called: Any, given: Any) -> Any:
        """What a call makes; refused where that is more than its arguments hold.

        Raises:
            UnpicklingError: something is called that has no name.
            ValueError: a tensor that reaches beyond its storage, or repeats it; too many copies.
        """
        if isinstance(called, Thing):  # the result of another call
            self.asked[called.name] = None
            return called
        if not (isinstance(called, _Name) and isinstance(given, Items)):
            raise pickle.UnpicklingError(f"a call of a {type(called).__name__}")
        name, items = called.text, given.items
        if name == _TABLE:
            if items:
                raise ValueError("a table that is made from another object")
            return {}
        if name.startswith(_REBUILT):
            return _rebuilt(name, items)
        if name in _PARAMETERS:
            return items[0]
        if name in _ODD:
            self.odd[_ODD[name]] = None
            return OddTensor(_ODD[name])
        return self._thing(name, items)

    def _thing(self, name: str, items: tuple[Any, ...]) -> Any:
        """What a call makes that is no tensor and no table of them."""
        if name in COPIED or name == "torch.Size":
            self._charge(items[0] if items else "", each=1 if name == _ENCODED else _ITEM_BYTES)
            if name == _ENCODED and items[1:] != ("latin1",):
                raise ValueError("text in another encoding than Latin 1")
        inert = name in INERT and (name not in GETATTR or _of_history(items))
        if not inert and name not in _CALLED and name != _LAYOUT:
            self.asked[name] = None
        return INERT[name]() if name in INERT and INERT[name] in (dict, list) else Thing(name)

    def _build(self, state: Any, target: Any) -> None:
        """Attributes of a table, which PyTorch copies, or of a thing that keeps none."""
        if isinstance(target, Thing) and target.name not in COPIED:
            return
        if not (isinstance(target, dict | Thing) and isinstance(state, dict)):
            raise ValueError("a tensor that is changed after it was made")
        self._charge(state)

    def _charge(self, copied: Any, *, each: int = _ITEM_BYTES) -> None:
        """Count a copy.

        Raises:
            ValueError: of what has no known length, or of items that are no names (`_check_name`).
        """
        items = copied.items if isinstance(copied, Items) else copied
        if not isinstance(items, dict | list | tuple | str):
            raise ValueError("a copy of what is no text, list or table")
        self.copied += each * (1 + len(items))
        if self.copied > MAX_COPIED:
            raise ValueError(f"more than {MAX_COPIED} copied bytes")
        for item in () if isinstance(items, str) else items:
            _check_name(item)


def declared(stream: BinaryIO, *, pickles: int = 1, content: int = 0) -> Declared:
    """What the pickles of a file declare.

    Args:
        stream: at the start of the first; left behind the last.
        pickles: how many follow each other.
        content: which of them has the saved object.

    Raises:
        UnpicklingError: opcodes that no weights have.
        ValueError, LookupError, AttributeError: damaged, a tensor that its storage does not hold.
    """
    storages: dict[str, _Storage] = {}
    asked: dict[str, None] = {}
    odd: dict[str, None] = {}
    saved = None
    for number in range(pickles):
        walk = _Walk(storages, asked, odd)
        for count, (opcode, value, _at) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise ValueError(f"a pickle of more than {MAX_OPCODES} opcodes")
            walk.step(opcode.name, value)
        if number == content:
            saved = walk.stack[-1]
    sizes = {key: found.count * found.dtype.itemsize for key, found in storages.items()}
    return Declared(sizes, saved, tuple(asked), tuple(odd))


def _of_history(items: tuple[Any, ...]) -> bool:
    """Whether a method is asked for that MMEngine names in its checkpoints."""
    return bool(items) and isinstance(items[0], _Name) and items[0].text == HISTORY


def _constant(name: str, value: Any) -> Any:
    """A number or text.

    Raises:
        ValueError: text of which PyTorch and `pickletools` make different letters.
    """
    if name == "SHORT_BINSTRING" and not value.isascii():
        raise ValueError("text that readers decode in different ways")
    return value


def _tuple(items: list[Any]) -> Items:
    depth = 1 + max((item.depth for item in items if isinstance(item, Items)), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"tuples {depth} deep; expected at most {MAX_DEPTH}")
    return Items(tuple(items), depth)


def _put(target: Any, items: list[Any], *, in_table: bool) -> None:
    """Put items into a list, or names and values into a table.

    Raises:
        ValueError: into something else; or a name of `_check_name`.
    """
    if isinstance(target, Thing):
        return
    if isinstance(target, list) and not in_table:
        target.extend(items)
        return
    if not (isinstance(target, dict) and in_table):
        raise ValueError(f"items that are put into a {type(target).__name__}")
    for name, value in zip(items[::2], items[1::2], strict=True):
        _check_name(name)
        if isinstance(name, str | bytes | int | float):
            target[name] = value


def _check_name(name: Any) -> None:
    """Refuse a name in a table, or an item of a set, whose hash may take for ever.

    Raises:
        ValueError: a tuple, in which others may be shared, or a number whose hash others have too.
    """
    if isinstance(name, Items):
        raise ValueError("a table with tuples as names")
    if isinstance(name, int | float) and not abs(name) < MAX_NAME_NUMBER:
        raise ValueError("a table with huge numbers as names")


def _rebuilt(name: str, items: tuple[Any, ...]) -> StoredTensor:
    """The tensor that a call describes.

    Raises:
        ValueError: one that reaches beyond its storage, or repeats it.
    """
    storage, offset, sizes, strides = items[:4]
    dtype = storage.dtype
    if name.endswith("v3"):  # a storage of bytes, and the type of its numbers
        dtype = getattr(torch, items[6].text.rpartition(".")[2])
    numbers = [offset, *sizes.items, *strides.items]
    whole = all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
    if not whole or not len(sizes.items) == len(strides.items) <= MAX_AXES:
        raise ValueError("a tensor whose sizes are no whole numbers")
    pairs = zip(sizes.items, strides.items, strict=True)
    reach = offset + sum((size - 1) * stride for size, stride in pairs) + 1
    held = storage.count * storage.dtype.itemsize
    count = math.prod(sizes.items)
    if count and max(reach, count) * dtype.itemsize > held:
        raise ValueError(f"a tensor of {count} numbers in a storage of {held} bytes")
    return StoredTensor(storage.key, dtype, offset, sizes.items, strides.items)
