"""What a result was made from, part by part: its key, and what changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from .sources import PACKAGE, closure

Inputs = Mapping[str, str]
"""Name of a part → its value, or its hash where that is long."""


def digest(*parts: str | bytes | memoryview) -> str:
    """Hex SHA-256 of parts, each with its length; a view's items are bytes."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def key_of(inputs: Inputs) -> str:
    """One hash of all parts."""
    return digest(*(text for name in sorted(inputs) for text in (name, inputs[name])))


@cache
def code_digest(modules: tuple[str, ...], package: Path = PACKAGE) -> str:
    """Hash of modules of this package and of all that they import, see `sources.closure`."""
    return digest(*(path.read_bytes() for path in closure(modules, package)))


def changes(before: Inputs, now: Inputs) -> str:
    """What changed, in words; "" if nothing did.

    >>> changes({"torch": "2.12", "recipe": "a" * 64}, {"torch": "2.13", "recipe": "b" * 64})
    'recipe, torch (2.12, now 2.13)'
    """
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, "none"), now.get(name, "none")
        if old != new:
            short = max(len(old), len(new)) < 32
            found.append(f"{name} ({old}, now {new})" if short else name)
    return ", ".join(found)
