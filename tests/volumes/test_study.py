"""Prompts on a volume → named objects, whatever the prompts came as."""

import numpy as np
import pytest
from support.bright import BrightPredictor

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.study import segment_study
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts


@pytest.fixture
def two_bars() -> Volume:
    """12 slices of 40×50 with a bar in slices 3–8 and another in 2–5, noise elsewhere."""
    pixels = np.random.default_rng(0).integers(0, 60, (12, 40, 50), dtype=np.uint8)
    pixels[3:9, 10:20, 5:25] = 200
    pixels[2:6, 25:35, 30:45] = 220
    return as_volume(pixels)


def test_each_object_keeps_its_name_and_label(two_bars: Volume) -> None:
    a = ObjectPrompts("liver", box_3d=(3, 8, 3, 28, 22, 9), colour=(1, 2, 3))
    b = ObjectPrompts("kidney", (SlicePrompt((28, 23, 47, 37), index=4),))
    spec = StudyPrompts((a, b), propagate=False)
    found = segment_study(BrightPredictor(), two_bars, spec, model="bright")
    assert [(o.label, o.name, o.colour) for o in found.objects] == [
        (1, "liver", (1, 2, 3)),
        (2, "kidney", None),
    ]
    expected = np.zeros(two_bars.shape, np.uint8)
    expected[3:9, 10:20, 5:25] = 1
    expected[4, 25:35, 30:45] = 2
    np.testing.assert_array_equal(found.labels, expected)
    assert np.isfinite(found.confidence).nonzero()[1].tolist() == [*range(3, 9), 4]


def test_a_prompt_outside_is_refused_with_its_object(two_bars: Volume) -> None:
    spec = StudyPrompts((ObjectPrompts("spleen", (SlicePrompt((1, 2, 30, 30), index=12),)),))
    with pytest.raises(InputError, match=r"^spleen: slice 12: .* has slices 0–11$"):
        segment_study(BrightPredictor(), two_bars, spec, model="bright")
