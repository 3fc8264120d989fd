"""Every change of a session says where it was, and can be taken back."""

from __future__ import annotations

import numpy as np
import pytest
from support.wedge import AXES, SHAPE, bright, tight, wedge

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.volumes.session import VolumePredictor


def test_the_history_is_bounded():
    session = bright(undo_bytes=400)
    for index in (3, 4, 5, 6, 7):
        session.set_mask(1, np.random.default_rng(index).random(SHAPE[1:]) < 0.5, index=index)
    session.undo()
    with pytest.raises(InputError, match="nothing to undo"):  # 250 bytes each
        session.undo()
    assert np.flatnonzero(session.mask(1).any((1, 2))).tolist() == [3, 4, 5, 6]


def test_every_change_tells_where_and_is_taken_back_exactly():
    rng = np.random.default_rng(3)
    truth = wedge()
    truth[2:12, 28:36, 4:12] = True
    session = bright(truth)
    names, states = [1, 2, 3], []
    for _ in range(40):
        before = {label: _mask(session, label) for label in names}
        kept = [_state(session, label) for label in names]
        change = _random_change(session, rng, truth)
        if change is None:
            continue
        states.append((before, kept))
        differs = np.any([before[n] != _mask(session, n) for n in names], axis=0)
        _check_extent(change.changed, differs)
    assert len(states) > 25
    for before, kept in reversed(states):
        after = {label: _mask(session, label) for label in names}
        change = session.undo()
        for label in names:
            np.testing.assert_array_equal(_mask(session, label), before[label])
        assert [_state(session, label) for label in names] == kept
        _check_extent(change.changed, np.any([after[n] != before[n] for n in names], axis=0))
    assert session.objects == ()
    with pytest.raises(InputError, match="nothing to undo"):
        session.undo()


def _random_change(session: VolumePredictor, rng: np.random.Generator, truth: np.ndarray):
    label = int(rng.integers(1, 4))
    plane = str(rng.choice(list(AXES)))
    index = int(rng.choice(np.flatnonzero(np.moveaxis(truth, AXES[plane], 0).any((1, 2)))))
    kind = rng.choice(["box", "carry", "draw", "clear", "all", "again"])
    try:
        if kind in ("box", "again"):
            box = tight(np.take(truth, index, AXES[plane]), int(rng.integers(0, 3)))
            return session.prompt(label, box=box, index=index, plane=plane)
        if kind == "carry":
            direction = str(rng.choice(["up", "down", "both"]))
            return session.propagate(label, plane=plane, direction=direction)
        if kind == "draw":
            drawn = rng.random(np.take(truth, index, AXES[plane]).shape) < 0.1
            return session.set_mask(label, drawn, index=index, plane=plane)
        if kind == "all":
            return session.set_mask(label, rng.random(truth.shape) < 0.01)
        return session.clear(label)
    except InputError:
        return None


def _mask(session: VolumePredictor, label: int) -> np.ndarray:
    known = label in [one.label for one in session.objects]
    return session.mask(label) if known else np.zeros(session.volume.shape, bool)


def _state(session: VolumePredictor, label: int):
    if label not in [one.label for one in session.objects]:
        return None
    return [np.nan_to_num(session.confidence(label, plane)).tolist() for plane in AXES]


def _check_extent(changed, differs: np.ndarray) -> None:
    if changed is None:
        assert not differs.any()
        return
    inside = np.zeros_like(differs)
    inside[tuple(slice(first, end) for first, end in changed)] = True
    assert not (differs & ~inside).any()
    for axis in range(3):  # and no larger than it must be
        places = np.flatnonzero(differs.any(tuple(a for a in range(3) if a != axis)))
        assert changed[axis] == (places[0], places[-1] + 1)
