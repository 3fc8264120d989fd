"""`Model.volume`: sessions on volumes that share a model with each other and with `predict`."""

import threading

import numpy as np
import pytest

import dbsam_deploy as db
from dbsam_deploy.api.model import Model
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.prediction.predictor import Encoding, Predictor, ServedPredictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, StudyPrompts

BOX = [8, 6, 40, 30]


@pytest.fixture
def scan(tmp_path):
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (6, 7, 9), np.uint8)
    values = coarse.repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "ct.npz", imgs=values, spacing=(3, 1, 1))
    return tmp_path / "ct.npz"


@pytest.fixture
def model(tiny_artefact) -> db.Model:
    return db.load(tiny_artefact.folder)


def test_a_session_of_a_model_and_its_predict_agree(model, scan):
    with model.volume(scan) as session:
        change = session.prompt(1, box=BOX, index=3)
        alone = model.predict(scan, boxes=[BOX], slice_index=3)  # float32 embeddings
        found = session.segmentation()
    differing = np.count_nonzero(found.labels[3] != alone.labels[3])
    assert differing <= 0.01 * alone.pixels[0, 0]
    assert change.iou == pytest.approx(float(alone.ious[0, 0]), abs=2e-3)
    assert (found.model, found.note) == (model.name, "test graphs")


def test_sessions_share_embeddings_which_close_with_the_model(model, scan):
    one, two = model.volume(scan), model.volume(db.read_image(scan))
    one.prompt(1, box=BOX, index=2)
    assert one.shared is two.shared
    one.close()  # others may go on
    kept = two.shared.store.used
    assert kept[0] > 0
    two.prompt(1, box=BOX, index=2)
    np.testing.assert_array_equal(two.mask(1), one.mask(1))
    model.close()
    assert two.shared.store.used == (0, 0)
    np.testing.assert_array_equal(two.segmentation().labels, one.segmentation().labels)


def test_predict_between_the_prompts_of_a_session_changes_nothing(model, scan):
    with model.volume(scan, encode_ahead=False) as session:
        model.set_image(np.random.default_rng(1).integers(0, 256, (50, 66, 3), np.uint8))
        session.prompt(1, box=BOX, index=2)
        first = model.predict(boxes=[BOX])
        session.prompt(2, box=BOX, index=2)
        np.testing.assert_array_equal(session.mask(1), session.mask(2))
        np.testing.assert_array_equal(model.predict(boxes=[BOX]).logits, first.logits)


def test_others_are_answered_while_a_study_is_segmented(model, scan):
    volume = db.read_image(scan)
    spec = StudyPrompts((ObjectPrompts("a", box_3d=(*BOX[:2], 0, *BOX[2:], 6)),))
    expected, alone = model.study(volume, spec), model.predict(scan, boxes=[BOX], slice_index=1)
    answers, done = [], []
    thread = threading.Thread(
        target=lambda: answers.append(model.predict(scan, boxes=[BOX], slice_index=1)), daemon=True
    )

    def progress(slices: int, _: int) -> None:
        if slices == 1:
            thread.start()
            thread.join(timeout=60)
            done.append(not thread.is_alive())

    found = model.study(volume, spec, progress=progress)
    assert done == [True]
    np.testing.assert_array_equal(answers[0].masks, alone.masks)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_another_device_is_another_model(model, scan, tiny_artefact, monkeypatch):
    session = model.volume(scan, encode_ahead=False)
    session.prompt(1, box=BOX, index=2)
    earlier, asked = session.shared, list[str]()
    assert earlier.store.used[0] > 0
    other = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)

    def reopened(device: str) -> Model:
        asked.append(device)
        return Model(other, name="tiny", backend=f"onnxruntime-{device}")

    with pytest.raises(InputError, match="device tpu"):
        model.to("tpu")
    monkeypatch.setattr(model, "_reopen", reopened)
    assert model.to("cpu") is model  # where it is
    assert model.volume(scan).shared is earlier
    assert asked == []
    assert model.to("cuda:0") is model
    assert (asked, model.device, model.predictor) == (["cuda"], "cuda", other)
    with model.volume(scan, encode_ahead=False) as new:
        assert new.shared is not earlier
        assert new.shared.predictor is other
    assert earlier.store.used == (0, 0)  # its embeddings are of a model that is gone


def test_what_is_encoded_here_and_what_a_server_encodes():
    assert issubclass(Predictor, Encoding)
    assert not issubclass(ServedPredictor, Encoding)


def test_options_of_the_file(model, scan):
    with pytest.raises(InputError, match="is no DICOM"):
        model.volume(scan, series=3)
    with model.volume(scan, window=(100, 50)) as session:
        assert session.volume.pixels.max() == 255
        assert session.volume.pixels.min() == 0
