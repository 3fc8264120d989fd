"""Which modules of the package another one is made of, as its source says."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def imported(path: Path, package: Path = PACKAGE, *, typing: bool = True) -> Iterator[str]:
    """Dotted names below `package` that a module of it imports, lazily or not.

    Of `from .room import x` it is `room.x`, whether `x` is a module or something in one.

    Args:
        path: the module's source.
        package: its package's folder.
        typing: whether to name what is imported for a type checker alone.
    """
    here = (package.name, *path.relative_to(package).parent.parts)
    yield from _imported(path.read_bytes(), here, typing=typing)


@functools.cache  # an export asks twice for almost the same modules
def _imported(source: bytes, here: tuple[str, ...], *, typing: bool) -> tuple[str, ...]:
    """`imported` of a source in the folder `here`, whose first part is the package's name."""
    found: list[str] = []
    for node in _statements(ast.parse(source), typing=typing):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found += (".".join(t[1:]) for t in targets if t[0] == here[0] and len(t) > 1)
    return tuple(found)


def _statements(node: ast.AST, *, typing: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # holds no statement, and most of a tree is expressions
        checked = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if typing or not checked:
            yield child
            yield from _statements(child, typing=typing)


def closure(names: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The source files of modules, of all that they import when they run, and so on, sorted.

    Args:
        names: dotted, below `package`.
        package: its folder.

    Raises:
        LookupError: none of them is a module.
    """
    waiting = list(names)
    for name in waiting:
        if _file(name, package) is None:
            raise LookupError(f"{package.name} has no module {name}")
    found: set[Path] = set()
    while waiting:
        path = _file(waiting.pop(), package)
        if path is not None and path not in found:
            found.add(path)
            waiting += imported(path, package, typing=False)
    return sorted(found)


def _file(name: str, package: Path) -> Path | None:
    """The file of a module, or of the module that has something of this name."""
    parts = name.split(".")
    while parts:
        module = package.joinpath(*parts)
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.is_file():
                return path
        parts.pop()
    return None
