"""A loaded model that gives its memory back while others work, and is loaded again for who asks."""

from __future__ import annotations

from collections.abc import Callable

from ..core.errors import CheckpointError
from . import DbSam
from .weights import LoadedModel


class HeldModel:
    """As `LoadedModel`, with a model that may be put away.

    Args:
        load: loads it, now and whenever it is asked for after it was put away.

    Attributes:
        config: the model's.
        preprocessing: see `LoadedModel`, as the following.
        weights: see there.
    """

    def __init__(self, load: Callable[[], LoadedModel]) -> None:
        found = load()
        self.config = found.model.config
        self.preprocessing, self.weights = found.preprocessing, found.weights
        self._load = load
        self._model: DbSam | None = found.model

    @property
    def model(self) -> DbSam:
        """In evaluation mode.

        Raises:
            CheckpointError: its file has changed since it was first loaded.
        """
        if self._model is None:
            found = self._load()
            if found.weights["sha256"] != self.weights["sha256"]:
                raise CheckpointError(
                    f"{self.weights['source']} has other weights than when this command began: "
                    "leave it alone until the command has ended, and run it again"
                )
            self._model = found.model
        return self._model

    def put_away(self) -> None:
        """Keep the model no longer; what others keep of it stays."""
        self._model = None
