"""Each family's own code against ours: small models with the same weights, answers that it gave.

The files of tests/model/families/ were written by the families' own code
(tests/support/family_references.py, which also compares the real shapes).
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import efficient_vit_reference
from support.family_references import ORIGINAL, answers, picture
from support.fixed_numbers import fixed_weights

from dbsam_deploy.catalogue import CATALOGUE
from dbsam_deploy.core.imaging import preprocess, upscale_logits
from dbsam_deploy.core.scaling import PIXEL_MEAN, PIXEL_STD
from dbsam_deploy.graphs.encoder_decoder import build_graph
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.config import TinyVitConfig
from dbsam_deploy.model.inspection import inspect_weights
from dbsam_deploy.model.weights import load_model

FOLDER = Path(__file__).parent / "families"
SMALL = {
    "mobile_sam": {
        "image_size": 128,
        "tiny_vit": TinyVitConfig(
            embed_dims=(8, 16, 32, 320), depths=(1,) * 4, num_heads=(0, 2, 2, 4), patch_stride=2
        ),
    },
    "sam_med2d": {"image_size": 64, "embed_dim": 32, "depth": 8, "num_heads": 2},
    **efficient_vit_reference.CONFIGS,
}
LEFT_OUT = {"mobile_sam": ["image_encoder.head", "image_encoder.norm_head"]}
CLOSE = 1e-5
"""Of the largest value: rounding of float32, in another order."""


@pytest.fixture(params=SMALL)
def family(request, monkeypatch, tmp_path):
    """Name of the variant, the family's answers, and a file of its own weights."""
    name = request.param
    found = dict(np.load(FOLDER / f"{name}.npz"))
    shapes = json.loads(str(found.pop("keys")))
    state = {key: torch.from_numpy(array) for key, array in fixed_weights(shapes).items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "weights.pth")
    monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], **SMALL[name]))
    return name, found, tmp_path / "weights.pth"


def check(found, expected) -> None:
    error = np.abs(np.asarray(found) - expected).max()
    assert error <= CLOSE * np.abs(expected).max()


def test_a_familys_file_gives_the_familys_answers(family):
    name, expected, path = family
    loaded = load_model(checkpoint=path)
    assert loaded.model.config.name == name
    ignored = "; ".join(loaded.notes)
    assert all(part in ignored for part in LEFT_OUT.get(name, ()))
    frame = loaded.preprocessing
    with torch.inference_mode():
        found = answers(loaded.model, loaded.model.encode, frame.image_size, frame.frame_side)
    for key, tensor in found.items():
        check(tensor, expected[key])
    low = expected["boxes_masks"]
    for i, wanted in enumerate(expected["whole"]):
        check(upscale_logits(low[i, 0], ORIGINAL, loaded.preprocessing), wanted[0])


def test_inspect_says_what_a_familys_file_is(family):
    name, _, path = family
    facts = inspect_weights(path)
    assert (facts["variant"], facts["family"]) == (name, CATALOGUE[name].family)
    assert facts["adapters"] == (["SAM-Med2D's"] if name == "sam_med2d" else [])
    assert facts["refused"] == ""
    assert all(part in " ".join(facts["ignored"]) for part in LEFT_OUT.get(name, ()))


def test_the_graphs_give_the_familys_answers(family):
    _, expected, path = family
    model = load_model(checkpoint=path).model

    def encode(image):
        return build_graph(model, "encoder")(image)

    frame = model.config.frame
    with torch.inference_mode():
        found = answers(model, encode, frame.image_size, frame.frame_side)
    check(found["embedding"], expected["embedding"])


def test_pixels_are_taken_as_opencv_takes_the_nearest():
    expected = np.load(FOLDER / "sam_med2d.npz")["resized"]
    frame = replace(VARIANTS["sam_med2d"], image_size=64).frame
    found = preprocess(picture(), frame)[0].transpose(1, 2, 0) * PIXEL_STD + PIXEL_MEAN
    np.testing.assert_array_equal(np.rint(found), expected)
