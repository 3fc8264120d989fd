"""The three protocols with models whose masks are known in advance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbsam_deploy.cases import bundled_examples
from dbsam_deploy.errors import InputError
from dbsam_deploy.evaluation import (
    EvaluationResult,
    LabelledCase,
    build_protocol,
    evaluate,
    find_cases,
    read_case,
    read_cases,
)
from dbsam_deploy.evaluation.boxes import BoxGrowth, fill_box
from dbsam_deploy.evaluation.by_volume import resize_image, resize_labels
from dbsam_deploy.evaluation.metrics import dice, surface_dice
from dbsam_deploy.predictor import Prediction, Predictor
from dbsam_deploy.sessions import OnnxRuntimeSession
from dbsam_deploy.volumes import Volume


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def prediction(masks: np.ndarray, logits: np.ndarray | None = None) -> Prediction:
    """(N, H, W) masks as a model's answer; logits follow the masks unless given."""
    if logits is None:
        logits = np.where(masks, 1.0, -1.0).astype(np.float32)
    ious = np.ones((len(masks), 1), np.float32)
    return Prediction(masks[:, None].astype(np.uint8), ious, logits[:, None])


def repeat_box(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    """A model that only repeats its prompt."""
    size = image.shape[:2]
    return prediction(np.stack([fill_box(box, size, inclusive=False) for box in boxes]))


def bright_in_box(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    """A perfect model of images whose objects are white on black."""
    size = image.shape[:2]
    white = image[..., 0] > 127
    return prediction(np.stack([fill_box(b, size, inclusive=True) & white for b in boxes]))


def nothing(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    return prediction(np.zeros((len(boxes), *image.shape[:2]), bool))


def make_case(
    labels: np.ndarray,
    *,
    name: str = "task/case.npz",
    spacing: tuple[float, float, float] | None = None,
    boxes: np.ndarray | None = None,
) -> LabelledCase:
    """White objects on black: (D, H, W) labels."""
    pixels = np.where(labels > 0, 255, 0).astype(np.uint8)
    volume = Volume(Path(name), "npz", pixels, "as stored", boxes, spacing)
    task = name.rpartition("/")[0]
    return LabelledCase(task, name, volume, labels, {1: "first", 2: "second"})


def squares(depth: int, size: int, *places: tuple[int, int, int]) -> np.ndarray:
    """Label i + 1 at (row, column, side) of `places`, on every slice."""
    labels = np.zeros((depth, size, size), np.uint8)
    for label, (row, column, side) in enumerate(places, start=1):
        labels[:, row : row + side, column : column + side] = label
    return labels


class TestObjects:
    protocol = build_protocol("objects")

    def test_a_model_that_repeats_its_prompt_is_at_the_floor(self) -> None:
        cases = list(read_cases(find_cases(bundled_examples())))
        result = evaluate(repeat_box, cases, self.protocol, with_nsd=False)
        assert len(result.objects) == 7 + 29 + 27 + 22 + 17
        for item in result.objects:
            assert item.score.dsc == item.score.box_dsc < 1
            assert item.score.nsd is None
        assert [task.below_box for task in result.tasks] == [True]
        assert result.summary.tasks_above_box == 0
        assert [(s.reason, s.count) for s in result.skipped] == [("object under 16 px", 1)]

    def test_a_perfect_model(self) -> None:
        labels = squares(3, 64, (5, 6, 20), (40, 40, 10))
        result = evaluate(bright_in_box, [make_case(labels)], self.protocol)
        assert [(o.slice_index, o.label, o.label_name) for o in result.objects] == [
            (z, label, name) for z in range(3) for label, name in ((1, "first"), (2, "second"))
        ]
        assert all(o.score.dsc == o.score.nsd == 1 for o in result.objects)
        assert all(o.score.box_dsc <= 1 for o in result.objects)
        assert [o.pixels for o in result.objects[:2]] == [400, 100]

    def test_scores_by_hand(self) -> None:
        labels = squares(1, 100, (10, 10, 40))
        result = evaluate(repeat_box, [make_case(labels)], build(growth=BoxGrowth(41, 41)))
        (item,) = result.objects
        grown = np.zeros((100, 100), bool)  # 41 px at 1024 are 4.0 of 100
        grown[6:54, 6:54] = True
        assert item.box == pytest.approx((5.996, 5.996, 54.004, 54.004), abs=1e-3)
        assert item.score.dsc == pytest.approx(2 * 1600 / (1600 + 48**2))
        assert item.score.nsd == surface_dice(grown, labels[0] == 1, 2.0)

    def test_small_objects_are_counted_and_draw_no_box(self, rng: np.random.Generator) -> None:
        labels = squares(1, 64, (5, 6, 3), (40, 40, 10))
        result = evaluate(repeat_box, [make_case(labels)], self.protocol, with_nsd=False)
        alone = evaluate(
            repeat_box, [make_case(np.where(labels == 2, 2, 0))], self.protocol, with_nsd=False
        )
        assert [item.label for item in result.objects] == [2]
        assert result.objects[0].box == alone.objects[0].box
        assert [(s.file, s.reason, s.count) for s in result.skipped] == [
            ("task/case.npz", "object under 16 px", 1)
        ]

    def test_a_limit_changes_no_box_and_is_reported(self) -> None:
        labels = squares(9, 64, (5, 6, 20))
        boxes = {}
        for limit in (None, 3):
            result = evaluate(
                repeat_box, [make_case(labels)], self.protocol, max_slices=limit, with_nsd=False
            )
            boxes[limit] = {item.slice_index: item.box for item in result.objects}
        assert list(boxes[3]) == [0, 4, 8]
        assert boxes[3].items() <= boxes[None].items()
        assert result.settings["max_slices"] == 3
        assert result.skipped[0].count == 6
        assert "limit of 3" in result.skipped[0].reason

    def test_boxes_depend_on_the_file_name_and_the_seed_alone(self) -> None:
        labels = squares(1, 400, (100, 100, 80))
        found = {
            (name, seed): evaluate(
                repeat_box, [make_case(labels, name=name)], build(seed=seed), with_nsd=False
            )
            .objects[0]
            .box
            for name in ("a/x.npz", "b/x.npz", "a/y.npz")
            for seed in (0, 1)
        }
        assert found["a/x.npz", 0] == found["b/x.npz", 0]
        assert len(set(found.values())) == 4

    def test_worst_objects_are_kept_with_their_pictures(self) -> None:
        cases = [
            make_case(squares(4, 64, (5, 6, 20)), name=f"{task}/{i}.npz")
            for task in "ab"
            for i in range(2)
        ]

        def alternating(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            alternating.calls += 1  # type: ignore[attr-defined]
            return (nothing if alternating.calls % 4 == 0 else bright_in_box)(image, boxes)  # type: ignore[attr-defined]

        alternating.calls = 0  # type: ignore[attr-defined]
        result = evaluate(alternating, cases, self.protocol, with_nsd=False, worst=3)
        assert [w.result.score.dsc for w in result.worst] == [0, 0, 0]
        assert sorted({w.result.task for w in result.worst}) == ["a", "b"]
        for overlay in result.worst:
            assert overlay.slice_index == 3
            assert not overlay.prediction.any()
            assert overlay.truth.sum() == 400

    def test_the_means(self, rng: np.random.Generator) -> None:
        cases = [
            make_case(squares(depth, 64, (5, 6, 20)), name=f"{task}/{depth}.npz")
            for task, depth in (("a", 1), ("a", 5), ("b", 3))
        ]
        scores = iter(rng.random(9))

        def random_quality(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            mask = bright_in_box(image, boxes).masks[:, 0].astype(bool)
            mask[:, : int(5 + 20 * next(scores))] = False
            return prediction(mask)

        result = evaluate(random_quality, cases, self.protocol, with_nsd=False)
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


def build(**options: Any) -> Any:
    return build_protocol(options.pop("name", "objects"), **options)


class TestMedsam:
    protocol = build_protocol("medsam")

    def test_boxes_grow_by_nine_on_the_256_grid(self) -> None:
        labels = squares(2, 256, (30, 40, 50))
        seen: list[np.ndarray] = []

        def watch(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            assert image.shape == (256, 256, 3)
            seen.append(boxes)
            return repeat_box(image, boxes)

        evaluate(watch, [make_case(labels)], self.protocol, with_nsd=False)
        # inclusive: the last row and column are 79 and 89
        np.testing.assert_array_equal(np.concatenate(seen), [[31, 21, 98, 88]] * 2)

    def test_a_stack_has_one_dice_and_images_their_mean(self) -> None:
        labels = np.zeros((2, 256, 256), np.uint8)
        labels[0, 20:120, 20:120] = 1
        labels[1, 50:70, 50:70] = 1

        def half(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            masks = bright_in_box(image, boxes).masks[:, 0].astype(bool)
            masks[:, :60] = False  # all but 60 of 100 rows, and 10 of 20
            return prediction(masks)

        scores = {}
        for task in ("MR_3D", "some_2D_task"):
            case = make_case(labels, name=f"{task}/x.npz")
            result = evaluate(half, [case], self.protocol)
            (outcome,) = result.cases
            assert outcome.dimensions == ("2D" if task == "some_2D_task" else "3D")
            scores[task] = outcome.score
            assert outcome.tolerance == "1 voxel"
            assert outcome.name == f"{task}/x.npz:first"
        dice_each = [2 * 6000 / 16000, 2 * 200 / 600]
        assert scores["some_2D_task"].dsc == pytest.approx(np.mean(dice_each))
        assert scores["MR_3D"].dsc == pytest.approx(2 * 6200 / (6200 + 10400))
        # as coded, the surface is the stack's in both
        assert scores["MR_3D"].nsd == scores["some_2D_task"].nsd
        found = labels.copy()
        found[:, :60] = 0
        assert scores["MR_3D"].nsd == surface_dice(found, labels, 1.0)

    def test_small_slices_are_dropped_and_counted(self) -> None:
        labels = squares(3, 256, (30, 40, 50), (200, 200, 10))
        labels[1, 30:80, 40:90] = 0
        labels[1, 30:40, 40:50] = 1  # 100 px: not more than 100
        result = evaluate(repeat_box, [make_case(labels)], self.protocol, with_nsd=False)
        assert [(o.label, o.slice_index) for o in result.objects] == [(1, 0), (1, 2)]
        assert {s.reason: s.count for s in result.skipped} == {
            "object of at most 100 px at 256×256": 4,
            "label left without a slice": 1,
        }

    def test_the_logits_are_cut_and_not_the_masks(self) -> None:
        labels = squares(1, 256, (30, 40, 50))
        truth = labels[0] == 1

        def two_opinions(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            logits = np.where(truth, 0.01, 0.0)[None].astype(np.float32)
            return prediction(~truth[None], logits)

        result = evaluate(two_opinions, [make_case(labels)], self.protocol)
        assert result.cases[0].score.dsc == 1

        def small_grid(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            return prediction(truth[None], np.ones((1, 64, 64), np.float32))

        result = evaluate(small_grid, [make_case(labels)], self.protocol)
        assert result.cases[0].score.dsc == 1

    def test_other_sizes_are_squeezed(self, rng: np.random.Generator) -> None:
        pytest.importorskip("skimage")
        labels = np.zeros((1, 100, 130), np.uint8)
        labels[0, 10:60, 20:70] = 3
        result = evaluate(bright_in_box, [make_case(labels)], self.protocol, with_nsd=False)
        (item,) = result.objects
        assert item.pixels == int((resize_labels(labels[0]) == 3).sum())
        assert item.pixels == pytest.approx(2500 * 2.56 * 256 / 130, rel=0.02)
        assert item.score.dsc > 0.97
        image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        assert resize_image(image) is image
        assert set(np.unique(resize_labels(labels[0]))) == {0, 3}

    def test_millimetres_where_the_file_has_them(self) -> None:
        labels = np.zeros((4, 256, 256), np.uint8)
        labels[1:3, 30:80, 40:90] = 1

        def shifted(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            return prediction(np.roll(bright_in_box(image, boxes).masks[:, 0] != 0, 1, 2))

        protocol = build(name="medsam", millimetres=True)
        with_spacing = make_case(labels, spacing=(5.0, 0.7, 2.0))
        (case,) = evaluate(shifted, [with_spacing], protocol).cases
        assert case.tolerance == "1 mm"
        truth = labels[1:3] == 1
        assert case.score.nsd == surface_dice(np.roll(truth, 1, 2), truth, 1, (5.0, 0.7, 2.0))
        assert case.score.nsd is not None
        assert case.score.nsd < 1
        (case,) = evaluate(shifted, [make_case(labels)], protocol).cases
        assert (case.tolerance, case.score.nsd) == ("1 voxel", 1)

    def test_the_interval_contains_its_mean(self) -> None:
        cases = [make_case(squares(n, 256, (30, 40, 20 * n)), name=f"t/{n}.npz") for n in (1, 3)]
        (task,) = evaluate(repeat_box, cases, self.protocol, with_nsd=False).tasks
        interval = task.mean.dsc_interval
        assert interval is not None
        assert interval.unit == "cases"
        assert interval.low <= task.mean.score.dsc <= interval.high


class TestChallenge:
    protocol = build_protocol("cvpr24")

    def test_own_boxes_and_later_labels_over_earlier_ones(self) -> None:
        labels = squares(1, 64, (10, 10, 20), (20, 20, 20))
        boxes = np.array([[5, 5, 40, 40], [20, 20, 39, 39]], np.float32)
        seen: list[np.ndarray] = []

        def watch(image: np.ndarray, prompts: np.ndarray) -> Prediction:
            seen.append(prompts)
            return prediction(
                np.stack([fill_box(b, image.shape[:2], inclusive=True) for b in prompts])
            )

        result = evaluate(watch, [make_case(labels, boxes=boxes)], self.protocol)
        np.testing.assert_array_equal(seen[0], boxes)
        first = np.zeros((64, 64), bool)
        first[5:41, 5:41] = True
        first[20:40, 20:40] = False
        assert result.objects[0].score.dsc == pytest.approx(dice(first, labels[0] == 1))
        assert result.objects[1].score.dsc == 1
        assert result.cases[0].score.dsc == pytest.approx(
            np.mean([item.score.dsc for item in result.objects])
        )
        assert result.cases[0].tolerance == "2 px"

    def test_the_surface_of_an_image_is_a_slabs_and_counts_from_a_dice_of_02(self) -> None:
        labels = squares(1, 64, (10, 10, 20))

        def shifted(by: int) -> Callable[[np.ndarray, np.ndarray], Prediction]:
            def model(image: np.ndarray, boxes: np.ndarray) -> Prediction:
                return prediction(np.roll(labels == 1, by, 2))

            return model

        (item,) = evaluate(shifted(5), [make_case(labels)], self.protocol).objects
        truth = (labels[0] == 1)[..., None]
        assert item.score.nsd == surface_dice(np.roll(truth, 5, 1), truth, 2.0)
        (item,) = evaluate(shifted(18), [make_case(labels)], self.protocol).objects
        assert item.score.dsc == pytest.approx(0.1)
        assert item.score.nsd == 0
        assert surface_dice(np.roll(truth, 18, 1), truth, 2.0) > 0

    def test_a_volume_is_followed_from_its_middle_slice(self) -> None:
        labels = np.zeros((7, 256, 256), np.uint8)
        for z in range(1, 6):  # slides by 4 px a slice
            labels[z, 100:120, 60 + 4 * z : 90 + 4 * z] = 1
        boxes = np.array([[70, 98, 1, 104, 122, 6]], np.float32)
        seen: dict[int, list[float]] = {}
        case = make_case(labels, spacing=(2.0, 1.0, 1.0), boxes=boxes)

        def watch(image: np.ndarray, prompts: np.ndarray) -> Prediction:
            columns = np.flatnonzero(image[..., 0].any(0))
            seen[int(columns.min() - 60) // 4] = prompts[0].tolist()
            return bright_in_box(image, prompts)

        result = evaluate(watch, [case], self.protocol)
        assert list(seen) == [3, 4, 5, 2, 1]
        assert seen[3] == [70, 98, 104, 122]
        # slice 3's mask is columns 72–101 and rows 100–119, 3 px wider
        assert seen[4] == seen[2] == [69, 97, 104, 122]
        (item,) = result.objects
        assert item.slice_index is None
        assert item.box == (70, 98, 1, 104, 122, 6)
        found = np.zeros(labels.shape, bool)
        for z, (x0, _, x1, _) in seen.items():
            found[z] = labels[z] == 1
            found[z, :, : int(x0)] = found[z, :, int(x1) + 1 :] = False
        assert item.score.dsc == pytest.approx(dice(found, labels == 1))
        assert 0.5 < item.score.dsc < 1
        assert item.score.nsd == surface_dice(found, labels == 1, 2.0, (2.0, 1.0, 1.0))
        assert (result.cases[0].dimensions, result.cases[0].tolerance) == ("3D", "2 mm")
        assert result.cases[0].slices == 5

    def test_an_empty_mask_falls_back_to_the_first_box(self) -> None:
        labels = np.zeros((5, 64, 64), np.uint8)
        labels[:, 20:40, 20:40] = 1
        prompts = []

        def blind(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            prompts.append(boxes[0].tolist())
            return nothing(image, boxes)

        case = make_case(labels, spacing=(1.0, 1.0, 1.0))
        (item,) = evaluate(blind, [case], self.protocol).objects
        x0, y0, _, x1, y1, _ = item.box
        assert prompts == [[x0, y0, x1, y1]] * 5

    def test_labels_that_share_slices_go_in_one_call_and_the_later_one_stands(self) -> None:
        labels = np.zeros((6, 64, 64), np.uint8)
        labels[0:6, 10:30, 10:30] = 1
        labels[2:6, 25:45, 25:45] = 2
        boxes = np.array([[8, 8, 0, 40, 40, 6], [24, 24, 2, 46, 46, 6]], np.float32)
        sizes = []

        def model(image: np.ndarray, prompts: np.ndarray) -> Prediction:
            sizes.append(len(prompts))
            return prediction(
                np.stack([fill_box(b, image.shape[:2], inclusive=True) for b in prompts])
            )

        case = make_case(labels, spacing=(1.0, 1.0, 1.0), boxes=boxes)
        result = evaluate(model, [case], self.protocol, with_nsd=False)
        # middles are 2 and 3: up 2, 3, 4, 5; down 2 for the second label, then 1 and 0
        assert sizes == [1, 2, 2, 2, 1, 1, 1]
        assert result.cases[0].slices == 6
        alone = {}
        for label in (1, 2):
            only = np.where(labels == label, label, 0)
            case = make_case(only, spacing=(1.0, 1.0, 1.0), boxes=boxes)
            (alone[label],) = evaluate(model, [case], self.protocol, with_nsd=False).objects
        assert result.objects[1].score == alone[2].score
        # what the second label took had been wrong for the first
        assert result.objects[0].score.dsc > alone[1].score.dsc

    def test_a_limit_takes_the_middle_of_a_volume(self) -> None:
        labels = np.zeros((9, 64, 64), np.uint8)
        labels[1:8, 10:30, 10:30] = 1
        labels[1, 40:50, 40:50] = 2
        case = make_case(labels, spacing=(1.0, 1.0, 1.0))
        result = evaluate(bright_in_box, [case], self.protocol, max_slices=3)
        assert [item.label for item in result.objects] == [1]
        assert result.cases[0].slices == 3
        assert result.objects[0].pixels == 3 * 400
        assert {s.reason: s.count for s in result.skipped} == {
            "slice beyond the limit of 3": 4,
            "label only on slices beyond the limit of 3": 1,
        }

    def test_a_stack_without_spacing_is_images(self) -> None:
        case = make_case(squares(3, 64, (10, 10, 20)))
        result = evaluate(bright_in_box, [case], self.protocol)
        assert [c.name for c in result.cases] == [f"task/case.npz[{z}]" for z in range(3)]
        assert {c.dimensions for c in result.cases} == {"2D"}

    @pytest.mark.parametrize(
        ("boxes", "spacing", "message"),
        [
            ([[1, 1, 9, 9]], None, r"boxes \(n, 4\) for 2 slices"),
            ([[1, 1, 0, 9, 9, 2]], None, "no spacing"),
            ([[1, 1, 0, 9, 9, 2]], (1, 1, 1), "1 boxes, but gts has label 2"),
            ([[1, 1, 0, 9, 9, 2], [1, 1, 0, 9, 9, 5]], (1, 1, 1), "z1 <= 2"),
            ([[1, 1, 0, 9, 9, 2], [1, 1, 0, 90, 9, 2]], (1, 1, 1), "outside the image"),
        ],
    )
    def test_unusable_boxes_name_the_file(
        self, boxes: list[list[float]], spacing: Any, message: str
    ) -> None:
        labels = squares(2, 64, (10, 10, 20), (40, 40, 10))
        case = make_case(labels, boxes=np.array(boxes, np.float32), spacing=spacing)
        with pytest.raises(InputError, match=message) as caught:
            evaluate(bright_in_box, [case], self.protocol)
        assert "task/case.npz" in str(caught.value)


def test_nothing_to_evaluate() -> None:
    case = make_case(squares(1, 64, (10, 10, 2)))
    with pytest.raises(InputError, match=r"nothing to evaluate in 1 files.*under 16 px"):
        evaluate(repeat_box, [case], build_protocol("objects"))
    with pytest.raises(InputError, match="nothing to evaluate in 0 files"):
        evaluate(repeat_box, [], build_protocol("objects"))
    with pytest.raises(InputError, match="max_slices 0"):
        evaluate(repeat_box, [case], build_protocol("objects"), max_slices=0)


def test_a_file_without_an_object_is_reported() -> None:
    cases = [
        make_case(squares(1, 64, (10, 10, 2)), name="t/small.npz"),
        make_case(squares(1, 64, (10, 10, 20)), name="t/large.npz"),
    ]
    result = evaluate(repeat_box, cases, build_protocol("objects"), with_nsd=False)
    assert [(s.file, s.reason) for s in result.skipped] == [
        ("t/small.npz", "object under 16 px"),
        ("t/small.npz", "file left without an object"),
    ]


def test_a_model_that_answers_wrongly_is_named_with_the_file() -> None:
    def lazy(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        return prediction(np.zeros((1, 3, 3), bool))

    with pytest.raises(InputError, match=r"task/case\.npz: the segmenter returned masks"):
        evaluate(lazy, [make_case(squares(1, 64, (9, 9, 9)))], build_protocol("objects"))


def test_options_that_mean_nothing_are_refused() -> None:
    for options, message in (
        ({"name": "none"}, "protocol 'none'"),
        ({"millimetres": True}, "medsam"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=message):
            build(**options)


def test_labels_of_another_size_are_refused() -> None:
    case = make_case(squares(1, 64, (9, 9, 9)))
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

    labels = squares(4, 48, (5, 6, 20), (30, 30, 12))
    case = make_case(labels, spacing=(1.0, 1.0, 1.0))
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
