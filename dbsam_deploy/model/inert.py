"""What training scripts keep beside the weights, and what stands for it while a file is read.

`torch.load(weights_only=True)` refuses every class that it does not know, and takes those that are
named here through its safe globals. None of them is imported or made: a stand-in takes their place,
which keeps nothing and runs nothing. So a name may be listed when a real checkpoint has it; it can
run no code, and no memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Ignored:
    """Stands for an object that is not looked at: it takes any arguments and state, and drops them.

    Args:
        *_: dropped.
    """

    def __new__(cls, *_: Any) -> Ignored:
        """An object without anything in it."""
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Table:
    """Makes an empty dict of what a class of tables is given; its items follow."""

    def __new__(cls, *_: Any) -> Any:
        return {}


class _List:
    """Makes an empty list likewise."""

    def __new__(cls, *_: Any) -> Any:
        return []


_TABLES = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_LISTS = ("collections.deque",)
_BUILT_IN = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "bytes")
COPIED = frozenset({"collections.Counter", "_codecs.encode", "builtins.set", "__builtin__.set"})
"""PyTorch knows these itself and makes them; each copies what it is given, which is counted."""
HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
"""MMEngine keeps it beside the weights, with the names of its own methods."""
GETATTR = frozenset({"builtins.getattr", "__builtin__.getattr"})
"""How those names are pickled; what stands for it looks up nothing. Refused for any other class."""
_THINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{kind}Path" for kind in ("", "Pure", "Posix", "PurePosix", "Windows")),
    *(f"pathlib._local.{kind}Path" for kind in ("", "Pure", "Posix", "PurePosix", "Windows")),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta")),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILT_IN),
    HISTORY,
    *GETATTR,
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String")),
    "typing.Any",
)

INERT: dict[str, type] = {
    **dict.fromkeys((*_THINGS, *COPIED), Ignored),
    **dict.fromkeys(_TABLES, dict),
    **dict.fromkeys(_LISTS, list),
}
"""Name in a pickle → what stands for it: a thing that is ignored, a table or a list."""

_MAKERS: dict[type, Callable[..., Any]] = {Ignored: Ignored, dict: _Table, list: _List}


def safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The stand-ins with their names, as `torch.serialization.safe_globals` takes them."""
    return [(_MAKERS[kind], name) for name, kind in INERT.items()]
