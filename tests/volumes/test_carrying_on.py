"""Objects of a session carried from their prompted slices: how far, and what stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.wedge import BOX, DEPTH, SHAPE, WIDE, WIDTH, bright, scan, wedge

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.volumes.session import VolumePredictor


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
    assert carried(from_slice=6) == [4, 5, 6, 7, 8]
    assert carried(from_slice=6, direction="up") == [4, 6, 7, 8]
    assert carried(from_slice=6, until=7) == [4, 6, 7]
    assert carried(direction="up", until=7) == [4, 5, 6, 7]
    assert carried(from_slice=4, until=3) == [3, 4, 6]


def test_the_last_slice_may_be_numpys_largest_number():
    truth = np.zeros((260, 8, 8), bool)
    truth[:, 2:6, 2:6] = True
    session = bright(truth)
    session.prompt(1, box=[1, 1, 7, 7], index=250)
    session.propagate(from_slice=np.uint8(250), until=np.uint8(255))
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == list(range(250, 256))


def test_a_call_of_one_direction_leaves_the_other_sides_slices():
    session = bright()
    session.prompt(1, box=BOX, index=5)
    session.propagate()
    session.propagate(direction="up", until=6)
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == [3, 4, 5, 6, 7, 8]
    session.propagate(direction="up", rule=replace(WIDE, reach=1))
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
    assert predictor.encoded - before == 12  # 5 for wider boxes, 6 to 12 upwards, 4 to 1 downwards
    assert seen[-1] == (11, 11)
    found = session.segmentation()
    assert [(one.label, one.name) for one in found.objects] == [(1, "liver"), (2, "cyst")]
    assert found.objects[0].colour == (200, 0, 0)
    assert set(np.unique(found.labels[2:12, 28:36, 4:12])) == {2}
    session.clear(cyst)
    assert not (session.segmentation().labels == 2).any()
    assert len(session.objects) == 2


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


@pytest.mark.parametrize(
    ("course", "message"),
    [
        ({"direction": "sideways"}, "direction 'sideways'"),
        ({"from_slice": 14}, r"slice 14: .* has 0–13 on this plane"),
        ({"direction": "up", "until": 6.5}, "slice 6.5: expected a whole number"),
        ({"until": 3}, "until goes with a direction"),
        ({"from_slice": 5, "direction": "up", "until": 3}, "until 3 does not lie up"),
        ({"from_slice": 5, "direction": "down", "until": 8}, "until 8 does not lie down"),
        ({"labels": []}, "no object was prompted on this plane"),
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
