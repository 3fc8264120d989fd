"""Deployed graphs against the PyTorch reference on real images: figures, then the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ..core.allocation import give_back
from ..core.errors import AccuracyError
from ..core.features import pack
from ..core.graph_imaging import encoder_feed
from ..core.imaging import FloatArray, Preprocessing
from ..core.masks import Prediction
from ..prediction.predictor import Predictor
from ..recipe import Gate
from ..sessions.session import Session
from .cases import Case, deepest_point
from .references import AskedOnce, References

SAMPLED = 16


@dataclass(frozen=True)
class GateMasks:
    """What is made of an image's prompts.

    Attributes:
        boxes: a prediction for each box.
        prompted: masks (N, M, H, W) uint8 of points, then of points, box and earlier mask; of each
            the single mask, then the three alternatives.
        sample: some of the encoder's numbers, see `sample_of`.
    """

    boxes: Prediction
    prompted: list[npt.NDArray[np.uint8]]
    sample: FloatArray


@dataclass(frozen=True)
class GateAnswers(GateMasks):
    """What a session makes of an image and its prompts.

    Attributes:
        outputs: of the encoder.
        predictor: has the image's embedding.
    """

    outputs: dict[str, FloatArray]
    predictor: Predictor


Keep = Callable[[Case, GateMasks], None]


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
    keep: Keep = lambda case, masks: None,
) -> Figures:
    """Run both sessions on every case and measure how far they are apart.

    Args:
        reference: PyTorch, or its kept answers.
        deployed: the artefact's runtime.
        how: preprocessing of both; the reference's images and masks are made on the host.
        cases: real images with boxes and truth.
        progress: called with each case's name once it is done.
        keep: gets each case with the reference's masks.
    """
    ours = AskedOnce(deployed)
    theirs = reference if isinstance(reference, References) else AskedOnce(reference)
    parts = []
    for case in cases:
        parts.append(_compare_case(ours, theirs, how, case, keep))
        ours.forget()
        theirs.forget()
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
        encoder_ms=_median_ms(ours, "encoder"),
        decoder_ms=_median_ms(ours, "decoder"),
        reference_encoder_ms=_median_ms(theirs, "encoder"),
        reference_decoder_ms=_median_ms(theirs, "decoder"),
        backend=deployed.backend,
    )


class Watching(TypedDict, total=False):
    """Who follows a comparison; see `compare`."""

    progress: Callable[[str], None]
    keep: Keep


def compare_apart(
    references: References,
    open_deployed: Callable[[], Session],
    how: Preprocessing,
    cases: list[Case],
    **watching: Unpack[Watching],
) -> Figures:
    """`compare` with one of the two in memory at a time, where PyTorch's answers can be kept.

    Args:
        references: asked first, and released before the other is opened.
        open_deployed: opens the artefact's runtime.
        how: see `compare`, as the following.
        cases: as `how`.
        **watching: as `how`; `progress` is called twice for each case.
    """
    progress = watching.get("progress", lambda text: None)
    for case in cases:
        if references.keeps:
            ask(references, how.on_host, case)
        progress(f"asked PyTorch about {case.name}")
    if references.keeps:
        references.release()
    give_back()  # what the graphs' traces and PyTorch have left
    watching["progress"] = lambda name: progress(f"compared {name}")
    return compare(references, open_deployed(), how, cases, **watching)


def ask(
    session: Session, how: Preprocessing, case: Case, reference: GateMasks | None = None
) -> GateAnswers:
    """A session's answers; its earlier masks are those of the reference, by default its own."""
    outputs = session.run("encoder", encoder_feed(case.image, how))
    predictor = Predictor(session, how)
    predictor.set_embeddings(pack(outputs, how), _size(case))
    boxes = predictor.predict_boxes(case.boxes)
    earlier = (boxes if reference is None else reference.boxes).known_logits()[:, 0]
    centre = (case.boxes[:, :2] + case.boxes[:, 2:]) / 2
    coords = np.stack([centre, case.boxes[:, :2]], axis=1)
    labels = np.tile(np.array([1, 0], np.int32), (len(coords), 1))
    prompted = [
        predictor.predict_prompts(
            boxes=boxes_of,
            point_coords=coords,
            point_labels=labels,
            mask_input=mask,
            multimask=multimask,
        ).masks
        for boxes_of, mask in ((None, None), (case.boxes, earlier))
        for multimask in (False, True)
    ]
    return GateAnswers(boxes, prompted, sample_of(outputs), outputs, predictor)


def sample_of(outputs: Mapping[str, FloatArray]) -> FloatArray:
    """Every `SAMPLED`th number of an encoder's outputs in half precision, which tells a cosine."""
    return np.concatenate([v.ravel()[::SAMPLED] for v in outputs.values()]).astype(np.float16)


def _compare_case(
    ours: AskedOnce,
    theirs: AskedOnce | References,
    how: Preprocessing,
    case: Case,
    keep: Keep,
) -> _CaseFigures:
    want = ask(theirs, how.on_host, case)
    keep(case, want)
    got = ask(ours, how, case, want)
    alone = Predictor(ours.session, how)
    alone.set_embeddings(pack(want.outputs, how), _size(case))
    logits = alone.predict_boxes(case.boxes).known_logits()
    places = np.array([deepest_point(mask) for mask in case.truth])
    marks = np.ones((len(places), 1), np.int32)
    pointed = got.predictor.predict_prompts(point_coords=places[:, None], point_labels=marks)
    return _CaseFigures(
        embedding_cosine=min(
            cosine(got.outputs[name], want.outputs[name]) for name in want.outputs
        ),
        decoder_cosines=list(map(cosine, logits, want.boxes.known_logits())),
        agreement=list(map(dice, got.boxes.masks, want.boxes.masks)),
        prompted=prompt_agreement(got, want),
        dice=list(map(dice, got.boxes.masks[:, 0], case.truth)),
        dice_reference=list(map(dice, want.boxes.masks[:, 0], case.truth)),
        point_dice=list(map(dice, pointed.masks[:, 0], case.truth)),
        points_obeyed=[
            float(mask[int(y), int(x)])
            for mask, (x, y) in zip(pointed.masks[:, 0], places, strict=True)
        ],
        empty_masks=sum(not mask.any() for mask in want.boxes.masks),
    )


def prompt_agreement(got: GateMasks, want: GateMasks) -> list[float]:
    """Dice of all masks that were prompted."""
    pairs = zip(got.prompted, want.prompted, strict=True)
    return [dice(a[i], b[i]) for a, b in pairs for i in np.ndindex(*a.shape[:2])]


def _size(case: Case) -> tuple[int, int]:
    return case.image.shape[0], case.image.shape[1]


def _median_ms(session: AskedOnce | References, graph: str) -> float:
    return float(np.median(session.seconds[graph]) * 1000)


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
