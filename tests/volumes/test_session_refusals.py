"""What a session on a volume refuses, in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.wedge import BOX, WIDE, scan, wedge

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.stop_rules import ChainRule

WRONG = {
    "nothing": ({}, "no prompt: give a box, points or a 3D box"),
    "labels alone": ({"labels": [1], "box": BOX, "index": 1}, "labels go with points"),
    "no slice": ({"box": BOX}, "slice None: expected a whole number, 0–13"),
    "half a slice": ({"box": BOX, "index": 2.5}, "slice 2.5: expected a whole number"),
    "a slice beyond": ({"box": BOX, "index": 14}, r"slice 14: .*ct.nii has 0–13"),
    "below": ({"box": BOX, "index": -1}, "slice -1"),
    "a box outside": ({"box": [1, 1, 51, 9], "index": 1}, "outside the image: .*x in 0–50"),
    "a box across": ({"box": [1, 1, 9, 15], "index": 1, "plane": "coronal"}, "y in 0–14"),
    "an empty box": ({"box": [9, 1, 9, 9], "index": 1}, "x0 < x1"),
    "a box of nothing": ({"box": [np.nan] * 4, "index": 1}, "finite"),
    "three numbers": ({"box": [1, 2, 3], "index": 1}, "box .*expected 4 numbers"),
    "a point outside": ({"points": [[50.5, 3]], "index": 1}, "outside the image of 50×40"),
    "a point below": ({"points": [[5, 3, -0.5]]}, "outside the volume"),
    "two slices": ({"points": [[5, 3, 1], [5, 3, 4]]}, "on slices 1, 4 of the plane"),
    "another slice": ({"points": [[5, 3, 1]], "index": 2}, "slice 2, but .* on slice 1"),
    "labels of others": ({"points": [[5, 3]], "labels": [1, 0], "index": 1}, "point_labels"),
    "a third label": ({"points": [[5, 3]], "labels": [2], "index": 1}, "expected only -1, 0"),
    "millimetres": ({"points": [[5, 3, 1]], "space": "lps"}, "no position in space"),
    "an odd space": ({"points": [[5, 3, 1]], "space": "mm"}, "space 'mm'"),
    "an odd plane": ({"box": BOX, "index": 1, "plane": "oblique"}, "plane 'oblique'"),
    "a 3D box and more": ({"box_3d": [1, 1, 1, 9, 9, 9], "index": 3}, "stands alone"),
    "a flat 3D box": ({"box_3d": [1, 1, 5, 9, 9, 5]}, "first below"),
    "a 3D box outside": ({"box_3d": [1, 1, 5, 9, 9, 15]}, "within 0–14"),
    "a wide 3D box": ({"box_3d": [1, 1, 5, 99, 9, 8]}, "outside the image"),
    "odd logits": ({"box": BOX, "index": 1, "mask_input": [[1, 2]]}, "mask_input"),
}


@pytest.mark.parametrize(("prompt", "message"), WRONG.values(), ids=WRONG)
def test_prompts_that_are_none(prompt, message, tiny_artefact):
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    with (
        VolumePredictor(predictor, scan(wedge()), encode_ahead=False) as session,
        pytest.raises(InputError, match=message),
    ):
        session.prompt(1, **prompt)
    assert session.objects == ()


def test_without_spacing_only_stored_slices_have_a_shape():
    volume = Volume(Path("a.npz"), "npz", scan(wedge()).pixels, STORED)
    session = VolumePredictor(BrightPredictor(), volume, rule=WIDE)
    with pytest.raises(InputError, match=r"a\.npz: the distance between its voxels is unknown"):
        session.prompt(1, box=[1, 1, 9, 9], index=5, plane="coronal")
    session.prompt(1, box=BOX, index=5, plane="axial")
    session.propagate()
    np.testing.assert_array_equal(session.mask(1), wedge())


@pytest.mark.parametrize("spacing", [(1, 0, 0), (np.inf, 1, 1), (1, np.nan, 1)])
def test_a_spacing_that_cannot_be_does_not_stop_what_follows_the_image(spacing):
    volume = Volume(Path("a.npz"), "npz", scan(wedge()).pixels, STORED, spacing_mm=spacing)
    session = VolumePredictor(BrightPredictor(), volume)
    session.prompt(1, box=BOX, index=5)
    session.propagate(rule=ChainRule(margin_mm=2.0))
    assert session.mask(1).any((1, 2)).sum() > 1


@pytest.mark.parametrize("label", [0, -3, 70000, 1.5])
def test_labels_that_no_map_holds(session, label):
    with pytest.raises(InputError, match="expected a whole number from 1 to 65535"):
        session.add_object("x", label=label)


def test_nothing_yet(session):
    for call in (session.segmentation, session.undo, session.propagate):
        with pytest.raises(InputError):
            call()
    for call in (session.mask, session.clear, session.confidence):
        with pytest.raises(InputError, match="object 1: no such object"):
            call(1)
