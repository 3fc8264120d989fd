"""The protocol `objects`, and what all protocols share, with models whose masks are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.references import (
    as_prediction,
    bright_in_box,
    labelled_case,
    labelled_squares,
    repeat_box,
)

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import (
    EvaluationResult,
    LabelledCase,
    build_protocol,
    evaluate,
    find_cases,
    read_case,
    read_cases,
)
from dbsam_deploy.evaluation.boxes import BoxGrowth
from dbsam_deploy.evaluation.metrics import dice, surface_dice
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.cases import bundled_examples


def nothing(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    return as_prediction(np.zeros((len(boxes), *image.shape[:2]), bool))


def build(**options: Any) -> Any:
    return build_protocol(options.pop("name", "objects"), **options)


PROTOCOL = build_protocol("objects")


def test_a_model_that_repeats_its_prompt_is_at_the_floor() -> None:
    cases = list(read_cases(find_cases(bundled_examples())))
    result = evaluate(repeat_box, cases, PROTOCOL, with_nsd=False)
    assert len(result.objects) == 7 + 29 + 27 + 22 + 17
    for item in result.objects:
        assert item.score.dsc == item.score.box_dsc < 1
        assert item.score.nsd is None
    assert [task.below_box for task in result.tasks] == [True]
    assert result.summary.tasks_above_box == 0
    assert [(s.reason, s.count) for s in result.skipped] == [("object under 16 px", 1)]


def test_a_perfect_model() -> None:
    labels = labelled_squares(3, 64, (5, 6, 20), (40, 40, 10))
    result = evaluate(bright_in_box, [labelled_case(labels)], PROTOCOL)
    assert [(o.slice_index, o.label, o.label_name) for o in result.objects] == [
        (z, label, name) for z in range(3) for label, name in ((1, "first"), (2, "second"))
    ]
    assert all(o.score.dsc == o.score.nsd == 1 for o in result.objects)
    assert all(o.score.box_dsc <= 1 for o in result.objects)
    assert [o.pixels for o in result.objects[:2]] == [400, 100]


def test_scores_by_hand() -> None:
    labels = labelled_squares(1, 100, (10, 10, 40))
    result = evaluate(repeat_box, [labelled_case(labels)], build(growth=BoxGrowth(41, 41)))
    (item,) = result.objects
    grown = np.zeros((100, 100), bool)  # 41 px at 1024 are 4.0 of 100
    grown[6:54, 6:54] = True
    assert item.box == pytest.approx((5.996, 5.996, 54.004, 54.004), abs=1e-3)
    assert item.score.dsc == pytest.approx(2 * 1600 / (1600 + 48**2))
    assert item.score.nsd == surface_dice(grown, labels[0] == 1, 2.0)


def test_small_objects_are_counted_and_draw_no_box(rng: np.random.Generator) -> None:
    labels = labelled_squares(1, 64, (5, 6, 3), (40, 40, 10))
    result = evaluate(repeat_box, [labelled_case(labels)], PROTOCOL, with_nsd=False)
    alone = evaluate(
        repeat_box, [labelled_case(np.where(labels == 2, 2, 0))], PROTOCOL, with_nsd=False
    )
    assert [item.label for item in result.objects] == [2]
    assert result.objects[0].box == alone.objects[0].box
    assert [(s.file, s.reason, s.count) for s in result.skipped] == [
        ("task/case.npz", "object under 16 px", 1)
    ]


def test_a_limit_changes_no_box_and_is_reported() -> None:
    labels = labelled_squares(9, 64, (5, 6, 20))
    boxes = {}
    for limit in (None, 3):
        result = evaluate(
            repeat_box, [labelled_case(labels)], PROTOCOL, max_slices=limit, with_nsd=False
        )
        boxes[limit] = {item.slice_index: item.box for item in result.objects}
    assert list(boxes[3]) == [0, 4, 8]
    assert boxes[3].items() <= boxes[None].items()
    assert result.settings["max_slices"] == 3
    one = evaluate(repeat_box, [labelled_case(labels)], PROTOCOL, max_slices=1, with_nsd=False)
    assert [item.slice_index for item in one.objects] == [4]
    assert result.skipped[0].count == 6
    assert "limit of 3" in result.skipped[0].reason


def test_boxes_depend_on_the_file_name_and_the_seed_alone() -> None:
    labels = labelled_squares(1, 400, (100, 100, 80))
    found = {
        (name, seed): evaluate(
            repeat_box, [labelled_case(labels, name=name)], build(seed=seed), with_nsd=False
        )
        .objects[0]
        .box
        for name in ("a/x.npz", "b/x.npz", "a/y.npz")
        for seed in (0, 1)
    }
    assert found["a/x.npz", 0] == found["b/x.npz", 0]
    assert len(set(found.values())) == 4


def test_worst_objects_are_kept_with_their_pictures() -> None:
    cases = [
        labelled_case(labelled_squares(4, 64, (5, 6, 20)), name=f"{task}/{i}.npz")
        for task in "ab"
        for i in range(2)
    ]

    def alternating(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        alternating.calls += 1  # type: ignore[attr-defined]
        return (nothing if alternating.calls % 4 == 0 else bright_in_box)(image, boxes)  # type: ignore[attr-defined]

    alternating.calls = 0  # type: ignore[attr-defined]
    result = evaluate(alternating, cases, PROTOCOL, with_nsd=False, worst=3)
    assert [w.result.score.dsc for w in result.worst] == [0, 0, 0]
    assert sorted({w.result.task for w in result.worst}) == ["a", "b"]
    for overlay in result.worst:
        assert overlay.slice_index == 3
        assert not overlay.prediction.any()
        assert overlay.truth.sum() == 400


def test_the_means(rng: np.random.Generator) -> None:
    cases = [
        labelled_case(labelled_squares(depth, 64, (5, 6, 20)), name=f"{task}/{depth}.npz")
        for task, depth in (("a", 1), ("a", 5), ("b", 3))
    ]
    scores = iter(rng.random(9))

    def random_quality(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        mask = bright_in_box(image, boxes).masks[:, 0].astype(bool)
        mask[:, : int(5 + 20 * next(scores))] = False
        return as_prediction(mask)

    result = evaluate(random_quality, cases, PROTOCOL, with_nsd=False)
    dsc = np.array([item.score.dsc for item in result.objects])
    by_task = [dsc[:6].mean(), dsc[6:].mean()]
    assert result.object_mean == pytest.approx(dsc.mean())
    assert result.task_mean == pytest.approx(np.mean(by_task))
    assert [t.mean.score.dsc for t in result.tasks] == pytest.approx(by_task)
    by_case = [dsc[0], dsc[1:6].mean(), dsc[6:].mean()]
    assert result.summary.cases.score.dsc == pytest.approx(np.mean(by_case))
    assert [t.dimensions for t in result.tasks] == ["mixed", "3D"]
    assert result.summary.tasks_2d is None
    interval = result.tasks[0].mean.dsc_interval
    assert interval is not None
    assert interval.unit == "objects"
    assert interval.low <= by_task[0] <= interval.high


def test_nothing_to_evaluate() -> None:
    case = labelled_case(labelled_squares(1, 64, (10, 10, 2)))
    with pytest.raises(InputError, match=r"nothing to evaluate in 1 files.*under 16 px"):
        evaluate(repeat_box, [case], build_protocol("objects"))
    with pytest.raises(InputError, match="nothing to evaluate in 0 files"):
        evaluate(repeat_box, [], build_protocol("objects"))
    with pytest.raises(InputError, match="max_slices 0"):
        evaluate(repeat_box, [case], build_protocol("objects"), max_slices=0)


def test_a_file_without_an_object_is_reported() -> None:
    cases = [
        labelled_case(labelled_squares(1, 64, (10, 10, 2)), name="t/small.npz"),
        labelled_case(labelled_squares(1, 64, (10, 10, 20)), name="t/large.npz"),
    ]
    result = evaluate(repeat_box, cases, build_protocol("objects"), with_nsd=False)
    assert [(s.file, s.reason) for s in result.skipped] == [
        ("t/small.npz", "object under 16 px"),
        ("t/small.npz", "file left without an object"),
    ]


def test_a_model_that_answers_wrongly_is_named_with_the_file() -> None:
    def lazy(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        return as_prediction(np.zeros((1, 3, 3), bool))

    with pytest.raises(InputError, match=r"task/case\.npz: the segmenter returned masks"):
        evaluate(
            lazy, [labelled_case(labelled_squares(1, 64, (9, 9, 9)))], build_protocol("objects")
        )


def test_options_that_mean_nothing_are_refused() -> None:
    for options, message in (
        ({"name": "none"}, "protocol 'none'"),
        ({"millimetres": True}, "medsam"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=message):
            build(**options)


def test_labels_of_another_size_are_refused() -> None:
    case = labelled_case(labelled_squares(1, 64, (9, 9, 9)))
    with pytest.raises(InputError, match="labels of shape"):
        LabelledCase("t", "t/x.npz", case.volume, case.labels[:, 1:], {})


def test_a_predictor_encodes_each_slice_once(tiny_artefact: Any, rng: np.random.Generator) -> None:
    session = OnnxRuntimeSession(tiny_artefact)
    calls: list[str] = []

    class Counting:
        backend = session.backend

        def run(self, graph: str, feed: Any) -> Any:
            calls.append(graph)
            return session.run(graph, feed)

    labels = labelled_squares(4, 48, (5, 6, 20), (30, 30, 12))
    case = labelled_case(labels, spacing_mm=(1.0, 1.0, 1.0))
    case.volume.pixels[:] = rng.integers(0, 256, case.volume.pixels.shape)
    predictor = Predictor(Counting(), tiny_artefact.preprocessing)
    for name in ("objects", "cvpr24"):
        calls.clear()
        result = evaluate(predictor, [case], build_protocol(name), with_nsd=False)
        assert calls.count("encoder") == 4
        assert calls.count("decoder") == 4  # both boxes in one call
    predictor = Predictor(session, tiny_artefact.preprocessing)
    item = evaluate(predictor, [case], build_protocol("objects"), with_nsd=False).objects[3]
    predictor.set_image(case.volume.slice_rgb(1))
    mask = predictor.predict_boxes(np.array([item.box], np.float32)).masks[0, 0]
    assert item.score.dsc == pytest.approx(dice(mask, labels[1] == 2))
    assert isinstance(result, EvaluationResult)


@pytest.mark.data
def test_objects_and_boxes_of_the_reference_figures(test_set: Path) -> None:
    reference = json.loads((test_set.parent.parent / "REFERENCE_DICE.json").read_text())["tasks"]
    cases = read_cases(find_cases(test_set))
    result = evaluate(nothing, cases, build_protocol("objects"), with_nsd=False, intervals=False)
    assert len(result.objects) == 512
    found = {
        f"dev/{task.task}": (task.objects, round(task.mean.score.box_dsc, 4))
        for task in result.tasks
    }
    assert found == {
        name: (item["objects"], item["dice_of_box_itself"]) for name, item in reference.items()
    }


def test_read_case_of_a_real_file_in_every_protocol() -> None:
    files = find_cases(bundled_examples())
    nuclei = read_case(files[1])
    for name, count in (("objects", 7), ("medsam", 7), ("cvpr24", 7)):
        result = evaluate(repeat_box, [nuclei], build_protocol(name), with_nsd=False)
        assert len(result.objects) == count
        assert 0.2 < result.object_mean < 0.95
