"""Choosing by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .errors import InputError

Entry = TypeVar("Entry")


def choose(what: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` called `name`.

    Raises:
        InputError: there is none; names those that there are.
    """
    if name not in table:
        raise InputError(f"{what} {name!r}: expected one of {', '.join(table)}")
    return table[name]
