"""A volume prompted again and again: what changes, what stays, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.dicom_series import rotation

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.scans import ScanGeometry
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.frames import plane_axis, to_patient
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.stop_rules import ChainRule

DEPTH, HEIGHT, WIDTH = SHAPE = (14, 40, 50)
SPACING = (3.0, 1.0, 1.0)
BOX = [12, 8, 40, 25]
WIDE = ChainRule(margin_px=300, min_overlap=0)
"""The next box is the whole slice, so nothing of an object is missed, however it changes."""


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
    options = {"model": "bright", "rule": WIDE, **options}
    return VolumePredictor(BrightPredictor(), volume, **options)


@pytest.fixture
def session() -> VolumePredictor:
    return bright()


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


AXES = {"stored": 0, "coronal": 1, "sagittal": 2}
INDEX = {"stored": 4, "coronal": 12, "sagittal": 31}


def tight(mask: np.ndarray, margin: int = 1) -> list[float]:
    """x0, y0, x1, y1 around a slice's mask, in the order columns, rows."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    low = [max(0, columns[0] - margin), max(0, rows[0] - margin)]
    high = [min(mask.shape[1], columns[-1] + 1 + margin), min(mask.shape[0], rows[-1] + 1 + margin)]
    return [*low, *high]


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


ACQUIRED = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
    "sagittal": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], float),
    "oblique": rotation(25, -15, 10),
    "left-handed": np.diag([-1.0, 1, 1]) @ rotation(10, 20, -15),
}


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

        def predict_prompts(self, *, multimask=False, **prompts):
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


def test_every_change_tells_where_and_is_taken_back_exactly():
    rng = np.random.default_rng(3)
    truth = wedge()
    truth[2:12, 28:36, 4:12] = True
    session = bright(truth)
    names, states = [1, 2, 3], []
    for _ in range(40):
        before = {label: _mask(session, label) for label in names}
        kept = [_state(session, label) for label in names]
        change = _random_change(session, rng, truth)
        if change is None:
            continue
        states.append((before, kept))
        differs = np.any([before[n] != _mask(session, n) for n in names], axis=0)
        _check_extent(change.changed, differs)
    assert len(states) > 25
    for before, kept in reversed(states):
        after = {label: _mask(session, label) for label in names}
        change = session.undo()
        for label in names:
            np.testing.assert_array_equal(_mask(session, label), before[label])
        assert [_state(session, label) for label in names] == kept
        _check_extent(change.changed, np.any([after[n] != before[n] for n in names], axis=0))
    assert session.objects == ()
    with pytest.raises(InputError, match="nothing to undo"):
        session.undo()


def _random_change(session: VolumePredictor, rng: np.random.Generator, truth: np.ndarray):
    label = int(rng.integers(1, 4))
    plane = str(rng.choice(list(AXES)))
    index = int(rng.choice(np.flatnonzero(np.moveaxis(truth, AXES[plane], 0).any((1, 2)))))
    kind = rng.choice(["box", "carry", "draw", "clear", "all", "again"])
    try:
        if kind in ("box", "again"):
            box = tight(np.take(truth, index, AXES[plane]), int(rng.integers(0, 3)))
            return session.prompt(label, box=box, index=index, plane=plane)
        if kind == "carry":
            direction = str(rng.choice(["up", "down", "both"]))
            return session.propagate(label, plane=plane, direction=direction)
        if kind == "draw":
            drawn = rng.random(np.take(truth, index, AXES[plane]).shape) < 0.1
            return session.set_mask(label, drawn, index=index, plane=plane)
        if kind == "all":
            return session.set_mask(label, rng.random(truth.shape) < 0.01)
        return session.clear(label)
    except InputError:
        return None


def _mask(session: VolumePredictor, label: int) -> np.ndarray:
    known = label in [one.label for one in session.objects]
    return session.mask(label) if known else np.zeros(session.volume.shape, bool)


def _state(session: VolumePredictor, label: int):
    if label not in [one.label for one in session.objects]:
        return None
    return [np.nan_to_num(session.confidence(label, plane)).tolist() for plane in AXES]


def _check_extent(changed, differs: np.ndarray) -> None:
    if changed is None:
        assert not differs.any()
        return
    inside = np.zeros_like(differs)
    inside[tuple(slice(first, end) for first, end in changed)] = True
    assert not (differs & ~inside).any()
    for axis in range(3):  # and no larger than it must be
        places = np.flatnonzero(differs.any(tuple(a for a in range(3) if a != axis)))
        assert changed[axis] == (places[0], places[-1] + 1)


def test_prompted_slices_are_joined_and_stay_as_they_are():
    session = bright()
    session.prompt(1, box=BOX, index=4)
    drawn = np.zeros(SHAPE[1:], bool)
    drawn[12:20, 17:30] = True
    session.set_mask(1, drawn, index=7)
    carried = session.propagate()
    assert carried.slices == (3, 5, 6, 8)
    expected = wedge()
    expected[7] = drawn
    np.testing.assert_array_equal(session.mask(1), expected)
    assert {end.reason for end in carried.ends if end.last in (5, 6)} == {
        "slice 7, whose mask is known",
        "slice 4, whose mask is known",
    }


def test_a_slice_across_that_was_prompted_stays():
    session = bright()
    drawn = np.zeros((DEPTH, WIDTH), bool)
    drawn[1:12, 20:22] = True  # what the model would never find
    session.set_mask(1, drawn, index=15, plane="coronal")
    session.prompt(1, box=BOX, index=5)
    session.propagate()
    expected = wedge()
    expected[:, 15] = drawn
    expected[5] = wedge()[5]  # the last word on the voxels that both slices hold
    np.testing.assert_array_equal(session.mask(1), expected)


def test_a_correction_replaces_what_was_carried_before():
    truth = wedge()
    truth[9:13, 10:22, 15:35] = True  # something bright above, which is not the object
    session = bright(truth)
    session.prompt(1, box=BOX, index=5)
    session.propagate()
    np.testing.assert_array_equal(session.mask(1), truth)
    session.set_mask(1, np.zeros(SHAPE[1:]), index=9)  # it is not there any more
    corrected = session.propagate()
    np.testing.assert_array_equal(session.mask(1), wedge())
    assert corrected.changed == ((10, 13), (10, 22), (15, 35))
    session.undo()
    session.undo()
    np.testing.assert_array_equal(session.mask(1), truth)


def test_how_far_a_call_goes():
    def carried(**course) -> list[int]:
        session = bright()
        session.prompt(1, box=BOX, index=4)
        session.prompt(1, box=BOX, index=6)
        session.propagate(**course)
        return np.flatnonzero(session.mask(1).any((1, 2))).tolist()

    assert carried() == [3, 4, 5, 6, 7, 8]
    assert carried(direction="up") == [4, 5, 6, 7, 8]
    assert carried(direction="down") == [3, 4, 5, 6]
    assert carried(from_slice=4) == [3, 4, 5, 6]  # 6 is prompted: what follows is its own
    assert carried(from_slice=6, direction="up") == [4, 6, 7, 8]
    assert carried(from_slice=6, until=7) == [4, 6, 7]
    assert carried(direction="up", until=7) == [4, 5, 6, 7]
    assert carried(from_slice=4, until=3) == [3, 4, 6]


def test_a_call_of_one_direction_leaves_the_other_sides_slices():
    session = bright()
    session.prompt(1, box=BOX, index=5)
    session.propagate()
    session.propagate(direction="up", until=6)
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == [3, 4, 5, 6, 7, 8]
    session.propagate(direction="up", rule=ChainRule(margin_px=300, min_overlap=0, reach=1))
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == [3, 4, 5, 6]


def test_several_objects_open_a_slice_once_in_each_direction():
    truth = wedge()
    truth[2:12, 28:36, 4:12] = True
    predictor = BrightPredictor()
    session = VolumePredictor(predictor, scan(truth))  # the next box is near: one object each
    liver = session.add_object("liver", colour=(200, 0, 0))
    session.prompt(liver, box=BOX, index=5)
    cyst = session.add_object("cyst")
    session.prompt(cyst, box=[2, 26, 14, 38], index=5)
    before, seen = predictor.encoded, []
    session.propagate(progress=lambda done, total: seen.append((done, total)))
    assert predictor.encoded - before == 11  # 6 to 12 upwards, 4 to 1 downwards
    assert seen[-1] == (11, 11)
    found = session.segmentation()
    assert [(one.label, one.name) for one in found.objects] == [(1, "liver"), (2, "cyst")]
    assert found.objects[0].colour == (200, 0, 0)
    assert set(np.unique(found.labels[2:12, 28:36, 4:12])) == {2}
    session.clear(cyst)
    assert not (session.segmentation().labels == 2).any()
    assert len(session.objects) == 2


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


def test_an_interrupted_call_changes_nothing():
    for error in (KeyboardInterrupt(), RuntimeError("the model is gone")):
        predictor = BrightPredictor(failing_at=4, error=error)
        session = VolumePredictor(predictor, scan(wedge()), rule=WIDE)
        session.prompt(1, box=BOX, index=5)
        before = session.mask(1)
        with pytest.raises(type(error)):
            session.propagate()
        np.testing.assert_array_equal(session.mask(1), before)
        predictor.failing_at = None
        session.propagate()
        np.testing.assert_array_equal(session.mask(1), wedge())


def test_slices_of_one_value_have_empty_masks_and_are_not_asked_for():
    truth = wedge()
    volume = scan(truth)
    volume.pixels[9] = 77
    volume.pixels[4] = 0
    predictor = BrightPredictor()
    session = VolumePredictor(predictor, volume, rule=WIDE)
    assert session.prompt(2, box=BOX, index=9).changed is None
    assert session.prompt(2, points=[20, 15], index=4).changed is None
    assert predictor.encoded == 0
    with pytest.raises(InputError, match="object 2: no prompt on this plane found anything"):
        session.propagate(2)
    session.prompt(1, box=BOX, index=7)
    ends = session.propagate(1).ends
    assert sorted((end.last, end.reason) for end in ends) == [
        (5, "slice 4: the mask is empty"),
        (8, "slice 9: the mask is empty"),
    ]


def test_the_history_is_bounded():
    session = bright(undo_bytes=400)
    for index in (3, 4, 5, 6, 7):
        session.set_mask(1, np.random.default_rng(index).random(SHAPE[1:]) < 0.5, index=index)
    session.undo()
    with pytest.raises(InputError, match="nothing to undo"):  # 250 bytes each
        session.undo()
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == [3, 4, 5, 6]


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
    with pytest.raises(InputError, match=r"on slice 50: expected \(14, 40\) on one of 0–49"):
        session.set_mask(1, np.zeros((14, 40)), index=50, plane="sagittal")


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


@pytest.mark.parametrize(
    ("course", "message"),
    [
        ({"direction": "sideways"}, "direction 'sideways'"),
        ({"from_slice": 14}, "slice 14: the plane has slices 0–13"),
        ({"until": 3}, "until goes with a direction"),
        ({"from_slice": 6}, "object 1: no prompt on slice 6 found anything|no object was prompted"),
        ({"labels": 3}, "object 3: no such object"),
        ({"labels": [1], "plane": "coronal"}, "object 1: no prompt on this plane"),
        ({"plane": "sagittal"}, "no object was prompted on this plane"),
    ],
)
def test_ways_that_lead_nowhere(session, course, message):
    session.prompt(1, box=BOX, index=5)
    with pytest.raises(InputError, match=message):
        session.propagate(**course)


def test_without_spacing_only_stored_slices_have_a_shape():
    volume = Volume(Path("a.npz"), "npz", scan(wedge()).pixels, STORED)
    session = VolumePredictor(BrightPredictor(), volume, rule=WIDE)
    with pytest.raises(InputError, match=r"a\.npz: the distance between its voxels is unknown"):
        session.prompt(1, box=[1, 1, 9, 9], index=5, plane="coronal")
    session.prompt(1, box=BOX, index=5, plane="axial")
    session.propagate()
    np.testing.assert_array_equal(session.mask(1), wedge())


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
