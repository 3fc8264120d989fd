"""Deployed graphs against the PyTorch reference on real images: figures, then the gate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import IMAGE
from ..core.errors import AccuracyError
from ..core.features import pack
from ..core.imaging import FloatArray, Preprocessing, preprocess
from ..prediction.predictor import Predictor
from ..recipe import Gate
from ..sessions.session import Feed, Session
from .cases import Case, deepest_point


@dataclass(frozen=True)
class Figures:
    """What was measured; latencies are medians over the images on this machine.

    Attributes:
        images: images compared.
        objects: boxes compared.
        empty_masks: boxes for which the reference's mask is empty; their agreement says little.
        embedding_cosine: smallest cosine of an output of the encoder with the reference.
        decoder_cosine: smallest cosine of a box's logits, both decoders on the reference embedding;
            unlike mask agreement it says something even where every mask is empty.
        mask_agreement_mean: mean Dice of deployed and reference masks, one per box.
        mask_agreement_p5: 5th percentile of the same.
        prompt_agreement_mean: mean Dice for point + box + mask prompts, all four mask tokens.
        prompt_agreement_p5: 5th percentile of the same.
        dice: mean Dice of the deployed masks with the ground truth.
        dice_reference: the same for the reference.
        point_dice: mean Dice of the deployed masks with the ground truth where each object is
            prompted by its deepest pixel alone, as the decoder answers.
        points_obeyed: share of these masks that hold that pixel.
        encoder_ms: deployed encoder, batch 1.
        decoder_ms: deployed decoder, all boxes of an image.
        reference_encoder_ms: the reference's encoder, batch 1.
        reference_decoder_ms: the reference's decoder, all boxes of an image.
        backend: runtime of the deployed graphs.
    """

    images: int
    objects: int
    empty_masks: int
    embedding_cosine: float
    decoder_cosine: float
    mask_agreement_mean: float
    mask_agreement_p5: float
    prompt_agreement_mean: float
    prompt_agreement_p5: float
    dice: float
    dice_reference: float
    point_dice: float
    points_obeyed: float
    encoder_ms: float
    decoder_ms: float
    reference_encoder_ms: float
    reference_decoder_ms: float
    backend: str

    @property
    def dice_drop(self) -> float:
        """Loss of mean Dice against the ground truth."""
        return self.dice_reference - self.dice

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {**asdict(self), "dice_drop": self.dice_drop}


class _Timed:
    """A session that remembers how long each graph took."""

    def __init__(self, session: Session) -> None:
        self.session, self.backend = session, session.backend
        self.seconds: dict[str, list[float]] = {}

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        start = time.perf_counter()
        out = self.session.run(graph, feed)
        self.seconds.setdefault(graph, []).append(time.perf_counter() - start)
        return out

    def median_ms(self, graph: str) -> float:
        return float(np.median(self.seconds[graph]) * 1000)


def dice(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Dice of two binary masks of one shape; 1 if both are empty."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2 * int(np.count_nonzero(np.logical_and(a, b))) / total if total else 1.0


def cosine(a: FloatArray, b: FloatArray) -> float:
    """Cosine of two arrays as vectors, in float64; 0 if one is zero or not finite."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if np.isfinite(norm) and norm > 0 else 0.0


@dataclass(frozen=True)
class _CaseFigures:
    """Figures of one image; lists hold one value a box, `prompted` several."""

    embedding_cosine: float
    decoder_cosines: list[float]
    agreement: list[float]
    prompted: list[float]
    dice: list[float]
    dice_reference: list[float]
    point_dice: list[float]
    points_obeyed: list[float]
    empty_masks: int


def compare(
    reference: Session,
    deployed: Session,
    how: Preprocessing,
    cases: list[Case],
    *,
    progress: Callable[[str], None] = lambda name: None,
) -> Figures:
    """Run both sessions on every case and measure how far they are apart.

    Args:
        reference: PyTorch.
        deployed: the artefact's runtime.
        how: preprocessing of both.
        cases: real images with boxes and truth.
        progress: called with each case's name once it is done.
    """
    ours, theirs = _Timed(deployed), _Timed(reference)
    parts = []
    for case in cases:
        parts.append(_compare_case(ours, theirs, how, case))
        progress(case.name)
    agreement = [x for part in parts for x in part.agreement]
    prompted = [x for part in parts for x in part.prompted]
    return Figures(
        images=len(cases),
        objects=len(agreement),
        empty_masks=sum(part.empty_masks for part in parts),
        embedding_cosine=min(part.embedding_cosine for part in parts),
        decoder_cosine=min(x for part in parts for x in part.decoder_cosines),
        mask_agreement_mean=float(np.mean(agreement)),
        mask_agreement_p5=float(np.percentile(agreement, 5)),
        prompt_agreement_mean=float(np.mean(prompted)),
        prompt_agreement_p5=float(np.percentile(prompted, 5)),
        dice=float(np.mean([x for part in parts for x in part.dice])),
        dice_reference=float(np.mean([x for part in parts for x in part.dice_reference])),
        point_dice=float(np.mean([x for part in parts for x in part.point_dice])),
        points_obeyed=float(np.mean([x for part in parts for x in part.points_obeyed])),
        encoder_ms=ours.median_ms("encoder"),
        decoder_ms=ours.median_ms("decoder"),
        reference_encoder_ms=theirs.median_ms("encoder"),
        reference_decoder_ms=theirs.median_ms("decoder"),
        backend=deployed.backend,
    )


def _compare_case(ours: _Timed, theirs: _Timed, how: Preprocessing, case: Case) -> _CaseFigures:
    feed: Feed = {IMAGE: preprocess(case.image, how)}
    size = (case.image.shape[0], case.image.shape[1])
    outputs = [s.run("encoder", feed) for s in (ours, theirs)]
    embeddings = [pack(found, how) for found in outputs]
    predictors = [Predictor(session, how) for session in (ours, theirs)]
    for predictor, embedding in zip(predictors, embeddings, strict=True):
        predictor.set_embeddings(embedding, size)
    got, want = (predictor.predict_boxes(case.boxes) for predictor in predictors)
    alone = Predictor(ours.session, how)
    alone.set_embeddings(embeddings[1], size)
    logits = alone.predict_boxes(case.boxes).known_logits()
    places = np.array([deepest_point(mask) for mask in case.truth])
    marks = np.ones((len(places), 1), np.int32)
    pointed = predictors[0].predict_prompts(point_coords=places[:, None], point_labels=marks)
    return _CaseFigures(
        embedding_cosine=min(cosine(outputs[0][name], outputs[1][name]) for name in outputs[1]),
        decoder_cosines=list(map(cosine, logits, want.known_logits())),
        agreement=list(map(dice, got.masks, want.masks)),
        prompted=_prompt_agreement(predictors, case, want.known_logits()[:, 0]),
        dice=list(map(dice, got.masks[:, 0], case.truth)),
        dice_reference=list(map(dice, want.masks[:, 0], case.truth)),
        point_dice=list(map(dice, pointed.masks[:, 0], case.truth)),
        points_obeyed=[
            float(mask[int(y), int(x)])
            for mask, (x, y) in zip(pointed.masks[:, 0], places, strict=True)
        ],
        empty_masks=sum(not mask.any() for mask in want.masks),
    )


def _prompt_agreement(
    predictors: list[Predictor], case: Case, low_res_masks: FloatArray
) -> list[float]:
    """Dice of all mask tokens, prompted by two points, then by points, box and earlier mask."""
    centre = (case.boxes[:, :2] + case.boxes[:, 2:]) / 2
    coords = np.stack([centre, case.boxes[:, :2]], axis=1)
    labels = np.tile(np.array([1, 0], np.int32), (len(coords), 1))
    out: list[float] = []
    for boxes, earlier in ((None, None), (case.boxes, low_res_masks)):
        for multimask in (False, True):
            a, b = (
                predictor.predict_prompts(
                    boxes=boxes,
                    point_coords=coords,
                    point_labels=labels,
                    mask_input=earlier,
                    multimask=multimask,
                ).masks
                for predictor in predictors
            )
            out += [dice(a[i], b[i]) for i in np.ndindex(*a.shape[:2])]
    return out


def misses(figures: Figures, gate: Gate) -> list[str]:
    """Every figure that misses the gate, beside its floor; [] if none does."""
    floors = (
        ("embedding cosine", figures.embedding_cosine, gate.embedding_cosine),
        ("decoder cosine", figures.decoder_cosine, gate.embedding_cosine),
        ("mask agreement mean", figures.mask_agreement_mean, gate.mask_agreement_mean),
        ("mask agreement p5", figures.mask_agreement_p5, gate.mask_agreement_p5),
        ("prompt agreement mean", figures.prompt_agreement_mean, gate.mask_agreement_mean),
        ("prompt agreement p5", figures.prompt_agreement_p5, gate.mask_agreement_p5),
    )
    # `not >=` so that a NaN misses as well
    missed = [f"{n} {value:.6f} < {floor}" for n, value, floor in floors if not value >= floor]
    if not figures.dice_drop <= gate.dice_drop:
        missed.append(f"Dice drop {figures.dice_drop:.4f} > {gate.dice_drop}")
    return missed


def check_gate(figures: Figures, gate: Gate, what: str) -> None:
    """Compare figures with the recipe's gate.

    Args:
        figures: measured by `compare`.
        gate: the recipe's floor.
        what: the artefact, for the message.

    Raises:
        AccuracyError: with every figure that misses, see `misses`.
    """
    if missed := misses(figures, gate):
        raise AccuracyError(
            f"{what} misses its gate on {figures.images} images, {figures.objects} objects: "
            f"{'; '.join(missed)}. Nothing was published."
        )
