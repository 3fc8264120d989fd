"""The page's own routes: what they take, what they refuse, and from whom."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import tempfile

import httpx
import nibabel
import numpy as np
import pytest
from PIL import Image
from support.dicom_series import write_dicom_series
from support.small_disk import leave
from support.viewer import RawViewer, running
from support.wedge import SHAPE, wedge

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.viewer.study import inflated
from dbsam_deploy.viewer.uploads import read_upload, suffix_of

PIXELS = np.where(wedge(), 200, 20).astype(np.uint8)
PIXELS[:, 0, 0] = 60
BOX = {
    "label": 1,
    "through": True,
    "include_interaction": True,
    "bbox_coords": [[5, 6], [8, 25], [12, 40]],
}


def upload(*files: bytes, **fields) -> bytes:
    head = json.dumps({**fields, "sizes": [len(one) for one in files]}).encode()
    return struct.pack("<I", len(head)) + head + b"".join(files)


def nifti(values: np.ndarray = PIXELS) -> bytes:
    return gzip.compress(
        nibabel.Nifti1Image(values.transpose(2, 1, 0), np.eye(4)).to_bytes(), 1, mtime=0
    )


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def viewer(server):
    one = RawViewer(server.url, ready=False)
    yield one
    one.post("release")


def opened(viewer: RawViewer, *files: bytes, **fields) -> dict:
    answer = viewer.post("study/open", content=upload(*(files or (nifti(),)), **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def drawn(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    meta, out = json.loads(answer.headers["x-meta"]), np.zeros(SHAPE, bool)
    if meta["box"]:
        place = tuple(slice(*side) for side in meta["box"])
        out[place] = np.frombuffer(answer.content, np.uint8).reshape(out[place].shape)
    return out


def test_the_page_comes_with_rules_that_keep_everything_on_this_server(server):
    for path in ("/", "/page/main.js", "/page/style.css", "/page/third_party/niivue.js"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "connect-src 'self'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(server.url + "/page/../page.py").status_code == 404
    assert httpx.get(server.url + "/page/%2e%2e/page.py").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:1527"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "null"},
    ],
)
def test_other_sites_may_not_ask(viewer, headers):
    opened(viewer)
    answer = viewer.post("study/mark", json=BOX, headers=headers)
    assert answer.status_code == 403
    assert isinstance(answer.json()["detail"], str)
    assert "access-control-allow-origin" not in answer.headers


def test_no_other_origin_is_let_in_and_a_key_opens_other_names(server):
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(server.url + "/study/mark", headers=asked)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
    with running(key="sesame") as locked:
        named = {"Host": "viewer.hospital", "Authorization": "Bearer sesame"}
        assert httpx.get(locked.url + "/study/about", headers=named).status_code == 200
        assert httpx.get(locked.url + "/study/about").status_code == 401
        assert httpx.get(locked.url + "/").status_code == 200


def test_an_object_that_was_not_followed_to_its_ends_is_said_to_be_so():
    for deadline_s, is_late in ((-1, True), (60, False)):
        with running(deadline_s=deadline_s) as server:
            viewer = RawViewer(server.url, ready=False)
            opened(viewer)
            answer = viewer.post("study/mark", json=BOX)
            assert json.loads(answer.headers["x-meta"])["is_late"] is is_late
            # A step back leaves nothing open.
            answer = viewer.post("study/undo", json={"label": 1})
            assert json.loads(answer.headers["x-meta"])["is_late"] is False


def test_objects_have_marks_and_a_step_back_of_their_own(viewer):
    opened(viewer)
    np.testing.assert_array_equal(drawn(viewer.post("study/mark", json=BOX)), wedge())
    second = {**BOX, "label": 2, "through": False}
    only = drawn(viewer.post("study/mark", json=second))
    assert np.flatnonzero(only.any((1, 2))).tolist() == [5]
    meta = json.loads(viewer.post("study/undo", json={"label": 1}).headers["x-meta"])
    assert meta["has_run"]
    meta = json.loads(viewer.post("study/undo", json={"label": 1}).headers["x-meta"])
    assert not meta["has_run"]
    objects = [{"label": 2, "name": "two\n"}, {"label": 1, "name": ""}]
    saved = viewer.post("study/save", json={"format": "npz", "objects": objects})
    content = np.load(io.BytesIO(saved.content))
    np.testing.assert_array_equal(content["segs"], 2 * only)
    assert content["label_names"].tolist() == ["object 1", "two"]


def test_masks_come_back_after_a_lost_slot(viewer):
    opened(viewer)
    bits = (wedge() * 1 + np.roll(wedge(), 1, 0) * 4).astype(np.uint8)
    assert viewer.post("study/masks", content=gzip.compress(bits.tobytes())).status_code == 200
    undone = viewer.post("study/undo", json={"label": 3})  # the step back is lost, the mask is not
    assert not json.loads(undone.headers["x-meta"])["has_run"]
    objects = [{"label": 1, "name": "a"}, {"label": 3, "name": "c"}]
    saved = viewer.post("study/save", json={"format": "nifti", "objects": objects})
    values = nibabel.Nifti1Image.from_bytes(gzip.decompress(saved.content)).get_fdata()
    expected = np.where(np.roll(wedge(), 1, 0), 3, wedge())
    np.testing.assert_array_equal(values.transpose(2, 1, 0), expected)


@pytest.mark.parametrize(
    "values",
    [
        np.where(wedge(), 100, -1000).astype(np.int16),
        np.where(wedge(), np.nan, np.arange(50) / 8).astype(np.float32),
    ],
    ids=["ct", "nan"],
)
def test_values_are_seen_as_other_viewers_see_them(viewer, values):
    values[0, 0, :2] = 7
    said = opened(viewer, nifti(values))
    assert ("soft-tissue" in said["values"]) == (values.dtype == np.int16)
    assert "level 1 width 3" in opened(viewer, nifti(values), window=[1, 3])["values"]


def test_what_fills_the_gaps_of_an_mr_makes_no_ct_of_it(viewer):
    values = np.where(wedge(), 200, np.arange(50)).astype(np.int16)
    values[:, :5] = -32768
    assert "soft-tissue" not in opened(viewer, nifti(values))["values"]


def test_an_image_is_shown_as_the_model_sees_it(viewer):
    opened(viewer)
    shown = nibabel.Nifti1Image.from_bytes(viewer.post("study/pixels").content)
    np.testing.assert_array_equal(np.asarray(shown.dataobj).transpose(2, 1, 0), PIXELS)
    np.testing.assert_allclose(shown.affine, np.eye(4))
    opened(viewer, png(PIXELS[5]))
    body = viewer.post("study/pixels").content
    rgba = np.frombuffer(body[352:], np.uint8).reshape(*SHAPE[1:], 4)
    np.testing.assert_array_equal(rgba[::-1, ::-1, 0], PIXELS[5])


def test_several_series_are_named(viewer, tmp_path):
    values = np.where(wedge(), 100, -1000).astype(np.int16)
    files = []
    for number in (3, 4):
        paths = write_dicom_series(tmp_path / str(number), values, SeriesNumber=number)
        files += [path.read_bytes() for path in paths]
    answer = viewer.post("study/open", content=upload(*files))
    assert answer.status_code == 400
    first, *lines = answer.json()["detail"].splitlines()
    assert first.endswith("holds 2 DICOM series: choose one")
    assert [line.strip().split(" · ")[0] for line in lines] == ["number 3", "number 4"]
    assert opened(viewer, *files, series="4")["shape"] == list(SHAPE)


def test_nothing_of_an_upload_stays_on_the_disk(viewer, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened(viewer)
    values = np.where(wedge(), 100, -1000).astype(np.int16)
    paths = write_dicom_series(tmp_path / "ct", values, FrameOfReferenceUID="1.2.3")
    opened(viewer, *(path.read_bytes() for path in paths))
    viewer.post("study/mark", json=BOX)
    save = {"format": "dicom-seg", "objects": [{"label": 1, "name": "a"}]}
    assert viewer.post("study/save", json=save).content[128:132] == b"DICM"
    assert viewer.post("study/open", content=upload(b"\x89PNG\r\n\x1a\n")).status_code == 400
    assert os.listdir(tmp_path) == ["ct"]


def test_a_full_disk_of_temporary_files_is_told(viewer, monkeypatch, small_disk):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    leave(small_disk, 0)
    noise = np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8)
    answer = viewer.post("study/open", content=upload(png(noise)))
    assert answer.status_code == 507
    assert answer.json()["detail"] == (
        "no room for temporary files on the server: No space left on device"
    )
    (small_disk / "ballast").unlink()
    opened(viewer, png(noise))
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("open", b""),
        ("open", b"\xff\xff\xff\xff{}"),
        ("open", upload()),
        ("open", upload(b"hello")),
        ("open", upload(b"hello", b"world")),
        ("open", upload(b"x" * 400)),
        ("open", upload(b"\x1f\x8b" + bytes(30))),
        ("open", upload(nifti()) + b"more"),
        ("open", upload(nifti(), window=[1])),
        ("open", upload(nifti(), window="file")),
        ("open", upload(nifti(), window=[0, -1])),
        ("open", upload(nifti(), window=[10**400, 1])),
        ("open", upload(nifti(), window=[0, float("nan")])),
        ("open", struct.pack("<I", 8615) + b'{"sizes": [%b, %b]}' % ((b"9" * 4300,) * 2)),
        ("open", upload(nifti(), series=3)),
        ("open", struct.pack("<I", 16) + b'{"sizes": [1e9]}'),
        ("open", struct.pack("<I", 15) + b'{"sizes": [-1]}'),
        ("open", struct.pack("<I", 18) + b'{"sizes": "../.."}'),
        ("mark", b"[]"),
        ("mark", b'{"label": 1}'),
        ("mark", json.dumps({**BOX, "label": 0}).encode()),
        ("mark", json.dumps({**BOX, "label": 8}).encode()),
        ("mark", json.dumps({**BOX, "label": True}).encode()),
        ("mark", json.dumps({**BOX, "through": 1}).encode()),
        ("undo", b"{}"),
        ("clear", b'{"label": "1"}'),
        ("masks", b""),
        ("masks", gzip.compress(bytes(10), mtime=0)),
        ("masks", gzip.compress(bytes(100_000), mtime=0)),
        ("save", b"{}"),
        ("save", b'{"format": "nifti", "objects": []}'),
        ("save", b'{"format": "../x", "objects": [{"label": 1, "name": "a"}]}'),
        ("save", b'{"format": "dicom-seg", "objects": [{"label": 1, "name": "a"}]}'),
        ("save", b'{"format": "npz", "objects": [{"label": 1, "name": 7}]}'),
    ],
)
def test_what_is_wrong_is_told_in_words(viewer, path, body):
    opened(viewer)
    answer = viewer.post(f"study/{path}", content=body)
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["detail"], str)
    assert tempfile.gettempdir() not in answer.json()["detail"]
    np.testing.assert_array_equal(drawn(viewer.post("study/mark", json=BOX)), wedge())


def test_damaged_files_are_refused_in_words(viewer, tmp_path):
    values = np.where(wedge(), 100, -1000).astype(np.int16)
    (dicom, *_) = write_dicom_series(tmp_path / "ct", values)
    stream = io.BytesIO()
    np.savez(stream, imgs=PIXELS)
    good = [
        nifti(),
        gzip.decompress(nifti()),
        png(PIXELS[5]),
        dicom.read_bytes(),
        stream.getvalue(),
    ]
    rng = random.Random(5)
    for number in range(60):
        content = bytearray(good[number % len(good)])
        for _ in range(rng.choice((1, 4, 40))):
            content[rng.randrange(min(len(content), 600))] = rng.randrange(256)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        answer = viewer.post("study/open", content=upload(bytes(content)))
        assert answer.status_code in (200, 400, 413), answer.text
        if answer.status_code != 200:
            assert str(tempfile.gettempdir()) not in answer.json()["detail"]


def test_what_is_too_large_is_refused_as_such(viewer):
    many = np.zeros((2, 2000, 2000), np.uint8)  # 8 kB as gzip
    many[0, 0, 0] = 1
    answer = viewer.post("study/open", content=upload(nifti(many)))
    assert answer.status_code == 413
    assert "voxels" in answer.json()["detail"]
    assert viewer.post("study/mark", json=BOX).status_code == 400
    assert "open one first" in viewer.post("study/pixels").json()["detail"]


def test_a_study_ends_with_its_slot(server):
    viewer = RawViewer(server.url, ready=False)
    opened(viewer)
    viewer.post("release")
    answer = viewer.post("study/mark", json=BOX)
    assert answer.status_code == 410


def test_a_stream_gives_no_more_than_is_expected():
    bomb = gzip.compress(bytes(10_000_000))
    with pytest.raises(InputError, match="masks of 101 bytes"):
        inflated(bomb, 100)
    assert inflated(gzip.compress(b"abc"), 3) == b"abc"


def test_files_are_known_by_their_content_alone():
    read = read_upload(upload(b"a", b"", b"bc", series="1.2", window="file"))
    assert [bytes(one) for one in read.files] == [b"a", b"", b"bc"]
    assert (read.window, read.series, read.nbytes) == ("file", "1.2", 3)
    assert suffix_of(nifti()) == ".nii.gz"
    assert suffix_of(gzip.decompress(nifti())) == ".nii"
    assert suffix_of(b"") == suffix_of(b"hello") == ""
    assert suffix_of(bytes(128) + b"DICM") == ".dcm"
