"""A model that is put away is gone, and comes back as it was."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.held import HeldModel
from dbsam_deploy.model.weights import LoadedModel


class File:
    """A checkpoint that is read each time."""

    def __init__(self) -> None:
        self.value = 1.0
        self.loads = 0

    def load(self) -> LoadedModel:
        self.loads += 1
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, self.value)
        model.config = VARIANTS["db_sam_tiny"]
        about = {"sha256": str(self.value), "source": "m.pth"}
        return LoadedModel(model, Preprocessing(64), about)


def test_what_is_put_away_is_gone_and_comes_back():
    file = File()
    held = HeldModel(file.load)
    first = weakref.ref(held.model)
    assert held.model is first()
    held.put_away()
    assert first() is None
    assert (held.config, held.preprocessing) == (VARIANTS["db_sam_tiny"], Preprocessing(64))
    assert file.loads == 1
    torch.testing.assert_close(held.model.weight, torch.ones(2, 2))
    assert file.loads == 2


def test_other_weights_are_refused():
    file = File()
    held = HeldModel(file.load)
    held.put_away()
    file.value = 2.0
    with pytest.raises(CheckpointError, match=r"m\.pth has other weights.*run it again"):
        _ = held.model
