"""What a command line offers of training, without PyTorch: recipes, and what may stay fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..core.errors import InputError
from ..resources import resource_dir

Freeze = Literal["paper", "as_coded", "none", "trunk"]
"""What a phase keeps fixed, see `recipe.Phase`."""
PHASES = ("distill", "tune", "refine")
"""Phases in the order they run; a recipe has `tune`, and may have the others around it."""


def available_training_recipes() -> list[str]:
    """Stems of all training recipes."""
    return sorted(path.stem for path in (resource_dir("export") / "training").glob("*.toml"))


def find_training_recipe(name: str) -> Path:
    """`export/training/<name>.toml`, or the file `name` if it ends in `.toml`.

    Raises:
        InputError: no such recipe.
    """
    known = available_training_recipes()
    if not name.endswith(".toml") and name not in known:
        raise InputError(
            f"training recipe {name!r}: expected one of {', '.join(known)}, or the path of a .toml "
            "file"
        )
    own = Path(name) if name.endswith(".toml") else None
    path = own or resource_dir("export") / "training" / f"{name}.toml"
    if not path.is_file():
        raise InputError(f"training recipe {path}: no such file")
    return path
