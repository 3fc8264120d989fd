"""How near a runtime's masks are to PyTorch's, in words."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.agreement import agreement
from dbsam_deploy.verification.answers import read_answers

LOST = r"Dice drop -?0\.0000 \(wanted -1\.0\)"


@pytest.mark.parametrize(
    ("floor", "said"), [(-1.0, f"^{LOST}$"), (1.5, rf"^boxes .* \(wanted .*\), {LOST}$")]
)
def test_what_is_lost_of_the_truth_is_said_alone_or_after_the_rest(
    answered: Artefact, floor: float, said: str
) -> None:
    gate = dataclasses.replace(
        load_recipe("fp32").gate, mask_agreement_mean=floor, mask_agreement_p5=-1.0, dice_drop=-1.0
    )
    found = agreement(OnnxRuntimeSession(answered), answered, read_answers(answered), gate)
    assert re.search(said, found.missed["decoder"])
