"""Which weights a command line or a program means, said once for all that build a model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

WEIGHTS_KINDS = ("model", "ema")
"""Weights that a checkpoint may have twice: as they are, and as a moving average."""


@dataclass(frozen=True, kw_only=True)
class WeightsChoice:
    """Weights of a model; None where nothing is said, see `model.weights.load_model`.

    Attributes:
        checkpoint: weights file, None for those that `load_model` has for the variant.
        decoder_weights: prompt encoder and mask decoder for a fresh encoder, without a checkpoint.
        weights: `model` or `ema`, of a checkpoint with both.
        weights_key: name of the model, of a checkpoint with several.
        adapter: LoRA that is merged into the checkpoint.
    """

    checkpoint: Path | None = None
    decoder_weights: Path | None = None
    weights: str | None = None
    weights_key: str | None = None
    adapter: Path | None = None

    @classmethod
    def of(cls, options: object) -> Self:
        """The choice alone, out of a command's options or its parsed words: `load_model` takes it.

        Args:
            options: has attributes of these names; what it lacks was not said.
        """
        return cls(**{name: getattr(options, name, None) for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of what is chosen."""
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True, kw_only=True)
class ModelChoice(WeightsChoice):
    """Weights, and the model that they are built into.

    Attributes:
        variant: model variant, None to take the checkpoint's.
        image_size: side S of the model frame in pixels, None for the variant's own.
    """

    variant: str | None = None
    image_size: int | None = None


def add_weights_choice(
    parser: argparse._ActionsContainer, checkpoint: str = "", decoder_weights: str = ""
) -> None:
    """The options of a `WeightsChoice`.

    Args:
        parser: gets them.
        checkpoint: help of `--checkpoint`; without it the command names its file otherwise.
        decoder_weights: help of `--decoder-weights`; without it there is no such option.
    """
    for name, text in (("--checkpoint", checkpoint), ("--decoder-weights", decoder_weights)):
        if text:
            parser.add_argument(name, type=Path, help=text)
    parser.add_argument(
        "--weights",
        choices=WEIGHTS_KINDS,
        help="of a checkpoint with both: the weights themselves or their moving average; default: "
        "what its writer would load",
    )
    parser.add_argument(
        "--key",
        dest="weights_key",
        metavar="NAME",
        help="of a checkpoint with several models: the one below this name, as "
        "`python -m dbsam_deploy.inspect_file FILE` shows them",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="PATH",
        help="a LoRA to merge into the checkpoint: a file of SAMed, or a folder of peft",
    )
