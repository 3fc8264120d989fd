"""Figures on real images, and a gate that really closes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from dbsam_deploy.core.errors import AccuracyError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import Gate, Parity, load_recipe
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification import parity, references
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.parity import check_gate, compare, cosine, dice, misses

PARITY = Parity(images=3, boxes_per_image=2, box_jitter_px=20, min_object_px=16)
GATE = load_recipe("fp16").gate


class Noisy:
    """A session whose outputs are off by a fraction of their spread."""

    backend = "noisy"

    def __init__(self, session, graph: str, noise: float) -> None:
        self.session, self.graph, self.noise = session, graph, noise

    def run(self, graph, feed):
        out = self.session.run(graph, feed)
        if graph == self.graph:
            rng = np.random.default_rng(0)
            for name, value in out.items():
                off = rng.standard_normal(value.shape) * value.std() * self.noise
                out[name] = (value + off).astype(np.float32)
        return out


@pytest.fixture(scope="module")
def reference() -> PytorchSession:
    model = load_model(image_size=64).model
    with torch.no_grad():  # blobs instead of empty masks: a small bias towards the foreground
        model.mask_decoder.output_upscaling[3].bias.add_(0.05)
    return PytorchSession(model)


@pytest.fixture(scope="module")
def cases():
    return load_cases(bundled_examples(), PARITY)


@pytest.fixture(scope="module")
def good(reference, cases):
    """Figures that pass."""
    return run(reference, cases[:1], reference)


def run(reference, cases, deployed):
    return compare(reference, deployed, Preprocessing(64), cases)


def test_a_session_agrees_with_itself(reference, cases):
    seen = []
    figures = compare(reference, reference, Preprocessing(64), cases, progress=seen.append)
    assert seen == [case.name for case in cases]
    assert figures.images == 3
    assert figures.objects == sum(len(case.boxes) for case in cases)
    assert figures.embedding_cosine == pytest.approx(1, abs=1e-9)
    assert figures.mask_agreement_mean == figures.mask_agreement_p5 == 1
    assert figures.prompt_agreement_mean == 1
    assert figures.dice == figures.dice_reference
    check_gate(figures, load_recipe("fp32").gate, "itself")


@pytest.mark.parametrize(
    ("graph", "missed"),
    [
        ("encoder", "embedding cosine"),
        ("decoder", "decoder cosine"),
        ("prompt_decoder", "prompt agreement"),
    ],
)
def test_a_broken_graph_misses_the_gate_with_its_figures(reference, cases, graph, missed):
    figures = run(reference, cases, Noisy(reference, graph, 0.5))
    with pytest.raises(AccuracyError, match=rf"{missed}.*0\.\d+ < .*Nothing was published"):
        check_gate(figures, GATE, "noisy")


def test_small_noise_passes_fp16_and_not_fp32(reference, cases):
    figures = run(reference, cases, Noisy(reference, "encoder", 0.01))
    assert 0.999 < figures.embedding_cosine < 0.99999
    with pytest.raises(AccuracyError, match="embedding cosine"):
        check_gate(figures, load_recipe("fp32").gate, "noisy")


@pytest.mark.parametrize(
    "change",
    [
        {"embedding_cosine": float("nan")},
        {"mask_agreement_mean": 0.9799},
        {"mask_agreement_p5": 0.9499},
        {"prompt_agreement_mean": 0.9799},
        {"prompt_agreement_p5": 0.9499},
        {"decoder_cosine": 0.9989},
        {"dice_reference": float("nan")},
        {"dice": 0.5, "dice_reference": 0.5021},
        {"dice": float("nan")},
    ],
)
def test_each_figure_can_close_the_gate(good, change):
    check_gate(good, GATE, "unchanged")
    with pytest.raises(AccuracyError, match="changed misses its gate on 1 images, "):
        check_gate(replace(good, **change), GATE, "changed")


FLOORS = Gate(embedding_cosine=0.9, mask_agreement_mean=0.8, mask_agreement_p5=0.5, dice_drop=0.125)
FLOOR_OF = {
    "embedding_cosine": 0.9,
    "decoder_cosine": 0.9,
    "mask_agreement_mean": 0.8,
    "mask_agreement_p5": 0.5,
    "prompt_agreement_mean": 0.8,
    "prompt_agreement_p5": 0.5,
}
"""Figure → its floor in FLOORS."""


def test_each_figure_has_a_floor_of_its_own(good):
    """Means lie far above fifth percentiles, so one held against the other's floor shows here."""
    at_the_floor = replace(good, dice=0.5, dice_reference=0.625, **FLOOR_OF)
    assert misses(at_the_floor, FLOORS) == []
    for name, floor in FLOOR_OF.items():
        below = replace(at_the_floor, **{name: floor - 0.01})
        label = name.replace("_", " ")
        assert misses(below, FLOORS) == [f"{label} {floor - 0.01:.6f} < {floor}"]
    assert misses(replace(at_the_floor, dice=0.4375), FLOORS) == ["Dice drop 0.1875 > 0.125"]


class Painted:
    """A session without a model: all is foreground, but for the mask tokens that are given.

    Args:
        rows: mask token → the share of rows, from the top, that are foreground.
    """

    backend = "painted"

    def __init__(self, rows: dict[int, float]) -> None:
        self.rows, self.prompted = rows, []

    def run(self, graph, feed):
        if graph == "encoder":
            return {"image_embeddings": np.ones((1, 256, 4, 4), np.float32)}
        boxes = graph == "decoder"
        count = feed["boxes" if boxes else "point_labels"].shape[1]
        logits = np.ones((1, count, 1 if boxes else 4, 16, 16), np.float32)
        if not boxes:
            self.prompted.append(feed)
            for token, share in self.rows.items():
                logits[:, :, token, int(share * 16) :] = -1
        return {"low_res_masks": logits, "iou_predictions": logits[..., 0, 0]}


def test_every_mask_token_is_compared_for_points_and_for_all_prompts_together(cases):
    case = next(case for case in cases if case.image.shape[0] == case.image.shape[1])
    deployed = Painted({2: 0.5, 3: 0})
    figures = run(Painted({}), [case], deployed)
    half = pytest.approx(2 / 3, abs=0.02)  # Dice of the upper half with the whole
    assert figures.mask_agreement_mean == figures.embedding_cosine == 1
    # Token 0 as the single mask, then tokens 1 to 3: 1, then 1, 2/3 and 0.
    assert figures.prompt_agreement_mean * 4 - 2 == half
    assert figures.prompt_agreement_p5 == 0
    *prompted, alone = deployed.prompted  # the last is for the figures of points
    labels = [feed["point_labels"][0].tolist() for feed in prompted]
    objects = len(case.boxes)
    assert alone["point_labels"][0].tolist() == [[1, -1]] * objects
    assert figures.points_obeyed == 1
    assert labels == [[[1, 0, -1]] * objects, [[1, 0, 2, 3]] * objects]  # each asked once
    for feed, earlier in zip(prompted, (0, 1), strict=True):
        assert (feed["has_mask_input"] == earlier).all()
        assert (feed["mask_input"] == earlier).all()
        scale = 64 / case.image.shape[0]
        corner = case.boxes[:, :2]
        centre = corner + (case.boxes[:, 2:] - corner) / 2
        np.testing.assert_allclose(feed["point_coords"][0, :, 0], centre * scale, rtol=1e-5)
        np.testing.assert_allclose(feed["point_coords"][0, :, 1], corner * scale, rtol=1e-5)


def test_percentiles_are_the_fifth_and_means_are_means(reference, cases, monkeypatch):
    """Of 20 prompted masks and more, one in ten is lost: the mean hardly moves, p5 falls to 0."""
    values = iter([0.0] + [1.0] * 9)
    endless = itertools.cycle(values)
    monkeypatch.setattr(parity, "prompt_agreement", lambda *_: [next(endless) for _ in range(20)])
    figures = run(reference, cases, reference)
    assert figures.prompt_agreement_mean == pytest.approx(0.9)
    assert figures.prompt_agreement_p5 == 0
    assert figures.mask_agreement_p5 == 1
    assert misses(figures, replace(FLOORS, mask_agreement_mean=0.9 - 1e-9)) == [
        "prompt agreement p5 0.000000 < 0.5"
    ]


class Ticking:
    """A session on whose clock each call takes as long as is said here, in seconds."""

    backend = "ticking"

    def __init__(self, session, clock: list[float], seconds: dict[str, list[float]]) -> None:
        self.session, self.clock = session, clock
        self.seconds = {graph: itertools.cycle(values) for graph, values in seconds.items()}

    def run(self, graph, feed):
        self.clock[0] += next(self.seconds[graph])
        return self.session.run(graph, feed)


def test_latencies_are_medians_in_ms_of_each_side(reference, cases, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(references.time, "perf_counter", lambda: clock[0])
    others = {"prompt_decoder": [9.0]}
    ours = Ticking(reference, clock, {"encoder": [1, 2, 9], "decoder": [3], **others})
    theirs = Ticking(reference, clock, {"encoder": [4, 5, 90], "decoder": [6], **others})
    figures = compare(theirs, ours, Preprocessing(64), cases)
    assert (figures.encoder_ms, figures.decoder_ms) == pytest.approx((2000, 3000))
    assert figures.reference_encoder_ms == pytest.approx(5000)
    assert figures.reference_decoder_ms == pytest.approx(6000)
    assert figures.backend == "ticking"


def test_empty_reference_masks_are_counted(reference, cases):
    figures = run(reference, cases, reference)
    assert figures.empty_masks < figures.objects
    model = load_model(image_size=64).model
    with torch.no_grad():  # GELU makes zeros of this, and no logit lies above zero
        model.mask_decoder.output_upscaling[3].bias.sub_(100)
    empty = PytorchSession(model)
    figures = run(empty, cases, reference)
    assert figures.empty_masks == figures.objects > 0
    assert figures.mask_agreement_mean < 1  # it is the reference whose masks are counted


def test_dice_and_cosine():
    a, b = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    assert dice(a, b) == 1
    a[0, :2] = True
    assert dice(a, b) == 0
    b[0, 1:] = True
    assert dice(a, b) == 0.5
    x = np.random.default_rng().standard_normal(50).astype(np.float32)
    assert cosine(x, 3 * x) == pytest.approx(1)
    assert cosine(x, -x) == pytest.approx(-1)
    assert cosine(x, np.full(50, np.nan, np.float32)) == 0
    assert cosine(x, 0 * x) == 0
