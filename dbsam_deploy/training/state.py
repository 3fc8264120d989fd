"""Resume point of a training: everything that the next step depends on, in one file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..files.atomic import write_atomically
from ..model.checkpoint import read_training_state
from ..model.fitting import StateDict
from .recipe import TrainingRecipe

FORMAT = 3
_MODEL, _BEST, _OPTIMIZER = "model", "best_model", "optimizer"
_MEAN, _START = "mean_model", "start_model"


@dataclass(frozen=True)
class Position:
    """Where a training stands.

    Attributes:
        phase: name of the phase.
        step: steps of it that are done.
        best_dice: best validation Dice of the phase, -1 before the first.
        waited: validations since then.
        losses: loss of every step so far, all phases.
    """

    phase: str
    step: int = 0
    best_dice: float = -1.0
    waited: int = 0
    losses: tuple[float, ...] = field(default=())


@dataclass(frozen=True)
class TrainingState:
    """A resume point.

    Attributes:
        position: see `Position`.
        model: state dict.
        best_model: state dict at `position.best_dice`; empty before the first validation.
        optimizer: the optimiser's state dict; empty at the start of a phase.
        mean_model: running mean of what is trained, float32; empty where the phase keeps none.
        start_model: what is trained as it was before the phase; empty where the phase keeps none.
    """

    position: Position
    model: StateDict
    best_model: StateDict
    optimizer: dict[str, Any]
    mean_model: StateDict = field(default_factory=dict)
    start_model: StateDict = field(default_factory=dict)


def recipe_key(recipe: TrainingRecipe, data: str) -> str:
    """Hash of what a resume point belongs to: the recipe and the description of the data."""
    return hashlib.sha256(f"{recipe!r}\n{data}".encode()).hexdigest()


def save_state(path: Path, key: str, state: TrainingState) -> None:
    """Write a resume point atomically.

    Raises:
        OSError: the disk refuses; an earlier file is as it was.
    """
    body = {
        "format": FORMAT,
        "key": key,
        "position": {**asdict(state.position), "losses": torch.tensor(state.position.losses)},
        _MODEL: state.model,
        _BEST: state.best_model,
        _OPTIMIZER: state.optimizer,
        _MEAN: state.mean_model,
        _START: state.start_model,
    }
    with write_atomically(path) as stream:
        try:
            torch.save(body, stream)
        except RuntimeError as error:  # PyTorch's writer hides what the disk said behind its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path, key: str) -> TrainingState:
    """Read a resume point.

    Raises:
        CheckpointError: unreadable or incomplete, or of another recipe or other data.
    """
    body = read_training_state(path)
    try:
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {body['format']!r}, expected {FORMAT}")
        if body["key"] != key:
            raise CheckpointError(
                f"{path} belongs to another recipe or other data; name another --output, or "
                "delete it to start again"
            )
        position = dict(body["position"])
        position["losses"] = tuple(position["losses"].tolist())
        tables = [dict(body[name]) for name in (_MODEL, _BEST, _MEAN, _START)]
        if not all(isinstance(t, Tensor) for table in tables for t in table.values()):
            raise TypeError("a weight that is no tensor")
        model, best, mean, first = tables
        return TrainingState(Position(**position), model, best, dict(body[_OPTIMIZER]), mean, first)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no complete resume point ({error}); delete it to start again"
        ) from error
