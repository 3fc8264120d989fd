"""What an export says of its weights' points, by the figures of its gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.box_trained import HOW, BoxTrainedSession, blocks, picture

from dbsam_deploy.core.points import BOX_TRAINED, NATIVE, rules_of, usual_record
from dbsam_deploy.verification.cases import Case, deepest_point
from dbsam_deploy.verification.parity import compare
from dbsam_deploy.verification.points import measured_points

WEIGHTS = {"trained": True, "points": usual_record("db_sam", trained=True)}


def cases() -> list[Case]:
    found = []
    for number in range(2):
        objects = np.stack([blocks((4 + number, 6, 24, 26)), blocks((36, 36, 56, 50))])
        boxes = np.float32([[4 + number, 6, 24, 26], [36, 36, 56, 50]])
        found.append(Case(str(number), picture(objects.any(0)), boxes, objects))
    return found


@pytest.mark.parametrize("understands", [False, True])
def test_points_are_measured_with_the_gate(understands):
    session = BoxTrainedSession(understands_points=understands)
    figures = compare(session, session, HOW, cases())
    assert figures.dice == 1
    assert figures.point_dice == figures.points_obeyed == understands
    record = measured_points(figures, WEIGHTS)
    assert rules_of(record) == (NATIVE if understands else BOX_TRAINED)
    assert record["because"].startswith("measured by the export on 4 objects: from the decoder's")


def test_what_the_gate_cannot_tell_is_left_to_the_kind_of_the_weights():
    session = BoxTrainedSession(understands_points=True)
    figures = compare(session, session, HOW, cases())
    for poor in (replace(figures, objects=3), replace(figures, dice=0.29)):
        assert measured_points(poor, WEIGHTS) == WEIGHTS["points"]
    for poor in (replace(figures, points_obeyed=0.4), replace(figures, point_dice=0.4)):
        assert rules_of(measured_points(poor, WEIGHTS)) == BOX_TRAINED
    untrained = {"trained": False, "points": usual_record("db_sam", trained=False)}
    assert rules_of(measured_points(figures, untrained)) == NATIVE


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_the_deepest_point_is_the_middle(side):
    mask = np.zeros((20, 30), bool)
    mask[2 : 2 + side, 12 : 12 + 2 * side] = True
    x, y = deepest_point(mask)
    depth = min(y - 2, 2 + side - y, x - 12, 12 + 2 * side - x)
    assert depth >= side / 2 - 0.5
    assert mask[int(y), int(x)]


def test_the_deepest_point_of_a_ring_is_on_it():
    rows, columns = np.ogrid[:40, :40]
    away = np.hypot(rows - 20, columns - 20)
    ring = (away < 15) & (away > 7)
    x, y = deepest_point(ring)
    assert ring[int(y), int(x)]
    assert 9 < np.hypot(y - 20.5, x - 20.5) < 13
