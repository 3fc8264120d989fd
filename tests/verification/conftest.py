"""A small export that keeps answers, as one that passed its gate does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dbsam_deploy.artefact import Artefact, load_artefact, write_artefact
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.answers import AnswersFile
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.parity import ask

IMAGES = 2


@pytest.fixture
def answered(make_artefact, tmp_path: Path) -> Artefact:
    """A tiny export that keeps its own answers for those of PyTorch; a test may change it."""
    artefact = make_artefact(tmp_path / "answered")
    parity = dataclasses.replace(load_recipe(artefact.precision).parity, images=IMAGES)
    session, kept = OnnxRuntimeSession(artefact), AnswersFile()
    for case in load_cases(bundled_examples(), parity):
        kept.add(case, ask(session, artefact.preprocessing, case))
    file = kept.write(artefact.folder)
    figures = {**artefact.figures, "images": IMAGES}
    write_artefact(dataclasses.replace(artefact, answers=file, figures=figures))
    return load_artefact(artefact.folder)
