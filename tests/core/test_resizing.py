"""Resizing by area against what OpenCV made."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.resizing import area_resize


@pytest.mark.parametrize(
    ("size", "target", "channel", "expected"),
    [
        (
            (5, 7),
            (3, 4),
            0,
            [[51, 168, 139, 110], [66, 183, 154, 124], [80, 109, 168, 139]],
        ),
        (  # halved: ties go up
            (6, 8),
            (3, 4),
            2,
            [[124, 114, 104, 94], [108, 162, 152, 142], [92, 146, 136, 126]],
        ),
    ],
)
def test_area_resize_equals_opencv(
    size: tuple[int, int], target: tuple[int, int], channel: int, expected: list[list[int]]
) -> None:
    """Recorded from `cv2.resize(..., interpolation=cv2.INTER_AREA)`, OpenCV 5.0.0."""
    step = {(5, 7): 37, (6, 8): 41}[size]
    image = (np.arange(size[0] * size[1] * 3).reshape(*size, 3) * step % 256).astype(np.uint8)
    assert area_resize(image, target)[..., channel].tolist() == expected


def test_area_resize_rounds_ties_as_opencv() -> None:
    halved = np.zeros((2, 4, 1), np.uint8)
    halved[0, 0] = halved[0, 2] = 2  # means 0.5 and 0.5, then 2.5
    halved[:, 2:] += 2
    assert area_resize(halved, (1, 2))[..., 0].tolist() == [[1, 3]]
    quartered = np.zeros((4, 8, 1), np.uint8)
    quartered[0, 0] = quartered[0, 4] = 8
    quartered[:, 4:] += 1  # means 0.5 and 1.5
    assert area_resize(quartered, (1, 2))[..., 0].tolist() == [[0, 2]]
