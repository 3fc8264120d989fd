"""Names and shapes of a variant, found without the numbers that a model begins with."""

import subprocess
import sys

import pytest
import torch

from dbsam_deploy.model import VARIANTS, build_model
from dbsam_deploy.model.shapes import shapes_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_are_those_of_the_model(variant):
    with torch.device("meta"):
        wanted = build_model(variant, image_size=128).state_dict()
    found = shapes_of(variant, image_size=128)
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
        k: (t.shape, t.dtype) for k, t in wanted.items()
    }
    assert all(tensor.is_meta for tensor in found.values())


def test_torchs_compiler_is_not_loaded_for_them():
    """It takes two seconds of the five that `inspect` may."""
    code = (
        "import sys; from dbsam_deploy.model.shapes import shapes_of; shapes_of('sam_vit_h'); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
