"""One study: made once, found by content, its faults its own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from support.faulty_studies import BOX, RAISE, orders, study

from dbsam_deploy.api.model import Model
from dbsam_deploy.cohort.records import PICTURE_NAME, RECORD_NAME, content_hash, find_record
from dbsam_deploy.cohort.work import do_study, log_of, tidy_up
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts


@pytest.fixture
def given(tiny_artefact, tmp_path):
    return orders(tiny_artefact.folder, tmp_path)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_a_folder_with_a_record_of_all_that_it_was_made_from(given, tmp_path):
    outcome = do_study(study(tmp_path, "one"), given)
    assert (outcome.is_new, outcome.failure) == (True, "")
    place = given.output / "one"
    assert names(given.output) == ["one"]  # no lock, no log, nothing half
    assert names(place) == ["one_mask.npz", "one_mask.png", PICTURE_NAME, RECORD_NAME]
    with np.load(place / "one_mask.npz") as saved:
        labels = saved["segs"]
    (found,) = outcome.record.objects
    assert found.name == "kidney"
    assert found.voxels == np.count_nonzero(labels == 1) > 0
    assert found.volume_ml is None  # a picture has no spacing
    assert 0 < len((place / PICTURE_NAME).read_bytes()) < 30_000
    assert find_record(place) == outcome.record


def test_a_worker_that_was_killed_before_it_had_the_lock_leaves_no_log(given, tmp_path):
    one, other = study(tmp_path, "one"), study(tmp_path, "other")
    given.output.mkdir(exist_ok=True)
    log_of(one, given).touch()
    for each in (one, other):
        tidy_up(each, given)
    assert names(given.output) == []


def test_what_is_there_is_found_by_content_alone(given, tmp_path):
    one = study(tmp_path, "one")
    first = do_study(one, given)
    moved = one.path.rename(tmp_path / "elsewhere.npz")
    again = do_study(dataclasses.replace(one, path=moved), given)
    assert (again.is_new, again.record) == (False, first.record)
    assert names(tmp_path / "marks") == ["begun_0"]
    assert len((tmp_path / "marks" / "begun_0").read_text().splitlines()) == 1


@pytest.mark.parametrize("part", ["input", "prompts", "options", "model"])
def test_a_part_that_changes_replaces_the_result(part, given, tmp_path):
    one = study(tmp_path, "one")
    first = do_study(one, given)
    if part == "input":
        one = study(tmp_path, "one", number=7)
    elif part == "prompts":
        box = SlicePrompt((4.0, 4.0, 30.0, 27.0), index=0)
        one = dataclasses.replace(one, prompts=StudyPrompts((ObjectPrompts("kidney", (box,)),)))
    elif part == "options":
        given = dataclasses.replace(given, formats=("npz",))
    else:
        given = dataclasses.replace(given, source="another")
    second = do_study(one, given)
    assert second.is_new
    changed = [
        k for k in first.record.made_of if first.record.made_of[k] != second.record.made_of[k]
    ]
    assert changed == [part]
    assert find_record(given.output / "one") == second.record
    assert names(given.output) == ["one"]
    assert not do_study(one, given).is_new


def test_prompts_in_a_file_count_by_their_content(given, tmp_path):
    path = tmp_path / "one.json"
    body = {"objects": [{"name": "kidney", "prompts": [{"box": [4, 4, 30, 28], "slice": 0}]}]}
    path.write_text(json.dumps(body))
    one = dataclasses.replace(study(tmp_path, "one"), prompts=path)
    first = do_study(one, given)
    assert first.failure == ""
    direct = do_study(dataclasses.replace(one, name="two", prompts=BOX), given)
    assert first.record.objects == direct.record.objects
    path.write_text(json.dumps(body).replace("kidney", "liver"))
    assert do_study(one, given).record.objects[0].name == "liver"


def test_a_result_that_lost_a_file_is_made_again(given, tmp_path):
    one = study(tmp_path, "one")
    first = do_study(one, given)
    (given.output / "one" / "one_mask.png").unlink()
    second = do_study(one, given)
    assert second.is_new
    assert second.record.files == first.record.files


@pytest.mark.parametrize("how", ["edited", "added", "record", "foreign"])
def test_what_somebody_changed_is_kept_and_said(how, given, tmp_path):
    one, place = study(tmp_path, "one"), given.output / "one"
    if how == "foreign":
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    else:
        do_study(one, given)
        one = study(tmp_path, "one", number=7)  # a new result is due
        target = {"edited": "one_mask.png", "added": "mine.txt", "record": RECORD_NAME}[how]
        with (place / target).open("ab") as file:
            file.write(b" ")
        if how == "record":
            text = (place / target).read_text()
            (place / target).write_text(text.replace("kidney", "spleen"))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    outcome = do_study(one, given)
    assert str(place) in outcome.failure
    assert "\n" not in outcome.failure
    assert not outcome.again
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_faults_of_a_study_are_told_and_leave_nothing(given, tmp_path):
    broken = study(tmp_path, "broken")
    broken.path.write_bytes(b"PK no archive")
    for one, words in [
        (dataclasses.replace(broken, path=tmp_path / "none.npz"), "none.npz: no such file"),
        (broken, "broken.npz"),
        (study(tmp_path, "bug", RAISE), "ZeroDivisionError: a bug"),
        (dataclasses.replace(study(tmp_path, "bare"), prompts=None), "no boxes of its own"),
    ]:
        outcome = do_study(one, given)
        assert words in outcome.failure
        assert (outcome.record, outcome.again) == (None, False)
    assert "set_image" in do_study(study(tmp_path, "bug", RAISE), given).details
    assert names(given.output) == []


def test_a_full_disk_is_worth_another_attempt_and_keeps_the_earlier_result(
    given, tmp_path, monkeypatch
):
    first = do_study(study(tmp_path, "one"), given)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dbsam_deploy.cohort.records.write", full)
        outcome = do_study(study(tmp_path, "one", number=7), given)
    assert "No space left" in outcome.failure
    assert outcome.again
    assert find_record(given.output / "one") == first.record
    assert names(given.output) == ["one"]


def test_an_input_that_changes_meanwhile_gives_no_result(given, tmp_path, monkeypatch):
    one = study(tmp_path, "one")
    real = Model.study

    def changing(*args, **more):
        study(tmp_path, "one", number=9)
        return real(*args, **more)

    monkeypatch.setattr(Model, "study", changing)
    assert "changed while it was read" in do_study(one, given).failure
    assert names(given.output) == []


def test_a_model_that_does_not_open_is_no_fault_of_a_study(given, tmp_path):
    def refuse():
        raise EngineError("no runtime")

    outcome = do_study(
        study(tmp_path, "one"), dataclasses.replace(given, open_model=refuse, source="refused")
    )
    assert isinstance(outcome.refusal, EngineError)


def test_a_folder_is_hashed_by_its_files_and_their_names(tmp_path):
    folder = tmp_path / "series"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1").write_bytes(b"x")
    first = content_hash(folder)
    (folder / "a" / "1").rename(folder / "a" / "2")
    second = content_hash(folder)
    (folder / "a" / "2").write_bytes(b"y")
    assert len({first, second, content_hash(folder)}) == 3
    with pytest.raises(InputError, match="no such file"):
        content_hash(tmp_path / "none")
