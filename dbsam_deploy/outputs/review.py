"""Objects that a reader should look at first: those of whose masks the model is least sure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .object_statistics import mean_confidence
from .segmentation import Segmentation

NAMED = 5
"""Objects that a line names; the others are counted."""


@dataclass(frozen=True)
class Doubt:
    """An object that is flagged for review.

    Attributes:
        name: what the user calls it.
        confidence: mean predicted IoU of the slices on which it was decoded; None for none.
    """

    name: str
    confidence: float | None

    def __str__(self) -> str:
        sure = "not decoded" if self.confidence is None else f"{self.confidence:.2f}"
        return f"{self.name} ({sure})"


def add_review_option(parser: argparse._ActionsContainer) -> None:
    """`--min-confidence`; None without it."""
    parser.add_argument(
        "--min-confidence",
        type=_share,
        metavar="X",
        help="flag objects with a predicted IoU below X (0 to 1) for review; they are kept. What X "
        "does on your data, `dbsam evaluate --data DIR` says",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return value


def is_doubtful(confidence: float | None, least: float | None) -> bool:
    """Whether an object is flagged; one that was not decoded always is, where anything is."""
    return least is not None and (confidence is None or confidence < least)


def doubts(segmentation: Segmentation, least: float | None) -> list[Doubt]:
    """The flagged objects of a segmentation, the least sure first."""
    found = [
        Doubt(one.name, float(mean) if known else None)
        for one, mean, known in zip(
            segmentation.objects, mean_confidence(segmentation), segmentation.decoded, strict=True
        )
    ]
    return sorted(
        (one for one in found if is_doubtful(one.confidence, least)),
        key=lambda one: -1.0 if one.confidence is None else one.confidence,
    )


def review_line(segmentation: Segmentation, least: float | None) -> str:
    """Which objects to look at, in one line; empty where nothing was asked for."""
    if least is None:
        return ""
    names, count = list(map(str, doubts(segmentation, least))), len(segmentation.objects)
    if not names:
        return f"for review: none of {count} has a predicted IoU below {least:g}"
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"for review: {len(names)} of {count} have a predicted IoU below {least:g}: "
        f"{', '.join(names[:NAMED])}{more}"
    )
