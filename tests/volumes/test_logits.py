"""Logits within a budget of bytes: what was dropped is asked again, and nothing depends on it."""

from __future__ import annotations

import numpy as np
import pytest
from support.wedge import BOX, SHAPE, WIDE, scan, wedge

from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.array_store import ArrayStore
from dbsam_deploy.volumes.label_map import AboutModel
from dbsam_deploy.volumes.logits import LogitsStore
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.study import segment_study
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

OBJECTS = 6
LOOSE = {"min_overlap": 0.0, "min_iou_ratio": 0.0, "min_brightness_match": 0.0, "reach": 1}


@pytest.fixture(scope="module")
def predictor(tiny_artefact) -> Predictor:
    return Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)


@pytest.fixture(scope="module")
def expected(predictor) -> dict[tuple[int, int], np.ndarray]:
    return fractions_of(prompted(predictor, (1 << 30, 0)).segmentation())


def boxes() -> list[list[float]]:
    return [[1.5 * n, n, 1.5 * n + 20, n + 15] for n in range(OBJECTS)]


def prompted(predictor: Predictor, logits_bytes: tuple[int, int]) -> VolumePredictor:
    """A session on noise with many objects, of boxes, points and earlier masks."""
    pixels = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
    session = VolumePredictor(
        predictor, as_volume(pixels), encode_ahead=False, logits_bytes=logits_bytes
    )
    prompts = [(n, {"box": box, "index": 5}) for n, box in enumerate(boxes(), 1)]
    prompts += [(n, {"box": box, "index": 7}) for n, box in enumerate(boxes()[:3], 1)]
    side = predictor.preprocessing.mask_side
    earlier = np.random.default_rng(1).normal(0, 4, (side, side)).astype(np.float32)
    session.prompt_many([*prompts, (20, {"points": [9, 9], "index": 5})])
    session.prompt(21, box=BOX, points=[[20, 15]], mask_input=earlier, index=5)
    session.propagate(list(range(1, OBJECTS + 1)), rule=_rule())
    return session


def _rule():
    return type(WIDE)(margin_px=1, follow_image=False, **LOOSE)


def fractions_of(found) -> dict[tuple[int, int], np.ndarray]:
    labels = [one.label for one in found.objects]
    return {(n, z): found.fractions(n, z) for n in labels for z in (4, 5, 6, 7)}


@pytest.mark.parametrize("most", [(0, 0), (2, 3), (0, 1000)])
def test_fractions_do_not_depend_on_which_logits_were_kept(predictor, expected, most):
    assert sum(len(np.unique(one)) > 2 for one in expected.values()) > 20  # decoded ones
    each = predictor.preprocessing.mask_side**2 * 2
    session = prompted(predictor, (most[0] * each, most[1] * each))
    found = session.segmentation()
    session.close()  # what was given out can be asked for its fractions later
    for place, one in fractions_of(found).items():
        np.testing.assert_array_equal(one, expected[place])
    used = session.slices.logits.arrays.used
    assert used[0] <= most[0] * each
    assert used[1] <= most[1] * each
    assert sum(used) >= min(sum(most), 20) * each


def test_logits_beyond_the_budget_are_asked_for_once_a_slice(predictor, monkeypatch):
    session = prompted(predictor, (OBJECTS * predictor.preprocessing.mask_side**2 * 2, 0))
    found, asked = session.segmentation(), []
    decode = session.slices.decode

    def counted(question):
        asked.append(question.index)
        return decode(question)

    monkeypatch.setattr(session.slices.logits, "_ask", counted)
    for label in range(1, OBJECTS + 1):
        found.fractions(label, 6)  # all were carried there
    assert asked == [6]  # one question for all of them


def test_a_study_can_be_asked_for_fractions_once_its_run_is_over(predictor, monkeypatch, tmp_path):
    def study():
        prompts = [
            ObjectPrompts(f"{n}", (SlicePrompt(tuple(box), (), 5),))
            for n, box in enumerate(boxes()[:3])
        ]
        return segment_study(
            predictor,
            scan(wedge()),
            StudyPrompts(tuple(prompts), propagate=False),
            about=AboutModel("tiny"),
            fractions=True,
            checkpoint=tmp_path / "unfinished.db",
        )

    expected = study()
    monkeypatch.setattr(
        "dbsam_deploy.volumes.slices.LogitsStore", lambda ask, *_: LogitsStore(ask, 0, 0)
    )
    found = study()
    for label in (1, 2, 3):
        one = found.fractions(label, 5)
        assert len(np.unique(one)) > 2
        np.testing.assert_array_equal(one, expected.fractions(label, 5))


def test_an_array_that_is_kept_again_takes_no_second_place():
    store = ArrayStore[int](0, 1 << 20)
    values = [np.full((2, 2), n, np.float32) for n in range(4)]
    for n in (0, 1, 0, 0, 2, 3):
        store.put(n, values[n])
    for n in range(4):
        np.testing.assert_array_equal(store.get(n), values[n])
    assert store.used == (0, 4 * 8)
