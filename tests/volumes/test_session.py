"""A volume prompted again and again: what changes, what stays, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.bright import BrightPredictor

from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.scans import ScanGeometry
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.stop_rules import ChainRule

DEPTH, HEIGHT, WIDTH = SHAPE = (14, 40, 50)
SPACING = (3.0, 1.0, 1.0)
BOX = [12, 8, 40, 25]
WIDE = ChainRule(margin_px=30)
"""A box on the next slice that holds the whole object there."""


def wedge(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """An object that no flip or exchange of axes maps onto itself."""
    truth = np.zeros(shape, bool)
    truth[3:9, 10:22, 15:35] = True
    truth[3:5, 10:13, 30:38] = True
    truth[6:9, 18:22, 15:20] = False
    return truth


def scan(truth: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    pixels = np.where(truth, 200, 20).astype(np.uint8)
    pixels[:, 0, 0] = 60  # no slice holds one value
    place = None if affine is None else ScanGeometry(affine, truth.shape[::-1])
    spacing = SPACING
    if affine is not None:
        spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    return Volume(Path("ct.nii"), "nifti", pixels, STORED, spacing_mm=spacing, geometry=place)


@pytest.fixture
def session() -> VolumePredictor:
    return VolumePredictor(BrightPredictor(), scan(wedge()), model="bright", rule=WIDE)


def test_one_box_gives_the_object(session):
    change = session.prompt(1, box=BOX, index=5)
    assert (change.labels, change.axis, change.slices) == ((1,), 0, (5,))
    assert change.changed == ((5, 6), (10, 22), (15, 35))
    carried = session.propagate()
    assert carried.slices == (3, 4, 6, 7, 8)
    assert [(end.last, end.reason) for end in carried.ends] == [
        (8, "slice 9: the mask is empty"),
        (3, "slice 2: the mask is empty"),
    ]
    found = session.segmentation()
    np.testing.assert_array_equal(found.labels, wedge())
    assert found.labels.dtype == np.uint8
    decoded = np.isfinite(found.confidence[0])
    np.testing.assert_array_equal(decoded, wedge().any((1, 2)))
    np.testing.assert_allclose(found.confidence[0, decoded], 0.9)
    assert (found.model, found.objects[0].name) == ("bright", "object 1")
