"""What was decoded is kept slice by slice, and belongs to one run."""

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from support.bright import BrightPredictor

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.volumes.embeddings import SharedPredictor
from dbsam_deploy.volumes.kept_answers import KeptAnswers, ResumedPredictor, remove_answers

RUN = {"image": "abc", "model": "bright"}


def ask(path: Path, predictor: BrightPredictor, *, logits: bool = False) -> list[Prediction]:
    """Two boxes on one image and one on another."""
    rng = np.random.default_rng(0)
    checkpoint = KeptAnswers(path, RUN)
    resumed = ResumedPredictor(SharedPredictor(predictor), checkpoint, logits=logits)
    answers = []
    for boxes in ([[1, 2, 9, 8], [0, 0, 5, 5]], [[3, 3, 10, 10]]):
        resumed.set_image(np.repeat(rng.integers(0, 256, (12, 15, 1), np.uint8), 3, 2))
        answers.append(resumed.predict_boxes(np.array(boxes, np.float32)))
    checkpoint.close()
    return answers


@pytest.mark.parametrize("logits", [False, True])
def test_what_was_answered_is_not_asked_again(tmp_path: Path, *, logits: bool) -> None:
    path = tmp_path / "out" / "run.db"
    first = ask(path, BrightPredictor(), logits=logits)
    again = BrightPredictor()
    for old, new in zip(first, ask(path, again, logits=logits), strict=True):
        np.testing.assert_array_equal(new.masks, old.masks)
        np.testing.assert_array_equal(new.ious, old.ious)
        assert (new.logits is not None) == logits
        if old.logits is not None and new.logits is not None:
            np.testing.assert_array_equal(new.logits, old.logits)
    assert again.encoded == 0


def test_another_prompt_on_the_slice_is_asked(tmp_path: Path) -> None:
    checkpoint, predictor = KeptAnswers(tmp_path / "run.db", RUN), BrightPredictor()
    resumed = ResumedPredictor(SharedPredictor(predictor), checkpoint)
    resumed.set_image(np.full((12, 15, 3), 200, np.uint8))
    small = resumed.predict_boxes(np.array([[1, 1, 3, 3]], np.float32))
    large = resumed.predict_boxes(np.array([[1, 1, 9, 9]], np.float32))
    assert (small.masks.sum(), large.masks.sum()) == (4, 64)


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    ask(path, BrightPredictor())
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"run\.db keeps slices of a run with another model: "):
        KeptAnswers(path, {**RUN, "model": "dark"})
    assert path.read_bytes() == before


def test_a_changed_answer_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    first = ask(path, BrightPredictor())
    with sqlite3.connect(path) as base:
        base.execute("UPDATE answer SET ious = ? WHERE length(ious) = 4", (b"\0\0\0\0",))
    again = BrightPredictor()
    assert ask(path, again)[1].ious == first[1].ious
    assert again.encoded == 1


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(InputError, match=r"run\.db, which keeps .* file is not a database"):
        KeptAnswers(path, RUN)


def test_nothing_answered_leaves_no_file(tmp_path: Path) -> None:
    KeptAnswers(tmp_path / "run.db", RUN).close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_beside_it_goes_too(tmp_path: Path) -> None:
    """SQLite would roll a journal back into whatever file has its name next."""
    path = tmp_path / "run.db"
    ask(path, BrightPredictor())
    (tmp_path / "run.db-journal").write_bytes(b"left")
    remove_answers(path)
    assert not list(tmp_path.iterdir())
