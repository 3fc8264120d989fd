"""Points of weights that know boxes, through everything a program calls."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_artefact import copy_with_points

import dbsam_deploy as db
from dbsam_deploy import predict as predict_door
from dbsam_deploy.cli import run
from dbsam_deploy.core.points import BOX_TRAINED, NATIVE
from dbsam_deploy.core.prompt_adapter import MAX_SEARCHES
from dbsam_deploy.images.volumes import png_bytes
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

SEED = 5
"""Of an image on which a box around the click gives a mask that holds it."""
POINT = {"point_coords": np.array([[[20.0, 18]]]), "point_labels": np.array([[1]])}


@pytest.fixture
def image() -> np.ndarray:
    coarse = np.random.default_rng(SEED).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:50, :66].copy()


@pytest.fixture
def searched(tiny_artefact, tmp_path):
    """An export whose weights know boxes."""
    return copy_with_points(tiny_artefact, tmp_path / "searched", BOX_TRAINED)


@pytest.fixture
def answers(searched, image):
    """What boxes that are tried give for `POINT`, and what the decoder does."""
    predictor = Predictor(OnnxRuntimeSession(searched), searched.preprocessing, points=BOX_TRAINED)
    predictor.set_image(image)
    tried, raw = (predictor.predict_prompts(**POINT, adapt_points=adapt) for adapt in (True, False))
    assert not np.array_equal(tried.masks, raw.masks)
    assert tried.masks[0, 0, 18, 20] == 1
    return tried, raw


def test_a_point_works_whatever_it_is_asked_through(searched, image, answers):
    tried, raw = answers
    with db.load(searched.folder) as model:
        assert model.points == BOX_TRAINED
        for adapt, expected in ((True, tried), (False, raw)):
            result = model.predict(image, points=[[20, 18]], adapt_points=adapt)
            np.testing.assert_array_equal(result.masks, expected.masks)
            np.testing.assert_array_equal(result.logits, expected.logits)
            sam = db.SamPredictor(model, adapt_points=adapt)
            sam.set_image(image)
            click = np.array([[20, 18]]), np.array([1])
            masks, ious, _ = sam.predict(*click, multimask_output=False)
            np.testing.assert_array_equal(masks, expected.masks[0] != 0)
            np.testing.assert_array_equal(ious, expected.ious[0])
        label_map = model.segment(image, points=[[20, 18]]).labels[0]
        np.testing.assert_array_equal(label_map, tried.masks[0, 0])
        session = model.volume(image)
        session.prompt(points=[[20, 18]], index=0)
        found = session.mask(1)[0]  # from an embedding that was rounded
        assert (found != tried.masks[0, 0]).mean() < 0.01


def test_many_points_are_many_objects(searched, image):
    places = np.stack(np.meshgrid(np.arange(5, 60, 8.0), [8.5, 19.5, 30.5]), -1).reshape(-1, 1, 2)
    assert len(places) == MAX_SEARCHES
    places = np.concatenate([places, places + 3])
    with db.load(searched.folder) as model:
        together = model.predict(image, points=places)
        for number in (0, MAX_SEARCHES, len(places) - 1):
            alone = model.predict(image, points=places[number])
            np.testing.assert_array_equal(together.masks[number], alone.masks[0])


def test_an_export_that_does_not_say_it_is_told_where_it_matters(tiny_artefact, tmp_path, image):
    old = copy_with_points(tiny_artefact, tmp_path / "old", None)
    with db.load(old.folder) as model:
        assert model.points == NATIVE
        result = model.predict(image, points=[[20, 18]])
        assert "test graphs; this export does not say how its weights take points" in result.note
        assert f"dbsam_deploy.prompts_check {old.folder} --data DIR" in result.note
        assert model.predict(image, boxes=[[5, 6, 40, 30]]).note == "test graphs"
        assert model.predict(image, points=[[9, 9]], adapt_points=False).note == "test graphs"
    new = copy_with_points(tiny_artefact, tmp_path / "new", NATIVE)
    with db.load(new.folder) as model:
        assert model.predict(image, points=[[20, 18]]).note == "test graphs"


def test_the_command_says_how_it_takes_points(searched, image, answers, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png_bytes(image))
    words = [tmp_path / "a.png", "--artefact", searched.folder, "--output", tmp_path / "out"]
    for more, expected in (((), answers[0]), (("--raw-points",), answers[1])):
        assert run(predict_door.main, [*map(str, words), "--point", "20", "18", "1", *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("points: boxes are tried for a point without a box" in said) == (not more)
        with np.load(tmp_path / "out" / "a_mask.npz") as saved:
            np.testing.assert_array_equal(saved[saved.files[0]].squeeze(), expected.masks[0, 0])
    box = ("--box", "5", "6", "40", "30", "--raw-points")
    assert run(predict_door.main, [*map(str, words), *box]) == 2
    assert "--raw-points goes with --point on one slice" in capsys.readouterr().err
