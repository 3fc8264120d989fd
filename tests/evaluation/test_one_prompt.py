"""One box a label, carried through drawn volumes by models whose masks are known in advance."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from rich.console import Console
from support.references import as_prediction, bright_in_box, labelled_case

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import EvaluationResult, build_protocol, evaluate
from dbsam_deploy.evaluation.boxes import BoxGrowth
from dbsam_deploy.evaluation.files import write_files
from dbsam_deploy.evaluation.metrics import dice
from dbsam_deploy.evaluation.page import write_page
from dbsam_deploy.evaluation.published import compare
from dbsam_deploy.evaluation.rows import paper_rows
from dbsam_deploy.evaluation.tables import print_result

PROTOCOL = build_protocol("one-prompt")
SPACING = (3.0, 1.0, 1.0)


def ball_and_tube() -> np.ndarray:
    """(11, 64, 64): label 1 grows and shrinks on slices 1–7, label 2 is the same on 4–9."""
    labels = np.zeros((11, 64, 64), np.uint8)
    for z, half in zip(range(1, 8), (6, 7, 8, 9, 8, 7, 6), strict=True):
        labels[z, 20 - half : 20 + half, 20 - half : 20 + half] = 1
    labels[4:10, 40:56, 40:56] = 2
    return labels


def run(model: object, labels: np.ndarray, **case: object) -> EvaluationResult:
    case = {"spacing_mm": SPACING, **case}
    return evaluate(model, [labelled_case(labels, **case)], PROTOCOL, worst=4)  # type: ignore[arg-type]


def test_one_box_finds_the_whole_object_and_only_it() -> None:
    labels = ball_and_tube()
    result = run(bright_in_box, labels)
    for item in result.objects:
        assert item.score.dsc == item.score.oracle_dsc == 1
        assert item.score.nsd == 1
        assert item.slice_index is None
    ball, tube = result.objects
    assert ball.score.box_dsc == pytest.approx(
        dice(np.pad(np.ones((7, 18, 18)), ((1, 3), (11, 35), (11, 35))), labels == 1)
    )
    assert tube.score.box_dsc == 1
    assert ball.score.cvpr24_dsc == pytest.approx(1, abs=0.05)
    assert (result.cases[0].dimensions, result.cases[0].objects) == ("3D", 2)


def test_the_prompt_is_the_box_of_the_largest_slice_and_its_growth_counts() -> None:
    labels = ball_and_tube()
    labels[:, 32:] = 0
    first: list[list[float]] = []

    def model(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        first.append(boxes[0].tolist())
        return bright_in_box(image, boxes)

    run(model, labels)
    assert first[3] == [11, 11, 29, 29]  # slice 4, after the oracle's slices 1 to 3
    first.clear()
    grown = build_protocol("one-prompt", growth=BoxGrowth(16, 16))  # 1 px of 64
    evaluate(model, [labelled_case(labels, spacing_mm=SPACING)], grown)
    assert first[3] == [10, 10, 30, 30]


def creeping(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    """A model that fills its box: the margin is added to the object on each slice."""
    masks = np.zeros((len(boxes), *image.shape[:2]), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    return as_prediction(masks)


def test_what_a_drifting_model_makes_of_one_box_stands_beside_its_oracle() -> None:
    ball, tube = run(creeping, ball_and_tube()).objects
    for item in (ball, tube):
        assert item.score.oracle_dsc == 1
    assert ball.score.cvpr24_dsc is not None
    assert ball.score.cvpr24_dsc < 0.8  # it has nothing against drift
    assert ball.score.dsc > 0.95
    labels = ball_and_tube()
    labels[3:6, 20:30, 8:40] = 1  # a ledge on three slices alone
    (ledge, _) = run(creeping, labels).objects
    assert ledge.score.dsc < 0.9


def test_an_object_that_the_model_does_not_see_counts_as_nothing() -> None:
    def blind(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        return as_prediction(np.zeros((len(boxes), *image.shape[:2]), bool))

    assert [item.score.dsc for item in run(blind, ball_and_tube()).objects] == [0, 0]


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([[1, 1, 0, 9, 9, 2]], "1 boxes, but gts has label 2"),
        ([[1, 1, 9, 9]] * 2, r"boxes \(n, 4\) for 11 slices"),
    ],
)
def test_boxes_of_the_file_that_do_not_fit_are_one_line(boxes: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(bright_in_box, ball_and_tube(), boxes=np.array(boxes, np.float32))


def test_stacks_without_spacing_and_images_are_skipped_and_said() -> None:
    labels = ball_and_tube()
    cases = [
        labelled_case(labels, spacing_mm=SPACING),
        labelled_case(labels, "task/stack.npz"),
        labelled_case(labels[4:5], "task/image.npz", spacing_mm=SPACING),
    ]
    result = evaluate(bright_in_box, cases, PROTOCOL)
    assert len(result.cases) == 1
    skipped = {(item.file, item.reason) for item in result.skipped}
    reason = "file without slices that follow each other at a known distance"
    assert {("task/stack.npz", reason), ("task/image.npz", reason)} <= skipped


def test_the_tables_show_what_stands_beside(tmp_path: object) -> None:
    result = run(bright_in_box, ball_and_tube())
    console = Console(width=100, record=True, file=io.StringIO())
    print_result(console, result, compare(result, paper_rows()))
    text = console.export_text()
    header = next(line for line in text.splitlines() if "DSC" in line and "task" in line)
    assert header.split()[-4:] == ["oracle", "of", "it", "cvpr24"]
    row = next(line for line in text.splitlines() if "mean over objects" in line)
    assert row.split()[-3:-1] == ["100.00", "1.00"]
    other = evaluate(bright_in_box, [labelled_case(ball_and_tube())], build_protocol("objects"))
    console = Console(width=100, record=True, file=io.StringIO())
    print_result(console, other, compare(other, paper_rows()))
    assert "oracle" not in console.export_text()
    assert other.objects[0].score.oracle_dsc is None
    folder = tmp_path / "out"  # type: ignore[operator]
    write_files(folder, result, compare(result, paper_rows()), {"name": "m"})
    with (folder / "objects.csv").open(newline="") as stream:
        assert next(csv.DictReader(stream))["oracle_dsc"] == "1.000000"
    page = write_page(
        folder / "page.html", result, compare(result, paper_rows()), {"name": "m"}
    ).read_text()
    assert "<th>oracle</th><th>of it</th><th>cvpr24</th>" in page
