"""The real client of 3D Slicer, napari and MITK against the server: what its users do."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import ServerAtCapacityError, SessionExpiredError
from nnInteractive.inference.remote.serialization import unpack_array
from support.bright import FreeEncoder
from support.viewer import BOX, BoxTrained, RawViewer, RunningServer, running
from support.wedge import SHAPE, wedge

from dbsam_deploy.viewer import carrying, workspace


def picture(truth: np.ndarray) -> np.ndarray:
    values = np.where(truth, 200, 20).astype(np.uint8)[None]
    values[:, :, 0, 0] = 60
    return values


def opened(server: RunningServer, truth: np.ndarray | None = None, **options):
    truth = wedge() if truth is None else truth
    client = server.client(**options)
    client.set_image(picture(truth), {"spacing": [1.0, 1.0, 1.0]})
    client.set_target_buffer(np.zeros(truth.shape, np.uint8))
    return client


@pytest.fixture
def client(server):
    with opened(server) as one:
        yield one


def test_one_box_gives_the_whole_object_and_one_undo_takes_it_back(client):
    changed = client.add_bbox_interaction(BOX, True)
    np.testing.assert_array_equal(client.target_buffer, wedge())
    assert changed == [[3, 9], [10, 22], [15, 38]]
    assert client.undo()
    assert not client.target_buffer.any()
    assert not client.undo()


def test_without_autozoom_only_the_prompted_slice_changes(client):
    client.set_do_autozoom(False)
    client.add_bbox_interaction(BOX, True)
    np.testing.assert_array_equal(client.target_buffer[5], wedge()[5])
    assert client.target_buffer.any((1, 2)).tolist().count(True) == 1


@pytest.mark.parametrize(
    "box", [BOX, [[2, 12], [16, 17], [12, 40]], [[2, 12], [8, 25], [30, 31]]], ids="zyx"
)
def test_a_flat_box_may_lie_on_any_plane(client, box):
    client.add_bbox_interaction(box, True)
    np.testing.assert_array_equal(client.target_buffer, wedge())


def test_a_mask_as_large_as_the_image_has_the_plane_of_what_is_painted(client):
    painted, place = np.zeros(SHAPE, np.uint8), (slice(4, 8), slice(16, 17), slice(16, 36))
    painted[place] = 1
    client.set_do_autozoom(False)
    client.add_scribble_interaction(painted, True)
    assert client.target_buffer.any((0, 2)).nonzero()[0].tolist() == [16]
    whole = client.target_buffer.copy()
    client.reset_interactions()
    sides = [[one.start, one.stop] for one in place]
    client.add_scribble_interaction(painted[place], True, interaction_bbox=sides)
    np.testing.assert_array_equal(client.target_buffer, whole)


def test_a_3d_box_bounds_the_object(client):
    client.add_bbox_interaction([[4, 8], [8, 25], [12, 40]], True)
    expected = wedge()
    expected[:4] = expected[8:] = False
    np.testing.assert_array_equal(client.target_buffer, expected)
    client.add_point_interaction([8, 15, 25], True)  # outside the box: the user knows better
    assert client.target_buffer[8, 15, 25] == 1


def test_a_click_on_nothing_yet_finds_the_object(client):
    client.add_point_interaction([5, 15, 25], True)
    np.testing.assert_array_equal(client.target_buffer, wedge())


@pytest.mark.parametrize("place", [[5.4, 15.4, 25.49], [99, 0, 0], [-1, 5, 5]])
def test_clicks_are_rounded_and_outside_ignored(client, place):
    client.add_point_interaction(place, True)
    assert client.target_buffer.any() == (place[0] == 5.4)


def test_a_clicked_voxel_has_the_label_that_was_asked_for(client):
    rng = np.random.default_rng(0)
    client.add_bbox_interaction(BOX, True)
    for _ in range(12):
        place = [int(rng.integers(side)) for side in SHAPE]
        wanted = bool(rng.integers(2))
        client.add_point_interaction(place, wanted)
        assert bool(client.target_buffer[tuple(place)]) == wanted


def test_the_newer_of_two_clicks_on_a_voxel_wins(client):
    client.add_bbox_interaction(BOX, True)
    for wanted in (False, True, False):
        client.add_point_interaction([5, 15, 25], wanted)
        assert client.target_buffer[5, 15, 25] == wanted


def test_a_prompted_slice_is_not_changed_from_another_one(client):
    client.add_bbox_interaction(BOX, True)
    client.add_point_interaction([6, 11, 20], False)
    kept = client.target_buffer[6].copy()
    assert not kept[11, 20]
    client.add_bbox_interaction([[4, 5], [8, 25], [12, 40]], True)
    client.add_bbox_interaction([[8, 9], [8, 25], [12, 40]], True)
    np.testing.assert_array_equal(client.target_buffer[6], kept)


def test_a_negative_click_at_first_is_no_mistake(client):
    assert client.add_point_interaction([5, 15, 25], False) is None
    assert not client.target_buffer.any()


def test_what_is_painted_is_in_the_object_or_out_of_it(client):
    stroke = np.zeros((1, 3, 9), np.uint8)
    stroke[0, 1] = 1
    where = [[5, 6], [14, 17], [18, 27]]
    client.add_scribble_interaction(stroke, True, interaction_bbox=where)
    np.testing.assert_array_equal(client.target_buffer, wedge())
    client.add_scribble_interaction(stroke, False, interaction_bbox=where)
    assert not client.target_buffer[5, 15, 18:27].any()
    assert client.target_buffer[5].any()


def test_a_lasso_holds_the_object_and_takes_it_away(client):
    area = np.zeros(SHAPE, bool)
    area[5, 9:23, 14:36] = True
    client.add_lasso_interaction(area, True)
    np.testing.assert_array_equal(client.target_buffer, wedge())
    client.add_lasso_interaction(area.astype(np.int16), False)
    assert not client.target_buffer[5].any()


def test_a_negative_box_takes_away_what_is_in_it(client):
    client.add_bbox_interaction(BOX, True)
    before = client.target_buffer.copy()
    client.add_bbox_interaction([[5, 6], [8, 16], [12, 40]], False)
    assert not client.target_buffer[5, 8:16, 12:40].any()
    assert client.target_buffer[5, 16:22, 20:35].all()
    client.undo()
    np.testing.assert_array_equal(client.target_buffer, before)
    client.add_bbox_interaction([[4, 7], [8, 30], [12, 45]], False)
    assert client.target_buffer.any((1, 2)).nonzero()[0].tolist() == [3, 7, 8]


def test_every_mark_can_be_undone_exactly(client):
    stroke = np.zeros(SHAPE, np.uint8)
    stroke[6, 12, 18:24] = 1
    marks = [
        lambda: client.add_bbox_interaction(BOX, True),
        lambda: client.add_point_interaction([7, 11, 20], False),
        lambda: client.add_scribble_interaction(stroke, False),
        lambda: client.add_lasso_interaction(stroke, True),
        lambda: client.add_bbox_interaction([[2, 6], [0, 20], [0, 20]], False),
        lambda: client.add_initial_seg_interaction(stroke),
        lambda: client.add_point_interaction([6, 12, 20], False),
    ]
    for mark in marks:
        before = client.target_buffer.copy()
        mark()
        done = client.target_buffer.copy()
        assert client.undo()
        np.testing.assert_array_equal(client.target_buffer, before)
        mark()
        np.testing.assert_array_equal(client.target_buffer, done)


def test_marks_wait_until_a_prediction_is_asked_for(client):
    assert client.add_bbox_interaction(BOX, True, run_prediction=False) is None
    assert client.add_point_interaction([5, 15, 25], False, run_prediction=False) is None
    assert not client.target_buffer.any()
    client._predict()
    assert client.target_buffer[7].any()
    assert not client.target_buffer[5, 15, 25]
    assert client._predict() is None
    assert client.undo()  # the click; the box waits again
    assert not client.target_buffer.any()
    client._predict()
    np.testing.assert_array_equal(client.target_buffer, wedge())


def test_a_mark_that_holds_nothing_has_those_answered_that_wait(client):
    client.add_bbox_interaction(BOX, True, run_prediction=False)
    client.add_point_interaction([-1, 5, 5], True)
    np.testing.assert_array_equal(client.target_buffer, wedge())


def test_objects_one_after_another(client):
    client.add_bbox_interaction(BOX, True)
    first = client.target_buffer.copy()
    client.reset_interactions()
    assert not client.target_buffer.any()
    assert not client.undo()
    client.add_point_interaction([0, 0, 45], True)  # where nothing bright is: a disc
    assert client.target_buffer[0, 0, 45] == 1
    client.reset_interactions()
    client.add_initial_seg_interaction(first)
    client.add_point_interaction([5, 11, 20], False)
    assert not client.target_buffer[5, 11, 20]
    others = np.arange(len(first)) != 5
    np.testing.assert_array_equal(client.target_buffer[others], first[others])


def test_a_mask_to_begin_with_can_be_refined(client):
    rough = np.zeros(SHAPE, np.uint8)
    rough[4:8, 9:23, 14:36] = 1
    client.add_initial_seg_interaction(rough, run_prediction=True)
    np.testing.assert_array_equal(client.target_buffer, wedge() & (rough != 0))


def test_an_empty_mark_changes_nothing(client):
    nothing = np.zeros(SHAPE, np.uint8)
    assert client.add_scribble_interaction(nothing, True) is None
    client.add_initial_seg_interaction(nothing)
    assert not client.target_buffer.any()


def test_a_new_buffer_gets_all_of_the_object_with_the_next_answer(client):
    client.add_bbox_interaction(BOX, True)
    client.set_target_buffer(np.zeros(SHAPE, np.uint16))
    client.add_point_interaction([5, 15, 25], True)
    np.testing.assert_array_equal(client.target_buffer, wedge())


def test_a_picture_has_one_slice(server):
    truth = wedge()[5:6]
    with opened(server, truth) as client:
        client.add_bbox_interaction([[0, 1], [8, 25], [12, 41]], True)
        np.testing.assert_array_equal(client.target_buffer, truth)


def test_a_failure_leaves_all_as_it_was(server, client):
    client.add_bbox_interaction(BOX, True)
    before = client.target_buffer.copy()
    server.model.failing = RuntimeError("the model broke")
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        client.add_bbox_interaction([[7, 8], [8, 14], [12, 40]], True)
    client.set_target_buffer(np.zeros(SHAPE, np.uint8))  # so that all is sent
    client.add_point_interaction([3, 0, 0], False)
    np.testing.assert_array_equal(client.target_buffer, before)
    assert client.undo()


def test_the_reach_ends_a_chain_and_the_next_prompt_goes_on():
    with running(reach=1) as server, opened(server) as client:
        client.add_bbox_interaction(BOX, True)
        assert np.flatnonzero(client.target_buffer.any((1, 2))).tolist() == [4, 5, 6]
        client.add_bbox_interaction([[7, 8], [8, 25], [12, 40]], True)
        np.testing.assert_array_equal(client.target_buffer[4:9], wedge()[4:9])


def test_an_answer_that_would_come_too_late_is_the_prompted_slice():
    with running(deadline_s=-1) as server, opened(server) as client:
        client.add_bbox_interaction(BOX, True)
        assert np.flatnonzero(client.target_buffer.any((1, 2))).tolist() == [5]


def test_slots_are_counted_and_lost_leases_are_told():
    with running(slots=1) as server, opened(server) as client:
        with pytest.raises(ServerAtCapacityError):
            server.client()
        assert client.heartbeat() > 599
        assert client.lease_status()["idle_timeout_seconds"] == 600
        assert client.ping()
        server.leases.release(client._lease_token)
        with pytest.raises(SessionExpiredError):
            client.add_point_interaction([1, 2, 3], True)
        with server.client() as other:
            assert other.supported_interactions["bbox3d"]


def test_a_key_is_asked_for_everywhere_but_for_health():
    with running(key="sesame", prefix="/nninteractive") as server:
        with server.client(api_key="sesame") as client:
            assert client.ping()
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Bearer é"}):
            raw = {name: value.encode() for name, value in headers.items()}
            for path, method in (("/claim", "POST"), ("/capabilities", "GET"), ("/undo", "POST")):
                answer = httpx.request(method, server.url + path, headers=raw)
                assert (answer.status_code, type(answer.json()["detail"])) == (401, str)
        assert httpx.get(server.url + "/healthz").status_code == 200
        assert httpx.post(server.url + "/claim/").status_code == 404  # no redirect


def test_fifty_viewers_work_at_a_time_and_see_their_own_object(server):
    def work(number: int) -> None:
        shift = number % 5
        truth = np.roll(wedge(), shift, 0)
        viewer = RawViewer(server.url, image=picture(truth))
        box = {"bbox_coords": [[5 + shift, 6 + shift], *BOX[1:]], "include_interaction": True}
        answer = viewer.post("add_bbox_interaction", json=box)
        assert json.loads(answer.headers["X-Meta"])["bbox"][0] == [3 + shift, 9 + shift]
        np.testing.assert_array_equal(
            unpack_array(answer.content), truth[3 + shift : 9 + shift, 10:22, 15:38]
        )
        viewer.post("release")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(work, range(50)))
    assert len(server.leases) == 0


def test_a_stroke_through_many_slices_decides_each_of_them(client):
    stroke = np.zeros(SHAPE, np.uint8)
    stroke[4:8, 14:16, 22:24] = 1
    client.add_scribble_interaction(stroke, True)
    assert client.target_buffer[stroke != 0].all()
    assert (client.target_buffer != wedge()).sum() < 0.01 * wedge().sum()
    client.add_scribble_interaction(stroke, False)
    assert not client.target_buffer[stroke != 0].any()
    with running(deadline_s=-1) as late, opened(late) as client:
        client.add_scribble_interaction(stroke, True)
        np.testing.assert_array_equal(client.target_buffer, stroke)


def test_what_is_found_in_time_is_kept(monkeypatch):
    """The clock goes a second for each slice that is asked."""
    with running(deadline_s=7.5) as server, opened(server) as client:
        now = [0.0]
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(carrying, "time", clock)
        monkeypatch.setattr(workspace, "time", clock)
        ask = server.model.predict_boxes

        def slow(boxes):
            now[0] += 1
            return ask(boxes)

        server.model.predict_boxes = slow
        client.add_bbox_interaction(BOX, True)
        found = np.flatnonzero(client.target_buffer.any((1, 2))).tolist()
    assert 5 in found
    assert 1 < len(found) < 6
    np.testing.assert_array_equal(client.target_buffer[found], wedge()[found])


@pytest.mark.parametrize("deadline_s", [3.5, 4.0, 4.5, 5.9])
def test_an_answer_comes_by_its_deadline(monkeypatch, deadline_s):
    """A slice takes a second when it is asked for the first time, and little once it is known."""
    with running(deadline_s=deadline_s) as server, opened(server) as client:
        now, known = [0.0], set()
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(carrying, "time", clock)
        monkeypatch.setattr(workspace, "time", clock)
        ask = server.model.predict_boxes

        def timed(boxes):
            pixels = server.model._bright.tobytes()
            now[0] += 0.05 if pixels in known else 1
            known.add(pixels)
            return ask(boxes)

        server.model.predict_boxes = timed
        client.add_bbox_interaction(BOX, True)
        assert client.target_buffer[6].any()
    assert deadline_s - 2 < now[0] <= deadline_s


class Encoded(BoxTrained, FreeEncoder):
    """Asked with embeddings, as local models are."""


def test_an_answer_on_encoded_slices_comes_by_its_deadline(monkeypatch):
    """Slices found in time are asked a second time, which takes as long where all are encoded."""
    with running(deadline_s=4.0, model=Encoded()) as server, opened(server) as client:
        client.add_bbox_interaction(BOX, True)
        np.testing.assert_array_equal(client.target_buffer, wedge())
        client.reset_interactions()
        now, ask = [0.0], server.model.predict_boxes
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(carrying, "time", clock)
        monkeypatch.setattr(workspace, "time", clock)

        def timed(boxes):
            now[0] += 0.5
            return ask(boxes)

        server.model.predict_boxes = timed
        client.add_bbox_interaction(BOX, True)
        assert client.target_buffer[6].any()
    assert 2.0 < now[0] <= 4.0
