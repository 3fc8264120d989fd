"""Published figures, tables, CSV, JSON and the HTML page."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import EvaluationResult, LabelledCase, build_protocol, evaluate
from dbsam_deploy.evaluation.boxes import fill_box
from dbsam_deploy.evaluation.files import write_files
from dbsam_deploy.evaluation.page import write_page
from dbsam_deploy.evaluation.plots import overlay_png, task_plot
from dbsam_deploy.evaluation.published import compare
from dbsam_deploy.evaluation.rows import paper_rows
from dbsam_deploy.evaluation.tables import print_result
from dbsam_deploy.images.overlays import COLOURS
from dbsam_deploy.images.volumes import Volume

MODEL = {"name": "a <model> & more", "backend": "test"}
HEART = "left ventricle (endocardial)"


def case(name: str, label_names: dict[int, str], depth: int = 1) -> LabelledCase:
    labels = np.zeros((depth, 64, 64), np.uint8)
    for label in label_names:
        labels[:, 4 + 20 * (label - 1) : 20 + 20 * (label - 1), 10:40] = label
    pixels = np.where(labels > 0, 200, 50).astype(np.uint8)
    volume = Volume(Path(name), "npz", pixels, "as stored")
    return LabelledCase(name.rpartition("/")[0], name, volume, labels, label_names)


def upper_half(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    """A model that finds the upper half of each box, or nothing below row 40."""
    masks = np.stack([fill_box(box, image.shape[:2], inclusive=False) for box in boxes])
    for mask, box in zip(masks, boxes, strict=True):
        mask[int(box[1] + box[3]) // 2 if box[1] < 40 else 0 :] = False
    logits = np.where(masks, 1, -1).astype(np.float32)[:, None]
    ious = np.ones((len(boxes), 1), np.float32)
    return Prediction(masks[:, None].astype(np.uint8), ious, logits)


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    cases = [
        case("MR_cardiac_LV/heart.npz", {1: HEART}, depth=3),
        case("XRay_chest/lungs.npz", {1: "left lung", 2: "right lung"}),
        case("other/<b>.npz", {1: "thing", 3: "low thing"}),
    ]
    return evaluate(upper_half, cases, build_protocol("objects"), worst=12, max_slices=2)


def test_the_console(result: EvaluationResult) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_result(console, result, compare(result, paper_rows()))
    text = console.export_text()
    lines = text.splitlines()
    (heart,) = [line for line in lines if line.strip().startswith("MR_cardiac_LV")]
    task = next(task for task in result.tasks if task.task == "MR_cardiac_LV")
    assert f"{100 * task.mean.score.dsc:.2f}" in heart
    assert f"{100 * task.mean.score.box_dsc:.2f}" in heart
    assert "▼" in heart
    (row,) = [line for line in lines if "Left Ventricle MR" in line]
    assert "91.15" in row
    assert "Liver" not in text  # a row without data is not there
    assert "NSD within 2 px" in " ".join(text.split())
    assert "not comparable" in text
    assert f"calibration: over {len(result.objects)} objects the predicted IoU is" in text
    assert "limit of 2: 1 in MR_cardiac_LV/heart.npz" in text
    assert "The paper's own protocol is medsam." in text
    assert "0 of 3" in text


def test_the_papers_figures_are_printed_where_they_are_asked_for() -> None:
    cases = [case("other/x.npz", {1: "thing"})]
    found = evaluate(upper_half, cases, build_protocol("objects"), with_nsd=False)
    texts = []
    for comparisons in (None, compare(found, paper_rows())):
        console = Console(width=80, record=True, file=io.StringIO())
        print_result(console, found, comparisons)
        texts.append(console.export_text())
    assert "published" not in texts[0]
    assert "published: none of the rows has data here" in texts[1]
    assert "DB-SAM" not in texts[1]


def test_csv_and_json(result: EvaluationResult, tmp_path: Path) -> None:
    paths = write_files(tmp_path / "out", result, compare(result, paper_rows()), MODEL)
    assert sorted(path.name for path in paths) == [
        "cases.csv",
        "evaluation.json",
        "objects.csv",
        "tasks.csv",
    ]

    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((tmp_path / "out" / name).read_text().splitlines()))

    objects, cases, tasks = (rows(f"{name}.csv") for name in ("objects", "cases", "tasks"))
    assert (len(objects), len(cases), len(tasks)) == (len(result.objects), 3, 3)
    for row, item in zip(objects, result.objects, strict=True):
        assert (row["file"], int(row["label"])) == (item.file, item.label)
        assert row["label_name"] == item.label_name
        assert float(row["dsc"]) == pytest.approx(item.score.dsc, abs=1e-6)
        assert float(row["nsd"]) == pytest.approx(item.score.nsd, abs=1e-6)
        assert float(row["predicted_iou"]) == 1
        assert float(row["true_iou"]) == pytest.approx(item.true_iou, abs=1e-6)
        assert float(row["box_dsc"]) == pytest.approx(item.score.box_dsc, abs=1e-6)
        assert [float(v) for v in row["box"].split()] == pytest.approx(item.box, rel=1e-4)
    assert [row["below_box"] for row in tasks] == ["True"] * 3
    for row, task in zip(tasks, result.tasks, strict=True):
        interval = task.mean.dsc_interval
        assert interval is not None
        assert float(row["dsc_low"]) == pytest.approx(interval.low, abs=1e-6)
        assert row["interval_of"] == "objects"
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert body["model"] == MODEL
    assert body["settings"]["protocol"] == "objects"
    assert body["settings"]["box_growth_px_at_1024"] == [0, 20]
    assert body["summary"]["objects"]["score"]["dsc"] == result.object_mean
    assert len(body["objects"]) == len(result.objects)
    assert body["calibration"]["count"] == len(result.objects)
    assert body["skipped"][0]["count"] == 1
    assert body["published"]["averages_percent"][0]["dsc"] == 87.05
    names = [row["row"]["name"] for row in body["published"]["tasks"]]
    assert names == ["Left Ventricle MR", "Lungs X-Ray"]


class _Page(HTMLParser):
    """Collects what a page would load, its tags and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("img", "script", "link", "iframe"):
            self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(result: EvaluationResult, tmp_path: Path) -> None:
    path = write_page(tmp_path / "evaluation.html", result, compare(result, paper_rows()), MODEL)
    page = _Page()
    page.feed(path.read_text())
    assert len(page.loaded) == len(result.worst) > 0
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 2  # tasks, and how far the predicted IoU can be believed
    assert "b" not in page.tags  # the file called <b> stays text
    for words in (
        "a <model> & more",
        "other/<b>.npz",
        "Left Ventricle MR",
        "91.15",
        "NSD within 2 px",
    ):
        assert words in page.text
    assert "limit of 2" in page.text
    with Image.open(io.BytesIO(base64.b64decode(page.loaded[0].partition(",")[2]))) as picture:
        assert picture.width >= 480


def test_the_plot_names_every_task_and_is_the_same_every_time(result: EvaluationResult) -> None:
    text = task_plot(result)
    assert text == task_plot(result)
    for name in ("MR_cardiac_LV", "XRay_chest", "other"):
        assert f"<!-- {name} -->" in text
    assert text.count("<!-- Dice -->") == text.count("<!-- NSD -->") == 1


def test_the_plot_without_nsd() -> None:
    found = evaluate(
        upper_half, [case("a/x.npz", {1: "a"})], build_protocol("objects"), with_nsd=False
    )
    assert "<!-- NSD -->" not in task_plot(found)


def test_an_overlay_shows_what_was_missed(result: EvaluationResult) -> None:
    worst = result.worst[0]
    assert worst.result.score.dsc == 0
    with Image.open(io.BytesIO(overlay_png(worst))) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert COLOURS[0] in colours  # missed
    assert COLOURS[2] in colours  # the box
    assert re.search(r"low thing", worst.result.label_name)
