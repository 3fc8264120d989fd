"""Keywords of `Model.predict`: SAM's names mean ours, and a misspelt one is not ignored."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.api.loading import load
from dbsam_deploy.api.model import Model
from dbsam_deploy.artefact import Artefact

IMAGE = np.tile(np.arange(96, dtype=np.uint8), (80, 1))


@pytest.fixture(scope="module")
def model(tiny_artefact: Artefact) -> Model:
    return load(Path(tiny_artefact.folder))


@pytest.mark.parametrize("name", ["point", "boxs", "multimask_ouput"])
def test_a_misspelt_keyword_is_refused(model: Model, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model.predict(IMAGE, boxes=[[5, 5, 60, 60]], **{name: [[1, 2]]})


def test_sam_names_mean_ours(model: Model) -> None:
    ours = model.predict(IMAGE, points=[[40, 30]], labels=[1], multimask=True)
    names = {"point_coords": [[40, 30]], "point_labels": [1], "multimask_output": True}
    theirs = model.predict(IMAGE, **names)
    np.testing.assert_array_equal(ours.masks, theirs.masks)
    assert theirs.masks.shape == (1, 3, 80, 96)
