"""A session on a drawn volume."""

from __future__ import annotations

import pytest
from support.wedge import bright

from dbsam_deploy.volumes.session import VolumePredictor


@pytest.fixture
def session() -> VolumePredictor:
    """On the wedge, with a model that finds what is bright."""
    return bright()
