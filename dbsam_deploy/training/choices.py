"""What a command line offers of training, without PyTorch: recipes, and what may stay fixed."""

from __future__ import annotations

from typing import Literal

from ..resources import resource_dir

Freeze = Literal["paper", "as_coded", "none"]
"""What a phase keeps fixed, see `recipe.Phase`."""


def available_training_recipes() -> list[str]:
    """Stems of all training recipes."""
    return sorted(path.stem for path in (resource_dir("export") / "training").glob("*.toml"))
