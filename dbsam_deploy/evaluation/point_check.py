"""Points as a model's decoder answers them against boxes that are tried, on labelled images.

Each object gives three prompts, from its truth: a click in its middle; a box that misses a third
of it, with a click on what it misses; a box that is a third too large, with a click on what its
mask has too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import is_constant
from ..core.masks import mask_box
from ..core.points import BOX_TRAINED, KINDS, PointRules
from ..datasets.cases import CaseFile, LabelledCase, read_case
from ..prediction.predictor import Predictor
from ..verification.cases import deepest_point
from ..verification.parity import dice

LEAST_IMAGES, LEAST_OBJECTS = 4, 8
"""Fewer decide nothing."""
LEAST_GAIN = 0.02
"""Of mean Dice, for which it is worth to decode several boxes in place of one prompt."""
MOST_OF_AN_IMAGE = 3
_LEAST_PIXELS = 100
_OFF = 0.35
"""Of its size, by which a box misses an object or is too large."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """Mean Dice with the truth, and the share of masks that obey the click."""

    dice: float
    obeyed: float


@dataclass(frozen=True)
class KindFigures:
    """One kind of prompt.

    Attributes:
        objects: prompts of this kind.
        native: the decoder's own answers.
        search: the best of several boxes.
        without: the answers without the click: of the box alone; None where there is no box.
    """

    objects: int
    native: Answers
    search: Answers
    without: float | None

    @property
    def is_decided(self) -> bool:
        """Whether there are enough objects."""
        return self.objects >= LEAST_OBJECTS

    @property
    def needs_search(self) -> bool:
        """Whether boxes are to be tried."""
        return self.search.dice >= self.native.dice + LEAST_GAIN


@dataclass(frozen=True)
class PointFigures:
    """What was measured.

    Attributes:
        images: how many.
        kinds: of `core.points.KINDS` those that came up.
        tight: mean Dice of the objects' own boxes, which is what a box gives.
    """

    images: int
    kinds: dict[str, KindFigures]
    tight: float

    def record(self, before: PointRules) -> dict[str, Any]:
        """What an export keeps; kinds that are not decided stay as they were.

        Raises:
            InputError: too few images or objects for a decision.
        """
        first = self.kinds.get("first")
        if self.images < LEAST_IMAGES or first is None or not first.is_decided:
            raise InputError(
                f"{self.images} images with {0 if first is None else first.objects} objects decide "
                f"nothing: expected at least {LEAST_IMAGES} with {LEAST_OBJECTS}"
            )
        rules = {
            kind: "search" if figures.needs_search else "native"
            for kind, figures in self.kinds.items()
            if figures.is_decided
        }
        return PointRules(**{**asdict(before), **rules}).record(
            f"measured on {first.objects} objects of {self.images} images",
            measured={kind: asdict(figures) for kind, figures in self.kinds.items()},
        )


@dataclass(frozen=True)
class _Outcome:
    """Dice and obedience of one prompt: native, by search, and Dice without the click."""

    native: tuple[float, bool]
    search: tuple[float, bool]
    without: float | None


def check_points(
    predictor: Predictor,
    files: Sequence[CaseFile],
    *,
    most_objects: int,
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> PointFigures:
    """Measure all kinds of prompts with points.

    Args:
        predictor: a model in this process, with any rules.
        files: where objects are taken from, evenly.
        most_objects: to measure at most.
        progress: called with the number of files done and the present one's name.

    Raises:
        InputError: a file that cannot be read.
    """
    asked = Predictor(predictor.session, predictor.preprocessing, points=BOX_TRAINED)
    found: dict[str, list[_Outcome]] = {kind: [] for kind in KINDS}
    tight, images = list[float](), 0
    chosen = _spread(files, most_objects)
    for done, file in enumerate(chosen):
        progress(done, file.name)
        room = min(MOST_OF_AN_IMAGE, -(-(most_objects - len(tight)) // (len(chosen) - done)))
        objects = _objects(read_case(file), room)
        images += objects is not None
        for number, truth in enumerate([] if objects is None else objects[1]):
            if number == 0 and objects is not None:
                asked.set_image(objects[0])
            tight.append(dice(asked.predict_boxes(mask_box(truth)[None]).masks[0, 0], truth))
            for kind, outcome in _outcomes(asked, truth, side=len(tight) % 4):
                found[kind].append(outcome)
    kinds = {kind: _figures(outcomes) for kind, outcomes in found.items() if outcomes}
    return PointFigures(images, kinds, float(np.mean(tight)) if tight else float("nan"))


def _spread(files: Sequence[CaseFile], most: int) -> list[CaseFile]:
    count = min(len(files), most)
    return [files[i * len(files) // count] for i in range(count)]


def _objects(case: LabelledCase, most: int) -> tuple[npt.NDArray[Any], list[Mask]] | None:
    """The slice with most of all objects, RGB, and its largest objects; None without one."""
    filled = (case.labels != 0).sum((1, 2))
    index = int(np.argmax(filled))
    image, labels = case.volume.slice_rgb(index), case.labels[index]
    masks = [labels == label for label in case.present(index)]
    masks = sorted((m for m in masks if m.sum() >= _LEAST_PIXELS), key=np.sum, reverse=True)
    if not masks or is_constant(image.reshape(-1, 3)):
        return None
    return image, masks[:most]


def _outcomes(predictor: Predictor, truth: Mask, side: int) -> Iterator[tuple[str, _Outcome]]:
    """The prompts of one object; `side` is where its box is wrong: left, top, right or bottom."""
    yield "first", _asked(predictor, truth, None, deepest_point(truth), is_inside=True)
    for kind, box in (
        ("past_box", _moved(truth, side, -_OFF)),
        ("in_box", _moved(truth, side, _OFF)),
    ):
        alone = predictor.predict_boxes(box[None]).masks[0, 0] != 0
        rows, columns = np.ogrid[: truth.shape[0], : truth.shape[1]]
        held = (columns >= box[0]) & (columns < box[2]) & (rows >= box[1]) & (rows < box[3])
        wrong = truth & ~held & ~alone if kind == "past_box" else alone & ~truth
        if wrong.any():
            place = deepest_point(wrong)
            outcome = _asked(predictor, truth, box, place, is_inside=kind == "past_box")
            yield kind, _Outcome(outcome.native, outcome.search, dice(alone, truth))


def _moved(truth: Mask, side: int, part: float) -> npt.NDArray[np.float64]:
    """The object's box with one side moved outwards by a part of its size, or inwards."""
    box, (height, width) = mask_box(truth), truth.shape
    step = part * (box[2] - box[0], box[3] - box[1])[side % 2]
    box[side] += step if side >= 2 else -step
    return np.clip(np.round(box), 0, (width, height, width, height))


def _asked(
    predictor: Predictor,
    truth: Mask,
    box: npt.NDArray[np.float64] | None,
    place: npt.NDArray[np.float32],
    *,
    is_inside: bool,
) -> _Outcome:
    answers = []
    for adapt in (False, True):
        found = predictor.predict_prompts(
            boxes=None if box is None else box[None],
            point_coords=place[None, None],
            point_labels=np.array([[int(is_inside)]], np.int32),
            adapt_points=adapt,
        ).masks[0, 0]
        obeys = bool(found[int(place[1]), int(place[0])]) == is_inside
        answers.append((dice(found, truth), obeys))
    return _Outcome(answers[0], answers[1], None)


def _figures(outcomes: list[_Outcome]) -> KindFigures:
    native, search = (
        Answers(*(float(np.mean(column)) for column in zip(*pairs, strict=True)))
        for pairs in ([one.native for one in outcomes], [one.search for one in outcomes])
    )
    without = [one.without for one in outcomes if one.without is not None]
    return KindFigures(len(outcomes), native, search, float(np.mean(without)) if without else None)
