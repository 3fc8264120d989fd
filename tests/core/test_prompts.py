"""Which decoder a set of prompts goes to."""

import numpy as np

from dbsam_deploy.core.prompts import boxes_alone

BOXES = np.array([[3, 4, 40, 30], [10, 5, 55, 41]], np.float32)
POINTS = {"point_coords": np.array([[[30, 20], [2, 2]]]), "point_labels": np.array([[1, 0]])}


def test_boxes_alone_go_to_the_box_decoder() -> None:
    assert boxes_alone({"boxes": BOXES, "mask_input": None}, multimask=False) is BOXES
    for prompts, multimask in (
        ({"boxes": BOXES}, True),
        ({"boxes": BOXES, **POINTS}, False),
        (POINTS, False),
    ):
        assert boxes_alone(prompts, multimask=multimask) is None
