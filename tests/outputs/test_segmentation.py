"""What every format is written from."""

from pathlib import Path

import numpy as np

from dbsam_deploy.images.intensity import to_uint8
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.outputs.segmentation import Segmentation
from dbsam_deploy.prediction.prompts import Prompts
from dbsam_deploy.prediction.results import Result


def test_a_result_of_3d_boxes_has_a_confidence_on_its_own_slices_only() -> None:
    values = np.arange(5 * 8 * 8).reshape(5, 8, 8)
    pixels, intensity = to_uint8(values, None, Path("scan.npz"))
    volume = Volume(Path("scan.npz"), "npz", pixels, intensity)
    labels = np.zeros((5, 8, 8), np.uint8)
    labels[1:3, 2:4] = 1
    result = Result(
        volume,
        Prompts(boxes_3d=np.array([[0, 0, 1, 4, 4, 3], [0, 0, 2, 4, 4, 5]], np.float32)),
        labels,
        ious=np.array([[0.8], [0.6]], np.float32),
        pixels=np.ones((2, 1), np.int64),
        slices=(1, 2, 3, 4),
        blank_slices=(3,),
    )
    made = Segmentation.from_result(result, "db_sam_tiny fp16")
    nan = np.nan
    expected = np.array([[nan, 0.8, 0.8, nan, nan], [nan, nan, 0.6, nan, 0.6]], np.float32)
    assert np.array_equal(made.confidence, expected, equal_nan=True)
    assert [one.label for one in made.objects] == [1, 2]
    assert made.objects[0].name == "box3d 0 0 1 4 4 3"
