"""Many objects prompted at once, and many threads: what is asked together, and who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.wedge import BOX, WIDE, bright, scan, wedge

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.label_map import AboutModel
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.study import segment_study
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

BOXES = [[float(4 * n), 2.0 * n, 4.0 * n + 15, 2.0 * n + 20] for n in range(8)]


class Noting(BrightPredictor):
    """Notes what each call asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def predict_boxes(self, boxes):
        self.asked.append(("boxes", len(boxes)))
        return super().predict_boxes(boxes)

    def predict_prompts(self, *, multimask=False, **prompts):
        if (coords := prompts.get("point_coords")) is not None:
            self.asked.append((f"{coords.shape[1]} points", len(coords)))
        return super().predict_prompts(multimask=multimask, **prompts)


def test_the_objects_of_a_slice_are_asked_for_together():
    model = Noting()
    session = VolumePredictor(model, scan(wedge()), rule=WIDE)
    prompts = [(n, {"box": box, "index": 5}) for n, box in enumerate(BOXES, 1)]
    prompts += [(20, {"points": [20, 15], "index": 5}), (21, {"points": [[21, 16]], "index": 5})]
    prompts += [
        (1, {"box": BOX, "index": 6}),
        (22, {"points": [[20, 15], [1, 1]], "index": 5, "labels": [1, 0]}),
    ]
    changes = session.prompt_many(prompts)
    assert model.asked == [("boxes", 8), ("1 points", 2), ("2 points", 1), ("boxes", 1)]
    assert [change.labels for change in changes] == [(n,) for n in (*range(1, 9), 20, 21, 22)]
    assert changes[0].slices == (5, 6)
    for label, prompt in prompts:
        alone = bright()
        alone.prompt(1, **prompt)
        index = prompt["index"]
        np.testing.assert_array_equal(session.mask(label)[index], alone.mask(1)[index])
    for _ in changes:
        session.undo()
    assert session.objects == ()


def test_a_batch_is_bounded(monkeypatch):
    monkeypatch.setattr("dbsam_deploy.volumes.slices.prompts_at_once", lambda *_: 3)
    model = Noting()
    session = VolumePredictor(model, scan(wedge()))
    session.prompt_many([(n, {"box": box, "index": 5}) for n, box in enumerate(BOXES, 1)])
    assert model.asked == [("boxes", 3), ("boxes", 3), ("boxes", 2)]


def test_a_study_asks_for_the_objects_of_a_slice_together():
    model = Noting()
    objects = [
        ObjectPrompts(f"{n}", (SlicePrompt(tuple(box), (), 5),)) for n, box in enumerate(BOXES)
    ]
    spec = StudyPrompts(tuple(objects), propagate=False)
    together = segment_study(model, scan(wedge()), spec, about=AboutModel("bright"))
    assert model.asked == [("boxes", 8)]
    session = bright()
    for label, box in enumerate(BOXES, 1):
        session.prompt(label, box=box, index=5)
    np.testing.assert_array_equal(together.labels, session.segmentation().labels)


def test_a_model_gives_the_same_masks_together_and_alone(tiny_artefact):
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 40, 50), np.uint8)
    with VolumePredictor(predictor, as_volume(pixels), encode_ahead=False) as together:
        together.prompt_many([(n, {"box": box, "index": 1}) for n, box in enumerate(BOXES, 1)])
        with VolumePredictor(together.shared, as_volume(pixels), encode_ahead=False) as alone:
            for label, box in enumerate(BOXES, 1):
                alone.prompt(label, box=box, index=1)
                differs = together.mask(label) != alone.mask(label)
                assert differs.mean() < 1e-3  # a pixel whose logit is next to 0
        np.testing.assert_allclose(
            together.segmentation().confidence, alone.segmentation().confidence, atol=1e-4
        )


def test_if_one_prompt_is_refused_none_counts():
    model = Noting()
    session = VolumePredictor(model, scan(wedge()))
    with pytest.raises(InputError, match="outside the image"):
        session.prompt_many(
            [(1, {"box": BOX, "index": 5}), (2, {"box": [0, 0, 99, 9], "index": 5})]
        )
    with pytest.raises(InputError, match="prompt 'boxes': expected box, points"):
        session.prompt(1, boxes=[BOX], index=5)
    assert (model.asked, session.objects) == ([], ())


def test_prompts_of_one_object_in_one_call_add_up_as_in_several():
    session, other = bright(), bright()
    three = [{"box_3d": [12, 8, 4, 40, 25, 8]}, {"box": BOX, "index": 6}, {"box": BOX, "index": 5}]
    session.prompt_many([(1, one) for one in three])
    for one in three:
        other.prompt(1, **one)
    assert session.propagate().slices == other.propagate().slices == (4, 7)
    np.testing.assert_array_equal(session.mask(1), other.mask(1))
    session.prompt_many([(1, {"box": BOX, "index": 6}), (1, {"box": [15, 8, 20, 25], "index": 6})])
    assert session.mask(1)[6].any(0).nonzero()[0].tolist() == [15, 16, 17, 18, 19]


def during(session: VolumePredictor, *works: Callable[[], object], **how) -> list[threading.Thread]:
    """Carry object 1, and begin all `works` in threads of their own at its second slice."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    done: list[bool] = []

    def progress(slices: int, _: int) -> None:
        if slices == 1:
            for thread in threads:
                thread.start()
            threads[0].join(timeout=60)
            done.append(not threads[0].is_alive())

    session.propagate(1, progress=progress, **how)
    assert done == [True]
    return threads


def test_the_session_is_read_and_other_objects_are_changed_while_one_is_carried():
    session = bright()
    session.prompt(1, box=BOX, index=5)
    seen: list[int] = []

    def others() -> None:
        seen.append(int(session.mask(1).any((1, 2)).sum()))
        session.prompt(2, box=BOX, index=4)
        session.propagate(2)
        seen.append(int((session.segmentation().labels == 1).sum()))
        session.clear(2)

    during(session, others)
    assert seen == [1, 0]  # as it was before; object 2 covers it
    np.testing.assert_array_equal(session.mask(1), wedge())
    assert not session.mask(2).any()


def test_a_call_on_the_same_object_waits_for_its_end():
    session = bright()
    session.prompt(1, box=BOX, index=5)
    ready = threading.Thread(target=lambda: None)
    threads = during(session, ready.start, lambda: session.set_mask(1, np.zeros((40, 50)), index=4))
    for thread in threads:
        thread.join(timeout=60)
    for count in (5, 6, 1):  # carried, then drawn
        assert session.mask(1).any((1, 2)).sum() == count
        session.undo()
    with pytest.raises(InputError, match="end that call first"):
        _clears_itself(bright())


def _clears_itself(session: VolumePredictor) -> None:
    session.prompt(1, box=BOX, index=5)
    session.propagate(1, progress=lambda *_: session.clear(1))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("cancelled")])
def test_a_call_that_is_cancelled_changes_nothing(error):
    session = bright()
    session.prompt(1, box=BOX, index=5)
    before, known = session.mask(1), session.confidence(1)

    def progress(done: int, _: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(type(error)):
        session.propagate(1, progress=progress)
    model = BrightPredictor(2, error)
    session.shared.predictor = model
    with pytest.raises(type(error)):
        session.propagate(1)
    model.encoded = 1
    with pytest.raises(type(error)):
        session.prompt_many([(1, {"box": BOX, "index": 4}), (2, {"box": BOX, "index": 5})])
    np.testing.assert_array_equal(session.mask(1), before)
    np.testing.assert_array_equal(session.confidence(1), known)
    session.shared.predictor = BrightPredictor()
    session.propagate(1)  # nobody waits for what was cancelled
    np.testing.assert_array_equal(session.mask(1), wedge())
    session.undo()
    np.testing.assert_array_equal(session.mask(1), before)
