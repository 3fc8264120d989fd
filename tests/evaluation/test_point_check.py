"""Points measured on labelled images: what is found, what is decided, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from support.box_trained import HOW, BoxTrainedSession, blocks, picture

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.points import NATIVE, PointRules, rules_of
from dbsam_deploy.datasets.finding import find_cases
from dbsam_deploy.evaluation.point_check import Answers, KindFigures, PointFigures, check_points
from dbsam_deploy.prediction.predictor import Predictor


@pytest.fixture
def files(tmp_path):
    """Six images of two objects each; a dark one has no object that is large enough."""
    for number in range(6):
        objects = [blocks((4 + number, 6, 24, 26)), blocks((36, 36, 56, 50 + number))]
        labels = objects[0] + 2 * objects[1].astype(np.uint8)
        np.savez(tmp_path / f"{number}.npz", imgs=picture(objects[0] | objects[1]), gts=labels)
    np.savez(tmp_path / "x.npz", imgs=picture(blocks((1, 1, 3, 3))), gts=blocks((1, 1, 3, 3)) * 1)
    return find_cases(tmp_path)


def test_weights_that_know_boxes_alone_are_found_out(files):
    figures = check_points(Predictor(BoxTrainedSession(), HOW), files, most_objects=99)
    assert figures.images == 6
    assert figures.tight == 1
    first, past = figures.kinds["first"], figures.kinds["past_box"]
    assert (first.objects, first.native, first.without) == (12, Answers(0, 0), None)
    assert first.search.obeyed == 1
    assert first.search.dice > 0.8
    assert past.native.obeyed == 0
    assert past.native.dice == past.without < 0.85
    assert past.search == Answers(1, 1)
    assert "in_box" not in figures.kinds  # no mask of these weights has too much
    record = figures.record(NATIVE)
    assert rules_of(record) == PointRules("search", "search", "native")
    assert record["because"] == "measured on 12 objects of 6 images"
    assert record["measured"]["first"]["native"] == {"dice": 0, "obeyed": 0}


def test_weights_that_know_points_are_left_to_their_decoder(files):
    session = BoxTrainedSession(understands_points=True)
    figures = check_points(Predictor(session, HOW), files, most_objects=99)
    assert figures.kinds["first"].native == Answers(1, 1)
    assert rules_of(figures.record(PointRules("search", "search", "search"))) == PointRules(
        in_box="search"
    )


def test_objects_are_taken_evenly_and_no_more_than_asked(files):
    seen = []
    figures = check_points(
        Predictor(BoxTrainedSession(), HOW),
        files,
        most_objects=3,
        progress=lambda done, name: seen.append(name),
    )
    assert seen == ["0.npz", "2.npz", "4.npz"]
    assert figures.kinds["first"].objects == 3
    with pytest.raises(InputError, match="3 images with 3 objects decide nothing"):
        figures.record(NATIVE)


def test_what_has_too_few_objects_stays_as_it_was():
    many, few = (KindFigures(count, Answers(0.5, 0), Answers(0.9, 1), None) for count in (8, 7))
    rules = PointRules("native", "native", "search")
    found = PointFigures(4, {"first": many, "past_box": few}, 0.9)
    assert rules_of(found.record(rules)) == PointRules("search", "native", "search")
    with pytest.raises(InputError, match="3 images with 8 objects"):
        PointFigures(3, found.kinds, 0.9).record(rules)
    with pytest.raises(InputError, match="expected at least 4 with 8"):
        PointFigures(4, {"past_box": many}, 0.9).record(rules)


@pytest.mark.parametrize(("gain", "needs"), [(0.019, False), (0.021, True), (-0.3, False)])
def test_a_search_has_to_be_worth_its_time(gain, needs):
    figures = KindFigures(9, Answers(0.7, 1), Answers(0.7 + gain, 1), None)
    assert figures.needs_search is needs
