"""Which prompts with points a model's weights understand, and which are answered by a search.

Weights that were trained with boxes answer a point with an empty mask. What is asked of each kind
of prompt is a property of the weights: it is recorded with them, see `PointRules.record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import InputError

How = Literal["native", "search"]
"""The decoder gets the prompt as it is, or boxes that are tried in its place."""
POINTS = "points"
"""Key of the rules among what an export says of its weights."""
PARAMETER = "points_"
"""First part of the rules' parameters in the front model's `config.pbtxt`; the kind follows."""


@dataclass(frozen=True)
class PointRules:
    """How each kind of prompt with points is answered; by default as the decoder does.

    A box alone, a box with points inside the object that it holds, and points outside the object
    without anything else are the decoder's in any case.

    Attributes:
        first: points inside the object, no box.
        past_box: a box, and a point inside the object that lies outside the box.
        in_box: a box, and points outside the object.
    """

    first: How = "native"
    past_box: How = "native"
    in_box: How = "native"

    @property
    def searches(self) -> bool:
        """Whether any kind is searched."""
        return "search" in asdict(self).values()

    def __str__(self) -> str:
        """In words, for a line about the model."""
        found = [_WORDS[name] for name, how in asdict(self).items() if how == "search"]
        return f"boxes are tried for {', '.join(found)}" if found else "taken by the decoder"

    def record(self, because: str, **measured: Any) -> dict[str, Any]:
        """What an export keeps of them.

        Args:
            because: how they were found, in words.
            measured: figures that they were found from.
        """
        return {**asdict(self), "because": because, **measured}


KINDS = tuple(item.name for item in fields(PointRules))
NATIVE = PointRules()
BOX_TRAINED = PointRules("search", "search", "search")
"""Of weights trained with boxes alone (docs/facts.md)."""
SILENT_SERVER = (
    "the server does not say how its weights take points: an older repository leaves them to its "
    "decoder, fill it again"
)
_WORDS = {
    "first": "a point without a box",
    "past_box": "a point past its box",
    "in_box": "a point outside the object",
}
_BY_VARIANT = {
    **dict.fromkeys(("sam_vit_b", "sam_vit_l", "sam_vit_h"), NATIVE),
    **dict.fromkeys(("sam_med2d", "mobile_sam"), NATIVE),
    **{f"efficientvit_sam_{size}": NATIVE for size in ("l0", "l1", "l2", "xl0", "xl1")},
    **dict.fromkeys(
        (*(f"sam2_hiera_{size}" for size in ("tiny", "small", "base_plus", "large")), "medsam2"),
        NATIVE,
    ),
    **dict.fromkeys(("db_sam", "db_sam_4level", "db_sam_plus", "db_sam_tiny"), BOX_TRAINED),
    **dict.fromkeys(("medsam_vit_b", "lite_medsam"), BOX_TRAINED),
}


def rules_of(record: Any) -> PointRules:
    """The rules of a record.

    Raises:
        InputError: one is missing, or is none.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"points: {record!r:.80}, expected the rules of {', '.join(KINDS)}")
    for kind in KINDS:
        if record.get(kind) not in get_args(How):
            raise InputError(
                f"points, {kind}: {record.get(kind)!r:.80}, expected {' or '.join(get_args(How))}"
            )
    return PointRules(**{kind: record[kind] for kind in KINDS})


def record_of(weights: Mapping[str, Any], variant: str, measure: str) -> dict[str, Any]:
    """The record among what an export says of its weights, or what their kind is trained with.

    Args:
        weights: see `artefact.Artefact.weights`.
        variant: of the model.
        measure: what to run where there is none; the record's `note` says so.
    """
    found: dict[str, Any] | None = weights.get(POINTS)
    if found is not None:
        return found
    usual = usual_record(variant, trained=bool(weights.get("trained")))
    note = f"this export does not say how its weights take points, {rules_of(usual)}: {measure}"
    return {**usual, "note": note}


def usual_record(variant: str, *, trained: bool) -> dict[str, Any]:
    """The record of weights on which nothing was measured: what their kind is trained with."""
    if not trained or variant not in _BY_VARIANT:
        return NATIVE.record("these weights are not trained" if not trained else "of no known kind")
    kind = _BY_VARIANT[variant]
    with_what = "boxes" if kind.searches else "boxes and points"
    return kind.record(f"{variant} is trained with {with_what}; not measured on these weights")
