"""Boxes on an image that is known → masks in the image frame: a click, and 32 boxes at once."""

import numpy as np
import pytest

from dbsam_deploy.prediction.predictor import Predictor


@pytest.mark.parametrize("count", [1, 32], ids=["click", "32_boxes"])
def test_boxes(benchmark_ratio, subject, case, check_masks, count) -> None:
    height, width = case.image.shape[:2]
    shifts = np.random.default_rng(0).integers(-2, 3, (count, 4))
    around = case.boxes[np.arange(count) % len(case.boxes)] + shifts
    boxes = np.clip(around, 0, [width, height, width, height]).astype(np.float32)
    ours, reference = (
        Predictor(session, subject.artefact.preprocessing)
        for session in (subject.onnxruntime, subject.pytorch)
    )
    for predictor in (ours, reference):
        predictor.set_image(case.image)
    expected = reference.predict_boxes(boxes).masks[:, 0]
    benchmark_ratio(
        lambda: ours.predict_boxes(boxes).masks[:, 0], lambda masks: check_masks(masks, expected)
    )
