"""Who did what with which image, by the real client; and nothing of a patient in any log."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from datetime import datetime
from ipaddress import ip_network
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
from support.small_disk import leave
from support.viewer import BOX, IMAGE, RawViewer, running
from support.wedge import SHAPE

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.viewer.audit import AuditLog, AuditRules, image_hash, read_networks

MODEL = {"model": "bright fp32", "weights": "ab12"}
PATIENT = "DOE^JANE"
USER = {"X-Forwarded-User": "dr.grey", "X-Forwarded-For": "10.0.0.9, 192.0.2.7"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "audit.jsonl"


def audit(file: Path, **rules) -> AuditLog:
    return AuditLog(AuditRules(file, MODEL, **rules))


def test_every_act_of_a_viewer_is_one_line(log):
    stroke = np.zeros(SHAPE, np.uint8)
    stroke[5, 14:16, 22:24] = 1
    with running(audit=audit(log), key={"front desk": "sesame"}) as server:
        with server.client(api_key="sesame") as client:
            client.set_image(IMAGE, {"spacing": [1.0, 1.0, 1.0]})
            client.set_target_buffer(np.zeros(SHAPE, np.uint8))
            client.set_do_autozoom(True)
            client.add_bbox_interaction(BOX, True)
            client.add_point_interaction([5, 15, 25], False)
            client.undo()
            client.add_scribble_interaction(stroke, True)
            client.add_lasso_interaction(stroke, False)
            client.reset_interactions()
            client.add_initial_seg_interaction(stroke)
            client._predict()
            client.heartbeat()
        httpx.post(server.url + "/claim")
    start, *found = lines(log)
    assert start == {"time": start["time"], "what": "start", **MODEL}
    assert [line["what"] for line in found] == [
        *("claim", "set_image", "box", "point", "undo", "scribble", "lasso", "reset", "mask"),
        *("predict", "release"),
    ]
    for line in found:
        assert datetime.fromisoformat(line["time"]).utcoffset().total_seconds() == 0
        assert (line["who"], line["from"], line["status"]) == ("front desk", "127.0.0.1", 200)
        assert line["ms"] > 0
        assert {key: line[key] for key in MODEL} == MODEL
        assert line["session"] == found[0]["session"]
        if line["what"] != "claim":
            expected = hashlib.blake2b(IMAGE.tobytes(), digest_size=32).hexdigest()
            assert (line["image"], line["voxels"]) == (expected, list(SHAPE))
    assert set(found[2]) == {
        *("time", "who", "from", "what", "session", "image", "voxels", "status", "ms"),
        *MODEL,
    }, "no coordinates"


def test_what_is_refused_is_written_with_its_status(log):
    with running(audit=audit(log), slots=1) as server:
        viewer = RawViewer(server.url)
        assert viewer.post("add_bbox_interaction", json={"bbox_coords": 5}).status_code == 400
        assert viewer.post("claim").status_code == 503
        viewer.http.headers["X-Lease-Token"] = "another"
        assert viewer.post("undo").status_code == 410
    found = [(line["what"], line["status"]) for line in lines(log)[3:]]
    assert found == [("box", 400), ("claim", 503), ("undo", 410)]


@pytest.mark.parametrize(
    ("proxies", "who"),
    [
        ((), ("", "127.0.0.1")),
        ((ip_network("127.0.0.0/8"),), ("dr.grey", "192.0.2.7")),
        ((ip_network("10.0.0.9/32"),), ("", "127.0.0.1")),
    ],
)
def test_only_a_trusted_proxy_says_who_it_was(log, proxies, who):
    with running(audit=audit(log, proxies=proxies)) as server:
        assert httpx.post(server.url + "/claim", headers=USER).status_code == 200
    line = lines(log)[-1]
    assert (line["who"], line["from"]) == who


def test_no_log_names_the_patient(log, caplog):
    """Whatever a viewer sends beside the voxels, right or wrong, and where the server fails."""
    caplog.set_level(logging.DEBUG)
    named = {"spacing": [1, 1, 1], "PatientName": PATIENT}
    with running(audit=audit(log)) as server:
        with server.client() as client:
            client.set_image(IMAGE, named)
            client.set_target_buffer(np.zeros(SHAPE, np.uint8))
            server.model.failing = RuntimeError("the model broke")
            with pytest.raises(httpx.HTTPStatusError, match="500"):
                client.add_bbox_interaction(BOX, True)
            client.add_bbox_interaction(BOX, True)
        viewer = RawViewer(server.url)
        assert viewer.send("set_image", IMAGE, {"image_properties": PATIENT}).status_code == 200
        for body in ({"bbox_coords": PATIENT}, {PATIENT: 1}, {"include_interaction": PATIENT}):
            assert viewer.post("add_bbox_interaction", json=body).status_code == 400
        assert viewer.post(f"undo?PatientName={PATIENT}").status_code == 200
        assert viewer.send("set_image", PATIENT.encode(), PATIENT).status_code == 400
        assert viewer.post("claim", headers={"X-Forwarded-User": PATIENT}).status_code == 200
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    everything = log.read_text() + "\n".join(map(logging.Formatter().format, ours))
    assert "a request to /add_bbox_interaction failed" in everything
    assert '"what": "set_image"' in everything
    for text in ("DOE", "JANE", "PatientName"):
        assert text not in everything


def test_our_own_page_is_audited_too_and_its_files_names_are_not(log, caplog):
    caplog.set_level(logging.DEBUG)
    picture = nibabel.Nifti1Image(IMAGE[0].transpose(2, 1, 0), np.eye(4))
    picture.header["descrip"] = PATIENT.encode()
    file = picture.to_bytes()
    head = json.dumps({"sizes": [len(file)], "PatientName": PATIENT}).encode()
    box = {"label": 1, "through": True, "include_interaction": True, "bbox_coords": BOX}
    with running(audit=audit(log)) as server:
        viewer = RawViewer(server.url, ready=False)
        body = struct.pack("<I", len(head)) + head + file
        assert viewer.post("study/open", content=body).status_code == 200
        assert viewer.post("study/mark", json=box).status_code == 200
        assert viewer.post("study/undo", json={"label": 1}).status_code == 200
        assert viewer.post("study/open", content=body[:-9]).status_code == 400
    found = lines(log)[2:]
    assert [line["what"] for line in found] == ["set_image", "mark", "undo", "set_image"]
    assert [line["voxels"] for line in found] == [list(SHAPE)] * 4
    assert len({line["image"] for line in found}) == 1
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    assert "DOE" not in log.read_text() + "\n".join(map(logging.Formatter().format, ours))


def test_the_file_is_its_owners_and_grows_at_its_end(log):
    before = os.umask(0)
    try:
        for _ in range(2):
            audit(log).close()
    finally:
        os.umask(before)
    assert log.stat().st_mode & 0o777 == 0o600
    assert [line["what"] for line in lines(log)] == ["start", "stop"] * 2


def test_it_may_be_moved_away_at_any_time(log, tmp_path):
    one = audit(log)
    log.rename(tmp_path / "audit.1")
    with running(audit=one) as server:
        httpx.post(server.url + "/claim")
    assert [line["what"] for line in lines(tmp_path / "audit.1")] == ["start"]
    assert [line["what"] for line in lines(log)] == ["claim"]
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_stops_the_work_until_there_is_room(small_disk, caplog):
    log = small_disk / "audit.jsonl"
    one = audit(log)
    with running(audit=one) as server, server.client() as client:
        client.set_image(IMAGE, {"spacing": [1, 1, 1]})
        client.set_target_buffer(np.zeros(SHAPE, np.uint8))
        leave(small_disk, 0)
        with pytest.raises(httpx.HTTPStatusError, match="507"):
            client.add_bbox_interaction(BOX, True)
        assert client.heartbeat() > 0
        assert "the audit log cannot be written (its disk is full): all is refused" in caplog.text
        (small_disk / "ballast").unlink()
        client.add_bbox_interaction(BOX, True)
        assert client.target_buffer.any()
    one.close()
    found = [(line["what"], line.get("status")) for line in lines(log)]
    assert found == [
        *(("start", None), ("claim", 200), ("set_image", 200), ("box", 507), ("box", 200)),
        *(("release", 200), ("stop", None)),
    ]


def test_who_may_do_without_it_is_told_that_it_is_incomplete(small_disk, caplog):
    one = audit(small_disk / "audit.jsonl", is_required=False)
    leave(small_disk, 0)
    with running(audit=one) as server:
        assert httpx.post(server.url + "/claim").status_code == 200
    one.close()
    assert "it is incomplete" in caplog.text


def test_a_line_that_was_cut_off_stays_and_the_next_one_is_whole(small_disk):
    """The disk takes a part of it: what is left of a page."""
    log = small_disk / "audit.jsonl"
    one = audit(log, is_required=False)
    while log.stat().st_size < 4000:
        one.write(one.caller("a", {}, ""), what="filling")
    leave(small_disk, 0)
    one.write(one.caller("a", {}, ""), what="x" * 500)
    (small_disk / "ballast").unlink()
    one.write(one.caller("a", {}, ""), what="after")
    *_, torn, last = log.read_text().splitlines()
    assert torn.startswith('{"time": ')
    assert not torn.endswith("}")
    assert json.loads(last)["what"] == "after"
    one.close()


def test_a_server_after_a_crash_begins_on_a_line_of_its_own(log):
    log.write_text('{"time": "2026-')
    audit(log).close()
    torn, start, stop = log.read_text().splitlines()
    assert (torn, json.loads(start)["what"], json.loads(stop)["what"]) == (
        '{"time": "2026-',
        "start",
        "stop",
    )


def test_mistakes_are_told(tmp_path):
    for place in (tmp_path, tmp_path / "none" / "audit", Path("/dev/null")):
        with pytest.raises(InputError, match="cannot be written"):
            audit(place)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        audit(tmp_path / "link")
    with pytest.raises(InputError, match=r"--trust-proxy: .*expected an address"):
        read_networks(["10.0.0.1", "proxy"])


def test_a_hash_is_of_the_voxels_whatever_their_order_in_memory():
    values = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    assert image_hash(values) == image_hash(np.asfortranarray(values))
    assert image_hash(values[:0]) == hashlib.blake2b(b"", digest_size=32).hexdigest()
