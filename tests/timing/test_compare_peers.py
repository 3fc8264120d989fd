"""`benchmarks/compare_peers.py`: what is asked, what is held against what, what is not timed."""

import json
import os
import subprocess

import compare_peers
import numpy as np
import pytest
from timing import peers

from dbsam_deploy.cli import run


class Filled:
    """A model whose mask is the box, `less` pixels narrower."""

    def __init__(self, less: int = 0) -> None:
        self.less, self.images = less, []

    def set_image(self, image):
        self.images.append(image.tobytes())
        self.shape = image.shape[:2]

    def masks(self, boxes):
        masks = np.zeros((len(boxes), *self.shape), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0:y1, x0 : x1 - self.less] = 1
        return masks


def _made(source, folder):
    served = folder / "model_repository_fp32"
    served.mkdir()
    for place in (folder, served):
        (place / "weights.bin").write_bytes(bytes(1 << 20))


def _fails(source, folder):
    raise ModuleNotFoundError("No module named 'samexporter'")


WAYS = {
    "own": peers.Way("the model's own", peers.SAM, lambda folder: Filled(), _made),
    "x-ours": peers.Way("ours", peers.SAM, lambda folder: Filled(), _made, files="own"),
    "wrong": peers.Way("narrower", peers.SAM, lambda folder: Filled(9), _made, "int8"),
    "absent": peers.Way("not installed", peers.SAM, lambda folder: Filled(), _fails),
}


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """`call(*more)` → (exit status, rows by name); a way's process is a fork of this one."""
    for module in (compare_peers, peers):
        monkeypatch.setattr(module, "WAYS", WAYS)

    def child(words):
        report = tmp_path / "stderr"
        pid = os.fork()
        if pid == 0:
            try:
                peers.main([str(word) for word in words])
            except Exception as error:
                report.write_text(f"Traceback\n{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        return subprocess.CompletedProcess(words, status, "", report.read_text() if status else "")

    monkeypatch.setattr(compare_peers, "_child", child)

    def call(*more):
        found = tmp_path / "rows.json"
        words = ["--model", peers.SAM, "--work", tmp_path / "work", "--checkpoint", tmp_path]
        words += ["--json", found, "--repeats", 2, "--rounds", 1, "--slices", 2, *more]
        status = run(compare_peers.main, [str(word) for word in words])
        return status, json.loads(found.read_text())["rows"] if found.is_file() else {}

    return call


def test_what_agrees_is_timed_and_the_rest_is_named(compared, tmp_path, capsys):
    status, rows = compared("--plot", tmp_path / "plot.png")
    shown = capsys.readouterr().out
    assert status == 0
    assert [len(row["runs"]) for row in rows.values()] == [2, 2, 1, 0]
    assert rows["own"]["agreement_mean"] == rows["x-ours"]["agreement_p5"] == 1
    questions = ["cold start", "encode", "1 box", "32 boxes", "2 slices", "MiB"]
    assert all(list(found) == questions for found in rows["own"]["runs"])
    assert all(value > 0 for found in rows["own"]["runs"] for value in found.values())
    assert rows["x-ours"]["mib_on_disk"] == 1
    assert "narrower: not timed: agreement 0." in shown
    assert "not installed: not timed: ModuleNotFoundError: No module named 'samexporter'" in shown
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert not (tmp_path / "work" / "absent").exists(), "it is tried again next time"


def test_one_of_ours_that_is_wrong_is_a_failure(compared, monkeypatch):
    narrow = peers.Way("ours", peers.SAM, lambda folder: Filled(9), _made)
    monkeypatch.setitem(WAYS, "x-ours", narrow)
    status, rows = compared("--ways", "x-ours")
    assert status == 1
    assert list(rows) == ["own", "x-ours"], "the first one is what it is held against"


@pytest.mark.parametrize(("empty", "missed"), [(2, ""), (3, "3 of the 4 masks are empty")])
def test_a_few_masks_may_be_empty_in_both(empty, missed):
    masks = np.ones((4, 6, 6), np.uint8)
    masks[:empty] = 0
    row = compare_peers.Row("own")
    said = compare_peers._judge(row, WAYS["own"], masks, masks)
    assert said.startswith(missed)
    assert bool(said) == bool(missed)
    assert row.agreement_mean == (0 if missed else 1)


def test_every_timed_image_is_a_new_one():
    peer, image = Filled(), np.random.default_rng().integers(0, 256, (40, 50, 3), np.uint8)
    peers.ask(peer, image, np.array([[1, 2, 30, 20]], np.float32), rounds=3, slices=4)
    assert len(set(peer.images)) == len(peer.images) == 3 + 1 + 4


def test_the_question_has_32_boxes_inside_the_image(tmp_path):
    with np.load(compare_peers._question(tmp_path)) as file:
        image, boxes = file["image"], file["boxes"]
    assert boxes.shape == (32, 4)
    assert len(np.unique(boxes, axis=0)) == 32
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= image.shape[1::-1]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_unknown_ways_and_missing_weights_are_refused(compared, tmp_path, capsys):
    assert compared("--ways", "own,other")[0] == 2
    assert "expected some of own, x-ours, wrong, absent" in capsys.readouterr().err
    words = ["--model", peers.LITE, "--work", str(tmp_path / "w")]
    assert run(compare_peers.main, words) == 2
    assert "needs --checkpoint FILE" in capsys.readouterr().err
