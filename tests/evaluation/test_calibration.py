"""Predicted against true IoU, what a least confidence does, and what is to be looked at first."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.datasets.cases import LabelledCase
from dbsam_deploy.evaluation import build_protocol, evaluate
from dbsam_deploy.evaluation.boxes import BoxGrowth
from dbsam_deploy.evaluation.calibration import POOR_DSC, calibrate, first_to_look_at
from dbsam_deploy.evaluation.plots import reliability_plot
from dbsam_deploy.evaluation.results import ObjectResult, Score
from dbsam_deploy.evaluation.tables import calibration_line, flagging_rows
from dbsam_deploy.images.volumes import Volume


def found(predicted: float | None, true: float) -> ObjectResult:
    score = Score(2 * true / (1 + true), None, 0.5, None)
    return ObjectResult("t", "t/a.npz", 1, "", 0, 100, (0, 0, 9, 9), score, predicted)


def test_the_error_is_that_of_the_bins() -> None:
    objects = [found(0.95, 0.9), found(0.93, 0.8), found(0.15, 0.55), found(0.1, 0.45)]
    result = calibrate([*objects, found(None, 0.3)])
    assert result is not None
    assert result.count == 4
    assert [one.count for one in result.bins] == [2, 2]
    # |0.94 - 0.85| and |0.125 - 0.5|, each of half of the objects
    assert result.error == pytest.approx(0.5 * 0.09 + 0.5 * 0.375)
    assert result.bias == pytest.approx(np.mean([0.05, 0.13, -0.4, -0.35]))
    assert "23.25 points off" in calibration_line(result)
    assert "too low" in calibration_line(result)


def test_a_model_that_knows_itself_has_no_error() -> None:
    values = np.random.default_rng(0).uniform(0, 1, 200)
    result = calibrate([found(value, value) for value in values])
    assert result is not None
    assert result.error == pytest.approx(0, abs=1e-12)
    assert sum(one.count for one in result.bins) == 200
    edges = calibrate([found(1.0, 1.0), found(0.0, 0.0), found(1.2, 1.0), found(-0.1, 0.0)])
    assert edges is not None  # a decoder's estimate may leave 0–1
    assert edges.error == 0


def test_what_a_least_confidence_does() -> None:
    poor, good = POOR_DSC / (2 - POOR_DSC) - 0.1, 0.9
    result = calibrate([found(0.55, poor), found(0.95, poor), found(0.65, good), found(0.9, good)])
    assert result is not None
    flagged = {one.least: one for one in result.flaggings}
    assert (flagged[0.5].flagged, flagged[0.5].caught) == (0, 0)
    assert (flagged[0.6].flagged, flagged[0.6].caught) == (0.25, 0.5)
    assert (flagged[0.7].flagged, flagged[0.7].caught) == (0.5, 0.5)
    rest = [2 * iou / (1 + iou) for iou in (poor, good)]
    assert flagged[0.7].dsc_of_rest == pytest.approx(np.mean(rest))
    assert flagging_rows(result)[0][:3] == ("0.5", "0.00", "0.00")
    certain = calibrate([found(0.3, good)])
    assert certain is not None
    assert certain.flaggings[0].caught is None  # nothing poor to catch
    assert certain.flaggings[0].dsc_of_rest is None


def test_nothing_predicted_is_nothing_to_calibrate() -> None:
    assert calibrate([found(None, 0.5)]) is None
    assert calibration_line(None) == ""


@pytest.mark.parametrize("protocol", ["objects", "medsam"])
def test_the_models_own_estimate_is_kept_with_its_object(protocol) -> None:
    labels = np.zeros((1, 256, 256), np.uint8)
    labels[0, 20:60, 20:60], labels[0, 100:180, 100:180] = 1, 2
    case = LabelledCase("t", "t/a.npz", Volume(Path("a"), "npz", labels, "as stored"), labels, {})

    def segment(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        masks = np.stack([image[..., 0] == (2 if box[0] > 50 else 1) for box in boxes])[:, None]
        ious = np.array([[0.25 if box[0] > 50 else 0.75] for box in boxes], np.float32)
        return Prediction(masks.astype(np.uint8), ious, np.where(masks, 1, -1).astype(np.float32))

    settings = build_protocol(protocol, growth=BoxGrowth(0, 0))
    result = evaluate(segment, [case], settings, with_nsd=False)
    assert [(o.label, o.predicted_iou, o.true_iou) for o in result.objects] == [
        (1, 0.75, 1),
        (2, 0.25, 1),
    ]
    assert [o.label for o in first_to_look_at(result)] == [2, 1]


def test_the_plot_is_the_same_every_time() -> None:
    result = calibrate([found(0.9, 0.8), found(0.2, 0.4)])
    assert result is not None
    text = reliability_plot(result)
    assert text == reliability_plot(result)
    assert "<!-- predicted IoU -->" in text
