"""Whatever comes over the network: a refusal with a text, the slot and the others unharmed."""

from __future__ import annotations

import json
import random
import socket
import struct

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote.serialization import pack_array
from support.serving import wait_until
from support.viewer import BOX, IMAGE, RawViewer, running
from support.wedge import SHAPE, wedge

from dbsam_deploy.viewer.packed import pack

SHARED = {"include_interaction": True}


@pytest.fixture
def viewer(server):
    one = RawViewer(server.url)
    yield one
    one.post("release")


def check(answer: httpx.Response, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"coordinates": [1, 2, 3]},
        {**SHARED, "coordinates": [1, 2]},
        {**SHARED, "coordinates": [1, 2, "3"]},
        {**SHARED, "coordinates": [1, 2, True]},
        {**SHARED, "coordinates": [1, 2, 1e300]},
        {**SHARED, "coordinates": {"x": 1}},
        {"coordinates": [1, 2, 3], "include_interaction": 1},
        {**SHARED, "coordinates": [1, 2, 3], "run_prediction": "yes"},
    ],
)
def test_points_of_another_form(viewer, fields):
    check(viewer.post("add_point_interaction", json=fields))


@pytest.mark.parametrize(
    "box",
    [None, [], [[0, 1]], [[0, 1], [0, 0], [0, 5]], [[0, 1], [5, 0], [0, 5]], [[0, 1], 3, [0, 5]]],
)
def test_boxes_of_another_form(viewer, box):
    check(viewer.post("add_bbox_interaction", json={**SHARED, "bbox_coords": box}))


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 50_000, b'{"a":' * 9_000, b"NaN"])
def test_bodies_that_are_no_json_object(viewer, text):
    for path in ("add_point_interaction", "undo", "set_do_autozoom"):
        check(viewer.post(path, content=text))


def test_numbers_that_json_does_not_have(viewer):
    for number in ("NaN", "Infinity", "1" * 5000, "1e999"):
        text = f'{{"coordinates": [1, 2, {number}], "include_interaction": true}}'
        check(viewer.post("add_point_interaction", content=text))


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        (np.ones((1, 2, 2), np.uint8), None),
        (np.ones(SHAPE, np.float32), None),
        (np.ones((1, 2, 2), np.uint8), [[0, 1], [0, 2], [0, 3]]),
        (np.ones((1, 2, 2), np.uint8), [[14, 15], [0, 2], [0, 2]]),
        (np.ones((1, 2, 2), np.uint8), [[-1, 0], [0, 2], [0, 2]]),
        (np.ones((1, 2, 2), np.uint8), [[0.5, 1.5], [0, 2], [0, 2]]),
        (np.ones((2, 2), np.uint8), [[0, 1], [0, 2], [0, 2]]),
        (b"NNIA", None),
    ],
)
def test_masks_of_another_form(viewer, mask, box):
    for path in ("add_scribble_interaction", "add_lasso_interaction"):
        check(viewer.send(path, mask, {**SHARED, "interaction_bbox": box}))
    if box is None:
        check(viewer.send("add_initial_seg_interaction", mask, {}))


@pytest.mark.parametrize("meta", ["{", "[]", "null", '{"include_interaction": 3}', "{}"])
def test_a_meta_header_of_another_form(viewer, meta):
    check(viewer.send("add_scribble_interaction", np.ones(SHAPE, np.uint8), meta))


@pytest.mark.parametrize(
    "image",
    [
        np.ones((2, 3, 4, 5), np.uint8),
        np.ones((3, 4, 5), np.uint8),
        pack(np.ones((1, 0, 4, 5), np.uint8)),
        np.ones((1, 2, 3, 4, 5), np.uint8),
    ],
)
def test_images_of_another_form_leave_the_earlier_one(viewer, image):
    check(viewer.send("set_image", image, {}))
    viewer.post("add_bbox_interaction", json={**SHARED, "bbox_coords": BOX}).raise_for_status()


@pytest.mark.parametrize(
    "fields", [{}, {"shape": [1, 2, 3], "dtype": "uint8"}, {"shape": SHAPE, "dtype": "float32"}]
)
def test_buffers_of_another_form(viewer, fields):
    check(viewer.post("set_target_buffer", json=fields))
    check(viewer.post("set_target_buffer", json={"shape": SHAPE, "dtype": "no, such"}))


def test_nothing_can_be_prompted_before_an_image_and_its_buffer(server):
    viewer = RawViewer(server.url, ready=False)
    point = {**SHARED, "coordinates": [1, 2, 3]}
    check(viewer.post("add_point_interaction", json=point))
    check(viewer.post("predict", json={}))
    check(viewer.send("add_scribble_interaction", np.ones(SHAPE, np.uint8), SHARED))
    assert viewer.post("reset_interactions", json={}).status_code == 200
    assert json.loads(viewer.post("undo").headers["X-Meta"])["ran_prediction"] is False
    viewer.send("set_image", IMAGE, {"image_properties": {"spacing": "?"}}).raise_for_status()
    check(viewer.post("add_point_interaction", json=point))


@pytest.mark.parametrize("shape", [(1, 40_000, 1, 1), (1, 1, 8200, 8200)])
def test_images_of_too_many_or_too_large_slices_are_refused_at_upload(shape):
    with running(max_voxels=2**28) as server:
        viewer = RawViewer(server.url, ready=False)
        check(viewer.send("set_image", np.zeros(shape, np.uint8), {}), 413)


def test_what_is_too_large_is_refused_at_upload_and_the_slot_goes_on():
    with running(max_voxels=28_000, image_bytes=200_000) as server:
        viewer = RawViewer(server.url)
        check(viewer.send("set_image", np.zeros((1, 40, 40, 40), np.uint8), {}), 413)
        bomb = struct.pack("<4sBBBB", b"NNIA", 1, 1, 4, 5) + b"uint8"
        bomb += struct.pack("<4qI", 1, 2**20, 2**20, 2**20, 0)
        check(viewer.send("set_image", bomb, {}), 413)
        check(viewer.send("set_image", bytes(3_000_000), {}), 413)
        others = [RawViewer(server.url, ready=False) for _ in range(2)]
        statuses = [o.send("set_image", IMAGE.astype(np.float64), {}).status_code for o in others]
        assert 413 in statuses  # all images together
        check(viewer.post("undo", content=b" " * 70_000), 413)
        answer = viewer.post("add_bbox_interaction", json={**SHARED, "bbox_coords": BOX})
        assert json.loads(answer.headers["X-Meta"])["bbox"] == [[3, 9], [10, 22], [15, 38]]


def test_an_upload_that_stands_still_or_breaks_off_costs_nobody_else():
    with running(slots=2, upload_s=0.3) as server:
        viewer = RawViewer(server.url)
        token = viewer.http.headers["X-Lease-Token"]
        host, port = server.url.removeprefix("http://").split(":")
        head = f"POST /set_image HTTP/1.1\r\nHost: x\r\nX-Lease-Token: {token}\r\n"
        head += "Content-Length: 100000\r\n\r\n"
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(head.encode() + b"NNIA")
            slow.settimeout(5)
            assert b" 408 " in slow.recv(4096)
        with socket.create_connection((host, int(port))) as killed:
            killed.sendall(head.encode() + b"NNIA")
        point = {**SHARED, "coordinates": [5, 15, 25]}
        viewer.post("add_point_interaction", json=point).raise_for_status()
        assert wait_until(lambda: server.leases.find(token).in_flight == 0)


def test_random_requests_are_never_an_error_of_the_server(server):
    rng, viewer = random.Random(0), RawViewer(server.url)
    paths = ["add_point_interaction", "add_bbox_interaction", "set_target_buffer", "undo"]
    paths += ["add_scribble_interaction", "add_lasso_interaction", "add_initial_seg_interaction"]
    paths += ["set_image", "set_do_autozoom", "predict", "reset_interactions"]
    values = [None, True, False, -1, 0, 5, 1.5, 1e308, "x", [], [1, 2, 3], BOX, {}, [[0, 99]] * 3]
    names = ["coordinates", "bbox_coords", "include_interaction", "run_prediction", "shape"]
    names += ["dtype", "interaction_bbox", "do_autozoom", "image_properties"]
    good = [pack_array(IMAGE), pack_array(wedge()), pack_array(np.ones((1, 2, 2), bool))]
    for _ in range(80):
        fields = {n: rng.choice(values) for n in rng.sample(names, rng.randrange(len(names)))}
        fields |= SHARED if rng.random() < 0.5 else {}
        body = bytearray(rng.choice([*good, json.dumps(fields).encode()]))
        for _ in range(rng.choice([0, 0, 1, 3])):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = viewer.send(rng.choice(paths), bytes(body), fields)
        assert answer.status_code in (200, 400, 413), answer.text
        if answer.status_code != 200:
            assert isinstance(answer.json()["detail"], str)
    assert httpx.get(server.url + "/healthz").json() == {"ok": True}
