"""What a repository knows of its models' answers, and how near they have to come."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
from support.onnx_chain import SHAPE, chain
from support.peak_memory import forget_peak, peak_bytes

from dbsam_deploy.core.contract import IOU_SCORES, MASKS
from dbsam_deploy.core.errors import ServingError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving import known_answer
from dbsam_deploy.serving.known_answer import compare, known_answers
from dbsam_deploy.serving.probe import BOXES_MODEL, PROMPTS_MODEL, probe_image, question
from dbsam_deploy.serving.repository import load_repository
from dbsam_deploy.sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession


@pytest.fixture(scope="module")
def answers(tiny_artefact):
    """What `predict` makes of the question, with other noise: model → its answer."""
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    image = probe_image(b"\x10\x70\x40")
    predictor.set_image(image)
    boxes = question(BOXES_MODEL, image, 0)["boxes"]
    single = predictor.predict_boxes(boxes)
    tokens = [predictor.predict_prompts(boxes=boxes, multimask=more) for more in (False, True)]
    masks = np.concatenate([answer.masks for answer in tokens], axis=1)
    ious = np.concatenate([answer.ious for answer in tokens], axis=1)
    return {
        BOXES_MODEL: {MASKS.name: single.masks[:, 0], IOU_SCORES.name: single.ious[:, 0]},
        PROMPTS_MODEL: {MASKS.name: masks, IOU_SCORES.name: ious},
    }


@pytest.mark.parametrize("model", [BOXES_MODEL, PROMPTS_MODEL])
def test_a_repository_knows_what_predict_answers(tiny_repository, answers, model):
    known = load_repository(tiny_repository.folder).known_answers
    assert set(known) == {BOXES_MODEL, PROMPTS_MODEL}
    compare(model, answers[model], known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MASKS.name: lambda masks: 1 - masks}, r"% of the pixels are others"),
        ({MASKS.name: lambda masks: np.roll(masks, 12, axis=-1)}, r"% of the pixels are others"),
        ({IOU_SCORES.name: lambda scores: scores + 0.2}, r"score is off by 0\.2"),
    ],
)
def test_another_answer_is_refused(tiny_repository, answers, change, message):
    good = answers[BOXES_MODEL]
    bad = {name: change.get(name, lambda array: array)(array) for name, array in good.items()}
    with pytest.raises(ServingError, match=message):
        compare(BOXES_MODEL, bad, tiny_repository.known_answers)


def test_graphs_that_onnxruntime_cannot_run_leave_a_note(tiny_artefact, tmp_path, monkeypatch):
    notes: list[str] = []
    for file in tiny_artefact.folder.iterdir():
        (tmp_path / file.name).write_bytes(b"no graph")
    assert known_answers(dataclasses.replace(tiny_artefact, folder=tmp_path), notes.append) == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert known_answers(tiny_artefact, notes.append) == {}
    assert len(notes) == 2
    assert "onnxruntime is not installed" in notes[1]
    assert all("no known answer for `serve --check`" in note for note in notes)


def test_it_runs_in_the_memory_of_sessions_before(tmp_path):
    path, values = tmp_path / "chain.onnx", np.zeros(SHAPE, np.float32)
    path.write_bytes(chain())
    open_session(import_onnxruntime(), chain(), CPU, threads=1).run(None, {"x": values})
    before = forget_peak()
    known_answer._OnnxGraphs({"decoder": str(path)}, Preprocessing(64))._run(
        "decoder", {"x": values}
    )
    assert peak_bytes() - before < values.nbytes // 2
