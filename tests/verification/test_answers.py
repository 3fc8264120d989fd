"""PyTorch's masks that an export keeps: the gate's questions, without PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dbsam_deploy.artefact import ANSWERS_NAME, Artefact, load_artefact, write_artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.export import ExportOptions, Published
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.answers import read_answers
from dbsam_deploy.verification.parity import ask, dice, prompt_agreement
from dbsam_deploy.verification.references import AskedOnce


def test_an_export_keeps_what_pytorch_answered(
    published_export: tuple[ExportOptions, Published],
) -> None:
    """The figures of the gate come out again of what is kept."""
    artefact, figures = published_export[1].artefact, published_export[1].figures
    answers = read_answers(load_artefact(artefact.folder))
    session = AskedOnce(OnnxRuntimeSession(artefact, as_typed=True))
    boxes, prompts = [], []
    for case, want in answers:
        got = ask(session, artefact.preprocessing, case, want)
        boxes += map(dice, got.boxes.masks, want.boxes.masks)
        prompts += prompt_agreement(got, want)
    assert (len(answers), len(boxes)) == (figures.images, figures.objects)
    assert np.mean(boxes) == pytest.approx(figures.mask_agreement_mean, abs=1e-12)
    # The earlier masks among the prompts are kept in half precision.
    assert np.mean(prompts) == pytest.approx(figures.prompt_agreement_mean, abs=1e-4)


def test_masks_of_other_images_are_none(answered: Artefact) -> None:
    found = load_artefact(answered.folder)
    assert read_answers(found)
    more = dataclasses.replace(found, figures={"images": 4})
    with pytest.raises(InputError, match="masks of other images"):
        read_answers(more)
    with pytest.raises(InputError, match="keeps no masks of PyTorch: its gate had images of your"):
        read_answers(dataclasses.replace(found, answers=None))


def test_changed_masks_are_refused(answered: Artefact) -> None:
    path = answered.folder / ANSWERS_NAME
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(InputError, match=r"gate\.npz was changed after manifest\.json"):
        read_answers(answered)
    path.unlink()
    with pytest.raises(InputError, match=r"gate\.npz"):
        load_artefact(answered.folder)


def test_a_file_that_no_manifest_names_is_refused(make_artefact, tmp_path) -> None:
    artefact = make_artefact(tmp_path / "a")
    (artefact.folder / ANSWERS_NAME).write_bytes(b"")
    with pytest.raises(InputError, match=r"does not list 'gate\.npz'"):
        load_artefact(artefact.folder)
    write_artefact(artefact)
