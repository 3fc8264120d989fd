"""LiteMedSAM's weights from end to end: its reference Dice figures, and the export's gate."""

import json
import shutil

import pytest
from rich.console import Console

from dbsam_deploy.evaluation import (
    EvaluationResult,
    build_protocol,
    evaluate,
    find_cases,
    read_cases,
)
from dbsam_deploy.export import ExportOptions, export
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples

TOLERANCE = 0.005


@pytest.fixture(scope="module")
def predictor(lite_medsam_file) -> Predictor:
    loaded = load_model(checkpoint=lite_medsam_file)
    return Predictor(PytorchSession(loaded.model), loaded.preprocessing)


@pytest.fixture(scope="module")
def reference(test_set) -> dict:
    """Task → `objects`, `dice_fp32` and `dice_of_box_itself`."""
    body = json.loads((test_set.parents[1] / "REFERENCE_DICE.json").read_text())
    return {name.removeprefix("dev/"): figures for name, figures in body["tasks"].items()}


def measure(predictor: Predictor, folder) -> EvaluationResult:
    cases = read_cases(find_cases(folder))
    return evaluate(predictor, cases, build_protocol("objects"), with_nsd=False, intervals=False)


@pytest.mark.parametrize(
    ("task", "image", "count", "dice", "box_dice"),
    [
        ("Microscopy_nuclei_HE", "0e21d7b3eea8", 29, 0.8097, 0.5656),  # of the task's two
        pytest.param("Microscopy_nuclei_HE", "*", 36, 0.8163, 0.5840, marks=pytest.mark.slow),
        pytest.param(
            *("Microscopy_nuclei_fluorescence", "*", 49, 0.7236, 0.6485), marks=pytest.mark.slow
        ),
    ],
)
def test_reference_figures_of_a_task(predictor, tmp_path, task, image, count, dice, box_dice):
    """Two tasks whose images are all among the bundled examples, so that no data is needed."""
    for path in bundled_examples().glob(f"{task}_{image}.npz"):
        # The original's name, from which the boxes are drawn.
        shutil.copy(path, tmp_path / path.name.removeprefix(f"{task}_"))
    figures = measure(predictor, tmp_path).summary.objects
    assert figures.count == count
    assert figures.score.box_dsc == pytest.approx(box_dice, abs=1e-4)
    assert figures.score.dsc == pytest.approx(dice, abs=1e-3)


@pytest.mark.slow
@pytest.mark.data
def test_reference_figures_of_all_tasks(predictor, reference, test_set):
    result = measure(predictor, test_set)
    found = {task.task: task for task in result.tasks}
    assert set(found) == set(reference)
    objects = sum(figures["objects"] for figures in reference.values())
    assert result.summary.objects.count == objects == 512
    for name, figures in reference.items():
        score = found[name].mean.score
        assert score.box_dsc == pytest.approx(figures["dice_of_box_itself"], abs=1e-4), name
        assert score.dsc == pytest.approx(figures["dice_fp32"], abs=TOLERANCE), name
    mean = sum(f["objects"] * f["dice_fp32"] for f in reference.values()) / objects
    assert result.summary.objects.score.dsc == pytest.approx(mean, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export_passes_its_gate_with_real_weights(lite_medsam_file, precision, tmp_path):
    """The gate on mask agreement and Dice is inside `export`."""
    options = ExportOptions(precision, checkpoint=lite_medsam_file, output=tmp_path)
    published = export(options, Console(quiet=True))
    assert published.artefact.variant == "lite_medsam"
    assert published.artefact.weights["trained"]
    assert published.figures.empty_masks == 0
    assert published.figures.dice_reference == pytest.approx(0.785, abs=0.005)
