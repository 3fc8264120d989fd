"""What 3D Slicer's extension and napari's plugin ask, call by call in their order, by their client.

Read from SlicerNNInteractive 1.0 and napari-nninteractive 2.5.4, which was run as well, with the
mouse; what they send is as they send it: Slicer the lower corner and one beyond the upper, in whole
numbers that may lie outside, napari what the mouse gave.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import (
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)
from support.viewer import BOX, IMAGE, BoxTrained, running
from support.wedge import SHAPE, wedge

from dbsam_deploy.core.masks import Prediction

Client = nnInteractiveRemoteInferenceSession


@pytest.fixture(scope="module")
def server():
    with running(slots=2) as started:
        yield started


class Slicer:
    """The extension's calls; its segments are what a user sees.

    Attributes:
        segments: of the scene, by name.
        selected: the one that prompts change.
    """

    def __init__(self, url: str, **segments: np.ndarray) -> None:
        Client(server_url=url).close()  # "Test connection"
        self.segments = {"Segment_1": np.zeros(SHAPE, np.uint8), **segments}
        self.selected = next(iter(segments), "Segment_1")
        self.session = Client(server_url=url)
        self.session.set_do_autozoom(True)
        self.buffer = np.zeros(SHAPE, np.uint8)
        self.session.set_image(IMAGE, {"spacing": [1.0, 1.0, 1.0]})
        self.session.set_target_buffer(self.buffer)
        self._synchronise()
        self.session.heartbeat()

    def _synchronise(self) -> None:
        self.session.reset_interactions()
        if self.segments[self.selected].any() and self.session.supports_initial_label:
            self.session.add_initial_seg_interaction(
                self.segments[self.selected].copy(), run_prediction=False
            )

    def select(self, name: str) -> None:
        """A segment that is selected again is sent before the next prompt."""
        self.selected = name
        self._synchronise()

    def next_segment(self) -> None:
        """The button, and what the next prompt sends before itself."""
        self.session.reset_interactions()
        self.selected = f"Segment_{len(self.segments) + 1}"
        self.segments[self.selected] = np.zeros(SHAPE, np.uint8)
        self._synchronise()

    def box(self, first: list[int], second: list[int], inside: bool = True) -> None:
        pairs = zip(first, second, strict=True)
        box = [[min(a, b), max(a, b) + 1] for a, b in pairs]
        changed = self.session.add_bbox_interaction(
            box, include_interaction=inside, run_prediction=True
        )
        self._drawn(changed)

    def point(self, place: list[int], inside: bool = True) -> None:
        changed = self.session.add_point_interaction(
            tuple(place), include_interaction=inside, run_prediction=True
        )
        self._drawn(changed)

    def undo(self) -> bool:
        undone = self.session.undo()
        if undone and self.session._last_paste_bbox is not None:
            self._drawn(self.session._last_paste_bbox)
        return bool(undone)

    def _drawn(self, changed: list[list[int]] | None) -> None:
        """Only the part that changed is copied; all of it where that is not told."""
        where = tuple(slice(*side) for side in changed or [[None, None]] * 3)
        self.segments[self.selected][where] = self.buffer[where]


@pytest.fixture
def slicer(server) -> Iterator[Slicer]:
    one = Slicer(server.url)
    yield one
    one.session.close()


def test_slicer_draws_what_the_server_has(slicer):
    slicer.box([5, 24, 39], [5, 8, 12])  # drawn from the lower right
    np.testing.assert_array_equal(slicer.segments["Segment_1"], wedge())
    slicer.point([5, 15, 25], False)
    assert not slicer.segments["Segment_1"][5, 15, 25]
    assert slicer.undo()
    np.testing.assert_array_equal(slicer.segments["Segment_1"], wedge())
    assert not slicer.undo()


def test_slicers_segments_do_not_touch_each_other(slicer):
    slicer.box([5, 8, 12], [5, 24, 39])
    slicer.next_segment()
    slicer.point([0, 0, 45])
    assert 0 < slicer.segments["Segment_2"].sum() < 30
    np.testing.assert_array_equal(slicer.segments["Segment_1"], wedge())
    second = slicer.segments["Segment_2"].copy()
    slicer.select("Segment_1")
    slicer.point([6, 15, 25], False)
    assert slicer.undo()
    np.testing.assert_array_equal(slicer.segments["Segment_1"], wedge())
    np.testing.assert_array_equal(slicer.segments["Segment_2"], second)


def test_slicer_goes_on_with_what_was_edited_by_hand(server):
    edited = wedge().astype(np.uint8)
    edited[4:7, :, 30:] = 0
    slicer = Slicer(server.url, edited=edited.copy())
    slicer.point([5, 15, 33])
    found = slicer.segments["edited"]
    assert found[5, 15, 33]
    np.testing.assert_array_equal(found[[4, 6]], edited[[4, 6]])
    assert slicer.undo()
    np.testing.assert_array_equal(slicer.segments["edited"], edited)
    slicer.session.close()


def test_slicer_may_drag_beyond_the_image_and_obliquely(slicer):
    slicer.box([5, -9, -3], [5, 24, 99])
    assert slicer.segments["Segment_1"][5].any()
    slicer.next_segment()
    slicer.box([3, 8, 12], [8, 24, 39])  # oblique: no axis is flat
    np.testing.assert_array_equal(slicer.segments["Segment_2"], wedge())


def test_slicer_starts_again_after_a_lost_slot(server, slicer):
    slicer.box([5, 8, 12], [5, 24, 39])
    server.leases.release(slicer.session._lease_token)
    with pytest.raises(SessionExpiredError):
        slicer.point([5, 15, 25], False)
    again = Slicer(server.url, kept=slicer.segments["Segment_1"].copy())
    again.point([5, 15, 25], False)
    assert not again.segments["kept"][5, 15, 25]
    np.testing.assert_array_equal(again.segments["kept"][[4, 6]], wedge()[[4, 6]])
    again.session.close()


def test_napari_draws_as_the_mouse_went(server):
    """The layer is the buffer itself; what changed is what "Next Object" copies."""
    client = Client(server_url=server.url)
    client.set_do_autozoom(True)
    layer = np.zeros(SHAPE, np.uint8)
    client.set_image(IMAGE, {"spacing": np.array([1.0, 1.0, 1.0])})
    client.set_target_buffer(layer)
    client.set_do_autozoom(True)
    assert client.preferred_scribble_thickness[0] > 0
    changed = client.add_bbox_interaction([[5.0, 6.0], [7.98, 24.99], [12.02, 40.01]], True, True)
    np.testing.assert_array_equal(layer, wedge())
    stored = np.zeros(SHAPE, np.uint8)
    where = tuple(slice(*side) for side in changed)
    stored[where] = layer[where]
    np.testing.assert_array_equal(stored, wedge())
    client.add_point_interaction(np.array([5.0, 15.49, 24.6]), False, True)
    assert not layer[5, 15, 25]
    stroke = np.ones((1, 2, 7), np.uint8)
    client.add_scribble_interaction(
        stroke, True, True, interaction_bbox=[[5, 6], [15, 17], [22, 29]]
    )
    assert layer[5, 15:17, 22:29].all()
    assert client.undo()
    assert not layer[5, 15, 25]
    client.reset_interactions()  # "Next Object"
    assert not layer.any()
    assert client.add_point_interaction(np.array([5.0, 15.0, 25.0]), True, False) is None
    assert not layer.any()  # manual control: "Run" answers
    client._predict()
    np.testing.assert_array_equal(layer, wedge())
    client.close()
    with pytest.raises((SessionExpiredError, httpx.HTTPError, RuntimeError)):
        client.heartbeat()


@pytest.mark.parametrize("iou", [-0.2, 0.0, 1.3, float("nan")])
def test_a_slice_is_answered_whatever_the_model_estimates_of_it(server, monkeypatch, iou):
    asked = BoxTrained.predict_boxes

    def estimated(model, boxes):
        found = asked(model, boxes)
        return Prediction(found.masks, np.full_like(found.ious, iou), found.logits)

    monkeypatch.setattr(BoxTrained, "predict_boxes", estimated)
    with server.client() as client:
        client.set_image(IMAGE, {"spacing": [1.0, 1.0, 1.0]})
        client.set_target_buffer(np.zeros(SHAPE, np.uint8))
        client.add_bbox_interaction(BOX, True)
        np.testing.assert_array_equal(client.target_buffer[5], wedge()[5])
