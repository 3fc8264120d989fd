"""EfficientViT-SAM: its norms, its two frames, and what its own predictor answers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.efficient_vit_reference import CONFIGS, norm_eps, predicted
from support.family_references import picture
from support.fixed_numbers import fixed_weights
from torch import nn

from dbsam_deploy.core.imaging import preprocess
from dbsam_deploy.model import VARIANTS, DbSam
from dbsam_deploy.model.config import EfficientVitConfig, variant_config
from dbsam_deploy.model.efficient_vit import EfficientVit, LinearAttention
from dbsam_deploy.model.inspection import inspect_weights
from dbsam_deploy.model.shapes import shapes_of
from dbsam_deploy.model.weights import fresh_model

FOLDER = Path(__file__).parent / "families"
SIZES = [name for name in VARIANTS if name.startswith("efficientvit")]


@pytest.fixture(params=CONFIGS)
def small(request):
    """A small model with the family's weights, and the family's answers."""
    expected = dict(np.load(FOLDER / f"{request.param}.npz"))
    model = DbSam(replace(VARIANTS[request.param], **CONFIGS[request.param])).eval()
    shapes = json.loads(str(expected["keys"]))
    made = {key: torch.from_numpy(array) for key, array in fixed_weights(shapes).items()}
    model.load_state_dict(made, strict=True)
    return model, expected


def test_every_norm_has_the_familys_eps(small):
    model, expected = small
    ours, theirs = norm_eps(model), json.loads(str(expected["eps"]))
    assert ours == theirs
    assert set(ours.values()) == {1e-6}


def test_a_picture_and_its_box_are_taken_as_the_predictor_takes_them(small):
    model, expected = small
    pixels = preprocess(picture(), model.config.frame)[0]
    assert np.abs(pixels - expected["pixels"]).max() < 1e-6
    with torch.inference_mode():
        logits, iou = predicted(model)
    for found, wanted in ((logits, expected["predicted"]), (iou, expected["predicted_iou"])):
        assert np.abs(found.numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_another_image_size_leaves_the_frame(small):
    model, _ = small
    other = replace(model.config, image_size=80)
    assert (other.frame.image_size, other.frame.frame_side, other.frame.grid) == (80, 128, 8)
    encoder = EfficientVit(other.efficient_vit, other.frame.grid).eval()
    assert encoder(torch.zeros(2, 3, 80, 80)).shape == (2, 256, 8, 8)


def test_attention_is_that_of_the_formula_written_out():
    heads, depth, pixels = 3, 4, 6
    qkv = torch.randn(2, heads * 3 * depth, 2, 3, dtype=torch.float64)
    found = LinearAttention(depth)(qkv).reshape(2, heads, depth, pixels)
    parts = qkv.reshape(2, heads, 3, depth, pixels)
    for b in range(2):
        for h in range(heads):
            q, k, v = parts[b, h]
            weights = q.relu().T @ k.relu()
            wanted = v @ (weights / weights.sum(1, keepdim=True)).nan_to_num().T
            torch.testing.assert_close(found[b, h], wanted)


def test_a_pixel_that_attends_to_nothing_gets_nothing():
    qkv = -torch.ones(1, 3 * 4, 2, 2)
    assert torch.equal(LinearAttention(4)(qkv), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_found_by_its_blocks(name, tmp_path):
    torch.save(_thin(name), tmp_path / "any.pt")
    facts = inspect_weights(tmp_path / "any.pt")
    assert (facts["variant"], facts["family"]) == (name, "EfficientViT-SAM")


def _thin(name):
    """A model of the real names, each tensor with one number: quick to write."""
    return {
        key: torch.zeros(()) if "num_batches" in key else torch.zeros((1,) * tensor.dim())
        for key, tensor in shapes_of(name).items()
    }


def test_other_depths_are_of_no_size(tmp_path):
    state = _thin("efficientvit_sam_l0")
    more = {
        re.sub(r"stages\.4\.op_list\.1", "stages.4.op_list.9", key): state[key] for key in state
    }
    torch.save({**state, **more}, tmp_path / "any.pt")
    refused = inspect_weights(tmp_path / "any.pt")["refused"]
    assert "(2, 2, 2, 5, 6) blocks in its stages" in refused
    assert "(2, 2, 2, 5, 5) (efficientvit_sam_l0)" in refused


def test_a_fresh_encoder_takes_the_scale_of_a_decoders_embeddings(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, SIZES[0], replace(VARIANTS[SIZES[0]], **CONFIGS[SIZES[0]]))
    donor = DbSam(
        replace(variant_config("sam_vit_b", image_size=64), embed_dim=8, depth=4, num_heads=2)
    )
    nn.init.normal_(donor.image_encoder.neck[3].weight)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    model = fresh_model(SIZES[0], None, tmp_path / "donor.pth").model
    assert torch.equal(model.image_encoder.norm.weight, donor.image_encoder.neck[3].weight)
    assert isinstance(model.config.efficient_vit, EfficientVitConfig)


def test_a_file_without_its_neck_is_refused(tmp_path):
    state = _thin("efficientvit_sam_l0")
    state = {key: value for key, value in state.items() if ".neck." not in key}
    torch.save(state, tmp_path / "any.pt")
    facts = inspect_weights(tmp_path / "any.pt")
    assert facts["refused"] == "it does not fit efficientvit_sam_l0"
    assert any("missing: image_encoder.neck." in line for line in facts["differences"])
