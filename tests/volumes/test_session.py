"""A volume prompted again and again: any plane, any space, what changes and how it is undone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.wedge import (
    ACQUIRED,
    AXES,
    BOX,
    SHAPE,
    SPACING,
    WIDE,
    affine_of,
    bright,
    scan,
    tight,
    wedge,
)

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import upscale_logits
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.embeddings import SharedPredictor
from dbsam_deploy.volumes.frames import plane_axis, to_patient
from dbsam_deploy.volumes.session import VolumePredictor


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


INDEX = {"stored": 4, "coronal": 12, "sagittal": 31}


def corners_3d(plane: str, index: int, box: list[float]) -> np.ndarray:
    """Two opposite corners x, y, z of a slice's box, in the middle of that slice."""
    rows, columns = (axis for axis in range(3) if axis != AXES[plane])
    places = np.full((2, 3), index + 0.5)
    places[:, 2 - columns], places[:, 2 - rows] = box[::2], box[1::2]
    return places


@pytest.mark.parametrize("plane", AXES)
@pytest.mark.parametrize("step", [1.0, 0.7, 2.5, 7.3])
def test_a_slice_of_any_plane_is_exact_and_carried_to_the_whole_object(plane, step):
    affine = affine_of(np.eye(3), (0.8, 1.0, step))
    session, axis = bright(affine=affine), AXES[plane]
    truth = np.take(wedge(), INDEX[plane], axis)
    change = session.prompt(1, box=tight(truth), index=INDEX[plane], plane=plane)
    assert change.axis == axis
    expected = np.zeros(SHAPE, bool)
    np.moveaxis(expected, axis, 0)[INDEX[plane]] = truth
    np.testing.assert_array_equal(session.mask(1), expected)
    carried = session.propagate(plane=plane)
    np.testing.assert_array_equal(session.mask(1), wedge())
    assert carried.changed == ((3, 9), (10, 22), (15, 38))
    known = np.isfinite(session.confidence(1, plane))
    np.testing.assert_array_equal(known, wedge().any(tuple(a for a in range(3) if a != axis)))


@pytest.mark.parametrize("directions", ACQUIRED.values(), ids=ACQUIRED)
@pytest.mark.parametrize("space", ["lps", "ras"])
def test_millimetres_mean_the_same_voxels_on_any_plane(directions, space):
    affine = affine_of(directions, (0.8, 1.0, 2.5))
    for plane in ("axial", "coronal", "sagittal"):
        session, other = bright(affine=affine), bright(affine=affine)
        axis = plane_axis(session.volume, plane)
        by_axis = {number: name for name, number in AXES.items()}[axis]
        index = INDEX[by_axis]
        box = tight(np.take(wedge(), index, axis))
        session.prompt(1, box=box, index=index, plane=plane)
        corners = to_patient(corners_3d(by_axis, index, box), session.volume, space)
        other.prompt(1, box=corners.ravel()[[3, 4, 5, 0, 1, 2]], plane=plane, space=space)
        assert session.mask(1).any()
        np.testing.assert_array_equal(other.mask(1), session.mask(1))
        centre = np.argwhere(wedge() & session.mask(1))[0][::-1] + 0.5
        other.prompt(2, points=to_patient(centre, other.volume, space), plane=plane, space=space)
        np.testing.assert_array_equal(other.mask(2), session.mask(1))


@pytest.mark.parametrize("space", ["voxel", "lps", "ras"])
def test_a_3d_box_is_its_middle_slice_and_the_objects_ends(space):
    session = bright(affine=affine_of(ACQUIRED["oblique"], (0.8, 1.0, 2.5)))
    corners = np.array([[12, 8, 4], [40, 25, 8]], float)
    if space != "voxel":  # in millimetres any two opposite corners
        corners = np.array([[40, 25, 4], [12, 8, 8]], float)
    given = to_patient(corners, session.volume, space).ravel()
    assert session.prompt(1, box_3d=given, space=space).slices == (5,)
    carried = session.propagate()
    assert carried.slices == (4, 6, 7)
    assert {end.reason for end in carried.ends} == {"the object's known end"}
    expected = wedge()
    expected[[3, 8]] = False
    np.testing.assert_array_equal(session.mask(1), expected)
    session.prompt(1, box=BOX, index=8)  # the user knows better: the box no longer bounds it
    session.propagate()
    np.testing.assert_array_equal(session.mask(1), wedge())


def test_points_add_up_and_a_new_box_replaces_the_old_one():
    asked = []

    class Noting(BrightPredictor):
        def predict_boxes(self, boxes):
            asked.append({"boxes": boxes.tolist()})
            return super().predict_boxes(boxes)

        def predict_prompts(self, *, multimask=False, adapt_points=True, **prompts):
            asked.append({name: value.tolist() for name, value in prompts.items()})
            return super().predict_prompts(multimask=multimask, **prompts)

    session = VolumePredictor(Noting(), scan(wedge()))
    session.prompt(1, points=[20, 15], index=5)
    session.prompt(1, points=[[40, 5]], labels=[0], index=5)
    session.prompt(1, box=BOX, index=5)
    session.prompt(1, box=[13, 8, 40, 25], index=5)
    session.prompt(1, points=[[21, 15, 5]], index=5, add=False)
    session.prompt(1, points=[20, 15], index=6)
    session.prompt(1, box=BOX, index=6, mask_input=np.ones((256, 256), np.float32))
    assert asked == [
        {"point_coords": [[[20, 15]]], "point_labels": [[1]]},
        {"point_coords": [[[20, 15], [40, 5]]], "point_labels": [[1, 0]]},
        {"boxes": [BOX], "point_coords": [[[20, 15], [40, 5]]], "point_labels": [[1, 0]]},
        {
            "boxes": [[13, 8, 40, 25]],
            "point_coords": [[[20, 15], [40, 5]]],
            "point_labels": [[1, 0]],
        },
        {"point_coords": [[[21, 15]]], "point_labels": [[1]]},
        {"point_coords": [[[20, 15]]], "point_labels": [[1]]},
        {
            "boxes": [BOX],
            "point_coords": [[[20, 15]]],
            "point_labels": [[1]],
            "mask_input": np.ones((1, 256, 256)).tolist(),
        },
    ]


def test_a_single_point_takes_the_best_of_three():
    class Three(BrightPredictor):
        def predict_prompts(self, *, multimask=False, **prompts):
            found = super().predict_prompts(**prompts)
            if not multimask:
                return found
            masks = np.concatenate([found.masks * 0, found.masks, found.masks * 0 + 1], axis=1)
            logits = np.concatenate([found.logits + n for n in range(3)], axis=1)
            return Prediction(masks, np.array([[0.2, 0.7, 0.6]], np.float32), logits)

    session = VolumePredictor(Three(), scan(wedge()))
    assert session.prompt(1, points=[20, 15], index=5).iou == pytest.approx(0.7)
    np.testing.assert_array_equal(session.mask(1)[5], wedge()[5])
    assert session.prompt(1, points=[22, 15], index=5).iou == pytest.approx(0.9)


def test_the_higher_label_covers_the_lower_which_keeps_its_voxels():
    session = bright()
    session.prompt(300, box=BOX, index=5)
    session.prompt(2, box=BOX, index=5)
    found = session.segmentation()
    assert found.labels.dtype == np.uint16
    assert set(np.unique(found.labels)) == {0, 300}
    np.testing.assert_array_equal(session.mask(2), session.mask(300))
    session.clear(300)
    np.testing.assert_array_equal(session.segmentation().labels[5] == 2, wedge()[5])
    assert (found.labels == 300).any()  # what was given out does not change


def test_a_whole_mask_replaces_an_object_and_its_prompts():
    session = bright()
    session.prompt(1, box=BOX, index=5)
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = 7
    assert session.set_mask(1, mask).changed == ((1, 6), (2, 22), (3, 35))
    np.testing.assert_array_equal(session.mask(1), mask > 0)
    with pytest.raises(InputError, match="no object was prompted on this plane"):
        session.propagate()
    with pytest.raises(InputError, match=r"mask \(3, 4, 5\): expected \(14, 40, 50\)"):
        session.set_mask(1, np.zeros((3, 4, 5)))
    with pytest.raises(InputError, match=r"slice 50: .* has 0–49 on this plane"):
        session.set_mask(1, np.zeros((14, 40)), index=50, plane="sagittal")
    with pytest.raises(InputError, match=r"mask \(40, 14\) of a slice: expected \(14, 40\)"):
        session.set_mask(1, np.zeros((40, 14)), index=5, plane="sagittal")


def test_numbers_of_numpy_are_labels_and_slices(session):
    change = session.prompt(np.int64(2), box=BOX, index=np.int32(5))
    assert change.labels == (2,)
    session.propagate(np.array([2]), from_slice=np.int64(5), until=np.uint8(7))
    assert [type(one.label) for one in session.objects] == [int]
    assert np.flatnonzero(session.mask(2).any((1, 2))).tolist() == [5, 6, 7]


def test_an_image_is_a_volume_of_one_slice():
    truth = wedge()[5:6]
    volume = Volume(Path("a.png"), "picture", scan(wedge()).pixels[5:6], STORED)
    session = VolumePredictor(BrightPredictor(), volume)
    session.prompt(1, box=BOX)
    np.testing.assert_array_equal(session.segmentation().labels, truth)


def test_colours_go_through_every_plane():
    truth = wedge()
    grey = scan(truth).pixels
    volume = Volume(
        Path("a"), "npz", np.stack([grey, grey // 2, grey // 3], -1), STORED, spacing_mm=SPACING
    )
    session = VolumePredictor(BrightPredictor(), volume, rule=WIDE)
    session.prompt(1, box=tight(truth[:, 12]), index=12, plane="coronal")
    session.propagate(plane="coronal")
    np.testing.assert_array_equal(session.mask(1), truth)


def test_sessions_of_many_threads_answer_as_alone():
    truths = [np.roll(wedge(), (step, 3 * step, -4 * step), (0, 1, 2)) for step in range(3)]
    shared = SharedPredictor(BrightPredictor())
    sessions = [VolumePredictor(shared, scan(truth), rule=WIDE) for truth in truths]
    alone = [bright(truth) for truth in truths]

    def work(session: VolumePredictor, truth: np.ndarray, label: int) -> None:
        plane, axis = [("stored", 0), ("coronal", 1)][label % 2]
        index = int(np.flatnonzero(np.moveaxis(truth, axis, 0).any((1, 2)))[label])
        box = tight(np.take(truth, index, axis))
        for _ in range(3):
            session.prompt(label, box=box, index=index, plane=plane)
            session.propagate(label, plane=plane)
            session.segmentation()

    labels = (1, 2, 3)
    given = [(*pair, label) for pair in zip(sessions, truths, strict=True) for label in labels]
    with ThreadPoolExecutor(len(given)) as pool:
        list(pool.map(lambda one: work(*one), given))
    for session, truth, own in zip(sessions, truths, alone, strict=True):
        for label in labels:
            work(own, truth, label)
            np.testing.assert_array_equal(session.mask(label), own.mask(label))
            np.testing.assert_array_equal(session.mask(label), truth)


def test_fractions_are_the_models_and_agree_with_the_mask(tiny_artefact):
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    with VolumePredictor(predictor, scan(wedge()), encode_ahead=False) as session:
        session.prompt(1, box=BOX, index=5)
        drawn = np.zeros(SHAPE[1:], bool)
        drawn[3:9, 4:30] = True
        session.set_mask(1, drawn, index=6)
        found = session.segmentation()
        session.clear(1)  # what was given out does not change
    predictor.set_embeddings(_half(predictor.encode(_rgb(5))), SHAPE[1:])
    answer = predictor.predict_boxes(np.array([BOX]))
    logits = answer.known_logits()[0, 0].astype(np.float16).astype(np.float32)
    full = upscale_logits(logits, SHAPE[1:], tiny_artefact.preprocessing)
    fractions = found.fractions(1, 5)
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions, 1 / (1 + np.exp(-full)), atol=2e-3)
    np.testing.assert_array_equal(fractions > 0.5, found.labels[5] == 1)
    np.testing.assert_array_equal(found.labels[5], answer.masks[0, 0])
    np.testing.assert_array_equal(found.fractions(1, 6), drawn)
    assert not found.fractions(1, 7).any()
    assert found.confidence[0, 5] == answer.ious[0, 0]
    assert np.isnan(np.delete(found.confidence[0], 5)).all()


def _half(embeddings: np.ndarray) -> np.ndarray:
    return embeddings.astype(np.float16).astype(np.float32)


def _rgb(index: int) -> np.ndarray:
    return scan(wedge()).slice_rgb(index)


def test_a_slice_across_changes_fractions_only_where_it_lies(tiny_artefact):
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    with VolumePredictor(predictor, scan(wedge()), encode_ahead=False) as session:
        session.prompt(1, box=BOX, index=5)
        before = session.segmentation().fractions(1, 5)
        opposite = ~session.mask(1)[:, 12]
        session.set_mask(1, opposite, index=12, plane="coronal")
        after = session.segmentation().fractions(1, 5)
    np.testing.assert_array_equal(after[12], opposite[5])
    np.testing.assert_array_equal(np.delete(after, 12, 0), np.delete(before, 12, 0))


def test_each_slice_of_a_plane_is_encoded_once(tiny_artefact):
    encoded = []

    class Counting(Predictor):
        def encode(self, image):
            encoded.append(image.shape[:2])
            return super().encode(image)

    predictor = Counting(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    volume = scan(wedge())
    with VolumePredictor(predictor, volume) as session:
        for label in (1, 2):
            for index in (5, 6, 5):
                session.prompt(label, box=[BOX[0] + label, *BOX[1:]], index=index)
        session.propagate()
        while session.shared._worker is not None:
            time.sleep(0.005)
        assert len(encoded) == len(np.unique(volume.pixels, axis=0))  # equal slices are one
        with VolumePredictor(session.shared, scan(wedge()), encode_ahead=False) as other:
            other.prompt(1, box=BOX, index=3)
            other.prompt(1, box=[10, 2, 30, 11], index=12, plane="coronal")
        assert encoded[len(np.unique(volume.pixels, axis=0)) :] == [(42, 50)]
