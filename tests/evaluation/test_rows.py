"""Rows of published tables: which objects answer them, and users' own."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.datasets.cases import LabelledCase
from dbsam_deploy.evaluation import build_protocol, evaluate
from dbsam_deploy.evaluation.published import AVERAGES, compare, our_average
from dbsam_deploy.evaluation.rows import PublishedRow, paper_rows, read_rows, rows_with
from dbsam_deploy.images.volumes import Volume

ROWS = paper_rows()


def names(path: str, label: str, dimensions: str = "3D", rows=ROWS) -> list[str]:
    return [row.name for row in rows if row.answers(path, label, dimensions)]


def case(name: str, label_names: dict[int, str], depth: int) -> LabelledCase:
    labels = np.zeros((depth, 64, 64), np.uint8)
    labels[:, 4:20, 10:40], labels[:, 30:40, 10:40] = 1, 2 if len(label_names) > 1 else 0
    volume = Volume(Path(name), "npz", labels, "as stored")
    return LabelledCase(name.rpartition("/")[0], name, volume, labels, label_names)


def nothing(image, boxes) -> Prediction:
    masks = np.zeros((len(boxes), 1, *image.shape[:2]), np.uint8)
    return Prediction(masks, np.ones((len(boxes), 1), np.float32), masks.astype(np.float32))


def test_the_papers_tasks() -> None:
    kinds = [row.dimensions for row in ROWS]
    assert (kinds.count("3D"), kinds.count("2D")) == (21, 9)
    assert len({row.name for row in ROWS}) == 30
    known = {row.name: row.dsc for row in ROWS if row.dsc is not None}
    assert len(known) == 11
    assert known["Left Ventricle MR"] == 91.15
    assert known["Brain Ventricles MR-T1"] == 78.95
    figures = {(a.model, a.dimensions): (a.tasks, a.dsc, a.nsd) for a in AVERAGES}
    assert figures["DB-SAM", "3D"] == (21, 87.05, 85.31)
    assert figures["MedSAM", "2D"] == (9, 77.22, 83.17)
    # the gain that the paper's abstract names is the NSD's
    gain = figures["DB-SAM", "3D"][2] - figures["MedSAM", "3D"][2]
    assert gain == pytest.approx(8.77)


@pytest.mark.parametrize(
    ("path", "label", "expected"),
    [
        ("MR_cardiac_LV/a.npz", "left ventricle (endocardial)", ["Left Ventricle MR"]),
        ("MR_abdomen_3D/b.npz", "Gallbladder", ["Gallbladder MR"]),
        ("nested/mri/x_T1.nii.gz", "lateral-ventricles", ["Brain Ventricles MR-T1"]),
        ("MR_brain_T2/x.npz", "cerebellum", ["Cerebellum MR-T2"]),
        ("MR_brain_T1c/x.npz", "cerebellum", []),  # T1c is not T1
        ("MR_brain_tumour_FLAIR_3D/x.npz", "whole tumour", ["Brain Tumor MR-FLAIR"]),
        ("MR_FLAIR/x.npz", "whole tumour", []),  # of what, nothing says
        ("CT_abdomen_3D/x.npz", "liver", ["Liver CT"]),
        ("abdomen/x.npz", "liver", []),  # of which modality, nothing says
        ("CT_abdomen_3D/x.npz", "liver lesion", []),  # not the liver
        ("Liver_MR/x.npz", "", ["Liver MR"]),  # labels without names: the path says it
        ("Liver_MR/x.npz", "spleen", []),
        ("CTA_1/PET/x.npz", "pancreas", []),
    ],
)
def test_a_row_is_answered_by_its_own_words_alone(path, label, expected) -> None:
    assert names(path, label) == expected


def test_volumes_and_images_answer_different_tables() -> None:
    assert names("US_breast_tumour/x.npz", "tumour", "2D") == ["Breast Tumor Ultrasound"]
    assert names("US_breast_tumour/x.npz", "tumour", "3D") == []
    assert names("CT_slice/x.npz", "liver", "2D") == []


def test_ours_stands_beside_the_papers() -> None:
    cases = [
        case("MR_heart/a.npz", {1: "left ventricle", 2: "right ventricle"}, 3),
        case("MR_heart/b.npz", {1: "left ventricle"}, 2),
        case("other/c.npz", {1: "thing"}, 1),
    ]
    found = evaluate(nothing, cases, build_protocol("objects"), with_nsd=False)
    rows = {item.row.name: (item.count, item.task) for item in compare(found, ROWS)}
    assert rows == {"Left Ventricle MR": (5, "MR_heart"), "Right Ventricle MR": (3, "MR_heart")}


def test_our_average_needs_every_task() -> None:
    images = [row for row in ROWS if row.dimensions == "2D"]
    cases = [
        case(f"{row.modality[0]} {(*row.region, '')[0]}/{i}.npz", {1: row.structures[0]}, 1)
        for i, row in enumerate(images)
    ]
    found = evaluate(nothing, cases, build_protocol("objects"), with_nsd=False)
    filled = compare(found, ROWS)
    assert our_average("2D", filled) == pytest.approx(found.task_mean)
    assert our_average("2D", filled[1:]) is None
    assert our_average("3D", filled) is None


OWN = """
[[row]]
name = "Spleen CT"
dimensions = "3D"
modality = ["CT"]
structures = ["spleen"]
dsc = 90

[[row]]
name = "Liver MR"
dimensions = "3D"
files = ["hospital/*"]
structures = ["hepar"]
"""


def test_rows_of_ones_own_come_after_the_papers_or_in_their_place(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    rows = rows_with(path)
    assert len(rows) == 31
    own = PublishedRow("Spleen CT", "3D", ("spleen",), ("CT",), dsc=90.0, is_papers=False)
    assert rows[-1] == own
    assert names("CT_x/a.npz", "spleen", rows=rows) == ["Spleen CT"]
    assert names("hospital/a.npz", "hepar", rows=rows) == ["Liver MR"]
    assert names("MR_x/a.npz", "liver", rows=rows) == []
    assert rows_with(None) == ROWS


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("[[row]]", "[row"), "rows"),
        (("[[row]]", "[[rows]]"), "expected [[row]] tables"),
        (('name = "Spleen CT"', "name = 3"), "name = 3; expected the row's name"),
        (('dimensions = "3D"', 'dimensions = "4D"'), "dimensions = '4D'; expected '3D' or '2D'"),
        (('modality = ["CT"]', "color = 1"), "unknown key 'color'"),
        (('modality = ["CT"]', ""), "expected structures, and modality or files"),
        (('["spleen"]', '"spleen"'), "structures = 'spleen'; expected a list of texts"),
        (("dsc = 90", "dsc = 900"), "dsc = 900; expected per cent"),
        (('"Liver MR"', '"Spleen CT"'), "'Spleen CT' is there twice"),
    ],
)
def test_rows_that_cannot_be_read_are_one_line(change, text, tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(*change))
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert text in caught.value.message
    assert "own.toml" in caught.value.message
