"""How near a runtime's masks are to PyTorch's, by the gate of a recipe, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..artefact import Artefact
from ..recipe import Gate
from ..sessions.session import Session
from ..sessions.trial_records import MARGIN
from .cases import Case
from .parity import GateMasks, ask, cosine, dice, prompt_agreement
from .references import AskedOnce

KnownMasks = Sequence[tuple[Case, GateMasks]]
"""The gate's images with PyTorch's masks, see `answers.read_answers`."""
PARTS = {"encoder": "cosine", "decoder": "boxes", "prompt_decoder": "prompts"}
"""Graph → what its figures are of."""
DECODERS = ("decoder", "prompt_decoder")


@dataclass(frozen=True)
class Agreement:
    """How near a runtime's masks are to PyTorch's on the gate's images.

    Attributes:
        missed: graph of `PARTS` → what of it misses the gate; "" if nothing does.
        text: the figures.
        whole: whether every image was compared; else these figures are the best that can be.
    """

    missed: dict[str, str]
    text: str
    whole: bool


class GateTally:
    """Adds up an agreement, and knows before the last image what the others cannot mend.

    Args:
        answers: all images that will be added.
        gate: the recipe's floors, which are raised by `MARGIN`.
    """

    def __init__(self, answers: KnownMasks, gate: Gate) -> None:
        self._cosine_floor, self._mean_floor, self._p5_floor = (
            round(1 - (1 - MARGIN) * (1 - floor), 6)
            for floor in (gate.embedding_cosine, gate.mask_agreement_mean, gate.mask_agreement_p5)
        )
        self._most_dice_drop = gate.dice_drop
        self._values: dict[str, list[float]] = {graph: [] for graph in DECODERS}
        self._drops: list[float] = []
        self._cosines: list[float] = []
        self._left = {
            "decoder": sum(len(want.boxes.masks) for _, want in answers),
            "prompt_decoder": sum(m.shape[0] * m.shape[1] for _, w in answers for m in w.prompted),
        }

    def add(self, case: Case, got: GateMasks, want: GateMasks) -> None:
        """Count an image.

        Args:
            case: the image.
            got: the runtime's masks of it.
            want: PyTorch's.
        """
        self._cosines.append(cosine(got.sample, want.sample))
        found = {
            "decoder": list(map(dice, got.boxes.masks, want.boxes.masks)),
            "prompt_decoder": prompt_agreement(got, want),
        }
        for graph, values in found.items():
            self._values[graph] += values
            self._left[graph] -= len(values)
        self._drops += [
            dice(theirs[0], truth) - dice(ours[0], truth)
            for ours, theirs, truth in zip(
                got.boxes.masks, want.boxes.masks, case.truth, strict=True
            )
        ]

    def missed_encoder(self, near: float) -> str:
        """What of an encoder misses the gate whose cosine with PyTorch's is `near`; "" if not."""
        floor = self._cosine_floor
        return "" if near >= floor else f"{PARTS['encoder']} {near:.5f} (wanted {floor})"

    def agreement(self) -> Agreement:
        """What was found; while images are left, the best that can come of it.

        Every mask of theirs is then taken for one that agrees wholly, so what misses, misses.
        """
        near = min(self._cosines)
        parts = [f"{PARTS['encoder']} {near:.5f}"]
        missed = {"encoder": self.missed_encoder(near)}
        for graph, values in self._values.items():
            left = self._left[graph]
            best = [*values, *[1.0] * left]
            mean, p5 = float(np.mean(best)), float(np.percentile(best, 5))
            parts.append(f"{PARTS[graph]} {'at most ' if left else ''}{mean:.4f} / {p5:.4f}")
            held = mean >= self._mean_floor and p5 >= self._p5_floor
            wanted = f"(wanted {self._mean_floor} / {self._p5_floor})"
            missed[graph] = "" if held else f"{parts[-1]} {wanted}"
        drop, whole = float(np.mean(self._drops)), not any(self._left.values())
        if whole and not drop <= self._most_dice_drop:
            lost = f"Dice drop {drop:.4f} (wanted {self._most_dice_drop})"
            missed["decoder"] = ", ".join(filter(None, [missed["decoder"], lost]))
        return Agreement(missed, ", ".join(parts), whole)


def agreement(
    session: Session,
    artefact: Artefact,
    answers: KnownMasks,
    gate: Gate,
    *,
    enough: Callable[[Agreement], bool] = lambda found: False,
) -> Agreement:
    """Ask a session all that PyTorch was asked, and compare its masks by the recipe's gate.

    Args:
        session: the runtime; an `AskedOnce` may know answers already.
        artefact: what it has opened.
        answers: the images; those with most objects first tell soonest.
        gate: the recipe's floors, which are raised by `MARGIN`.
        enough: asked after each image whether the rest need not be compared any more.
    """
    asked = session if isinstance(session, AskedOnce) else AskedOnce(session)
    tally = GateTally(answers, gate)
    for case, want in answers:
        tally.add(case, ask(asked, artefact.preprocessing, case, want), want)
        asked.forget()
        found = tally.agreement()
        if enough(found):
            break
    return found
