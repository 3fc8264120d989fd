"""A drawn volume whose object shows every exchange and flip of axes, and sessions on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.scans import ScanGeometry
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.label_map import AboutModel
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.stop_rules import ChainRule

from .bright import BrightPredictor
from .dicom_series import rotation

DEPTH, HEIGHT, WIDTH = SHAPE = (14, 40, 50)
SPACING = (3.0, 1.0, 1.0)
BOX = [12, 8, 40, 25]
"""Around the object on every stored slice."""
WIDE = ChainRule(margin_px=300, min_overlap=0, follow_image=False)
"""The next box is the whole slice, so nothing of an object is missed, however it changes."""
AXES = {"stored": 0, "coronal": 1, "sagittal": 2}
ACQUIRED = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
    "sagittal": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], float),
    "oblique": rotation(25, -15, 10),
    "left-handed": np.diag([-1.0, 1, 1]) @ rotation(10, 20, -15),
}
"""Columns: the patient directions (left, posterior, superior) of x, y and z."""


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


def affine_of(directions: np.ndarray, spacing_xyz: tuple[float, ...]) -> np.ndarray:
    """Voxels → mm right, anterior, superior; the directions are DICOM's, of x, y and z."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ directions @ np.diag(spacing_xyz)
    affine[:3, 3] = [-31.5, 12.25, 300]
    return affine


def bright(truth: np.ndarray | None = None, **options) -> VolumePredictor:
    volume = scan(wedge() if truth is None else truth, options.pop("affine", None))
    options = {"about": AboutModel("bright"), "rule": WIDE, **options}
    return VolumePredictor(BrightPredictor(), volume, **options)


def tight(mask: np.ndarray, margin: int = 1) -> list[float]:
    """x0, y0, x1, y1 around a slice's mask, in the order columns, rows."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    low = [max(0, columns[0] - margin), max(0, rows[0] - margin)]
    high = [min(mask.shape[1], columns[-1] + 1 + margin), min(mask.shape[0], rows[-1] + 1 + margin)]
    return [*low, *high]
