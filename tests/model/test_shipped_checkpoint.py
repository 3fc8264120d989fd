"""The checkpoint that ships: size, provenance, and masks better than the boxes they came from."""

import json
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.evaluation import (
    EvaluationResult,
    build_protocol,
    evaluate,
    find_cases,
    read_cases,
)
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.model.weights import load_model, shipped_checkpoint
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples

SPLIT = resource_dir("export") / "training" / "dev_split.json"
TEST_SET = Path(__file__).resolve().parents[3] / "shared/data/testset/dev"
UNSEEN_TASKS = {
    "CT_abdomen_3D",
    "MR_brain_T2_structures_3D",
    "MR_brain_tumour_T1c_3D",
    "MR_spinal_cord_3D",
    "XRay_chest",
}
"""Tasks without a training file."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    loaded = load_model()
    assert loaded.weights["trained"]
    return Predictor(PytorchSession(loaded.model), loaded.preprocessing)


def _dice_and_box(result: EvaluationResult) -> tuple[float, float]:
    scores = [item.score for item in result.objects]
    return float(np.mean([s.dsc for s in scores])), float(np.mean([s.box_dsc for s in scores]))


def test_the_card_names_this_file_and_its_figures() -> None:
    path = shipped_checkpoint()
    card = path.with_name("MODEL_CARD.md").read_text()
    assert sha256_of(path) in card
    assert "Not a medical device" in card
    assert path.stat().st_size <= 25_000_000


def test_no_file_is_in_both_parts_of_the_split() -> None:
    split = json.loads(SPLIT.read_text())
    assert not set(split["train"]) & set(split["validation"])
    trained = {name.split("/")[0] for name in split["train"]}
    assert {name.split("/")[0] for name in split["validation"]} - trained == UNSEEN_TASKS


def test_more_files_leave_validation_as_it_was() -> None:
    first = json.loads(SPLIT.read_text())
    more = json.loads(SPLIT.with_name("testset_split.json").read_text())
    assert not set(more["train"]) & set(more["validation"])
    for part, names in first.items():
        assert more[part][: len(names)] == [f"dev/{name}" for name in names]
    added = set(more["train"]) - {f"dev/{name}" for name in first["train"]}
    kept = {name.rpartition("/")[0] for name in more["validation"]}
    assert {name.rpartition("/")[0] for name in added} <= kept  # a patient of the kind stays


@pytest.mark.parametrize(
    "kinds",
    [
        ("Microscopy_nuclei_HE_01",),
        pytest.param(("",), marks=pytest.mark.slow),
    ],
    ids=["colour", "all"],
)
def test_masks_of_the_bundled_images_are_better_than_their_boxes(predictor, kinds) -> None:
    """At 1024 px, as the model is used."""
    found = [case for case in find_cases(bundled_examples()) if case.name.startswith(kinds)]
    result = evaluate(
        predictor,
        read_cases(found),
        build_protocol("objects"),
        max_slices=1,
        with_nsd=False,
        intervals=False,
    )
    dice, box = _dice_and_box(result)
    assert len(found) == (5 if kinds == ("",) else 1)
    assert len(result.objects) >= 7 * len(found)
    assert dice > box + 0.05
    assert dice >= 0.70


@pytest.mark.slow
@pytest.mark.data
def test_the_validation_files_meet_the_bar(predictor) -> None:
    files = find_cases(TEST_SET, split=SPLIT, subset="validation")
    result = evaluate(
        predictor, read_cases(files), build_protocol("objects"), with_nsd=False, intervals=False
    )
    assert _dice_and_box(result)[0] >= 0.70
    better = 0
    for task in {item.task for item in result.objects}:
        own = [item.score for item in result.objects if item.task == task]
        better += np.mean([s.dsc for s in own]) > np.mean([s.box_dsc for s in own])
    assert better >= 10
