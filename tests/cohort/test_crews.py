"""Workers that die or hang: told apart, tried again, and nobody else's work is lost."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import pytest
from support.faulty_studies import HANG, KILL, KILL_ONCE, orders, study

from dbsam_deploy.cohort.crews import LocalCrew
from dbsam_deploy.cohort.records import find_record
from dbsam_deploy.cohort.run import run_batch
from dbsam_deploy.core.errors import InputError


def outcomes(studies, given, crew, **more):
    """Name → outcome and attempts; each study is told of once."""
    ended = []
    run_batch(studies, given, crew, lambda *one: ended.append(one), **more)
    assert Counter(one.study.name for one, _ in ended) == Counter(one.name for one in studies)
    return {outcome.study.name: (outcome, attempts) for outcome, attempts in ended}


def test_who_dies_or_hangs_takes_nobody_along(tiny_artefact, tmp_path):
    given = orders(tiny_artefact.folder, tmp_path, timeout_s=2)
    studies = [
        study(tmp_path, "kill", KILL, 1),
        study(tmp_path, "hang", HANG, 2),
        study(tmp_path, "once", KILL_ONCE, 3),
        *(study(tmp_path, f"good{number}", number=number) for number in range(4, 8)),
    ]
    found = outcomes(studies, given, LocalCrew(2, 1), retries=1)
    kill, hang, once = (found[name] for name in ("kill", "hang", "once"))
    assert kill[1] == hang[1] == once[1] == 2
    assert "SIGKILL" in kill[0].failure
    assert "not done within 2 s" in hang[0].failure
    assert "faulty_studies.py" in hang[0].details  # where it hung
    assert once[0].record == find_record(given.output / "once")
    assert all(found[f"good{number}"][1] == 1 for number in range(4, 8))
    done = sorted(path.name for path in given.output.iterdir())
    assert done == ["good4", "good5", "good6", "good7", "once"]
    for number in range(3, 8):  # each was segmented once
        assert len((tmp_path / "marks" / f"begun_{number}").read_text().splitlines()) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_does_not_open_ends_the_batch(workers, tmp_path):
    given = orders(tmp_path / "no_export", tmp_path)
    with pytest.raises(InputError, match="no_export"):
        outcomes([study(tmp_path, "one"), study(tmp_path, "two")], given, LocalCrew(workers))


def test_a_bug_outside_of_a_study_is_raised_as_it_is(tmp_path):
    buggy = functools.partial(int, "no model")
    given = dataclasses.replace(orders(tmp_path, tmp_path), open_model=buggy)
    with pytest.raises(ValueError, match="'no model'"):
        outcomes([study(tmp_path, "one")], given, LocalCrew(1))
