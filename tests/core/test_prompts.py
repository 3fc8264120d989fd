"""Which decoder a set of prompts goes to."""

import numpy as np

from dbsam_deploy.core.prompts import boxes_alone

BOXES = np.array([[3, 4, 40, 30], [10, 5, 55, 41]], np.float32)
POINTS = {"point_coords": np.array([[[30, 20], [2, 2]]]), "point_labels": np.array([[1, 0]])}


def test_boxes_alone_go_to_the_box_decoder() -> None:
    for more in ({}, {"mask_input": None}, {"multimask": False, "adapt_points": False}):
        assert boxes_alone(boxes=BOXES, **more) is BOXES
    for asked in (
        {"boxes": BOXES, "multimask": True},
        {"boxes": BOXES, **POINTS},
        {"boxes": BOXES, "no_prompt": 1},  # whoever takes the prompts refuses it
        POINTS,
    ):
        assert boxes_alone(**asked) is None
