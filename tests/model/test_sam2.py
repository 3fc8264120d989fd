"""SAM 2 in image mode against its own image predictor: a small model with the same weights.

What it answered is in families/sam2_hiera_tiny.npz (tests/support/sam2_references.py, which also
compares the real shapes).
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.fixed_numbers import fixed_numbers
from support.sam2_references import SMALL, crafted, made_weights, our_answers

from dbsam_deploy.core.contract import HIGH_RES_FEATS, graph_specs
from dbsam_deploy.core.errors import CheckpointError, InputError
from dbsam_deploy.graphs.encoder_decoder import build_graph
from dbsam_deploy.graphs.sam2_graphs import single_mask
from dbsam_deploy.model import VARIANTS, variant_config
from dbsam_deploy.model.inspection import inspect_weights
from dbsam_deploy.model.sam2_decoder import _single
from dbsam_deploy.model.weights import fresh_model, load_model
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.quantization.quantizer import Quantizer
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.fused_model import FusedEncoder
from dbsam_deploy.sessions.pytorch_session import PytorchSession

ANSWERS = Path(__file__).parent / "families" / "sam2_hiera_tiny.npz"
CLOSE = 1e-5
"""Of the largest value: rounding of float32, in another order."""


@pytest.fixture(scope="module")
def answers():
    return dict(np.load(ANSWERS))


@pytest.fixture
def weights(answers, monkeypatch, tmp_path):
    """Facebook's file: the model with its memory, below `model`."""
    monkeypatch.setitem(VARIANTS, "sam2_hiera_tiny", SMALL)
    small = replace(SMALL, name="medsam2", preprocessing="medsam2")
    monkeypatch.setitem(VARIANTS, "medsam2", small)
    state = made_weights(json.loads(str(answers["keys"])))
    torch.save({"model": state}, tmp_path / "sam2.1_hiera_tiny.pt")
    return tmp_path / "sam2.1_hiera_tiny.pt"


class GraphSession:
    """The graphs that are exported, in PyTorch."""

    backend = "graphs"

    def __init__(self, model):
        self._specs = graph_specs(model.config.frame)
        self._graphs = {name: build_graph(model, name) for name in self._specs}

    def run(self, graph, feed):
        spec = self._specs[graph]
        inputs = {name: torch.from_numpy(feed[name]) for name in spec.input_names}
        with torch.inference_mode():
            outputs = self._graphs[graph](**inputs)
        return {name: one.numpy() for name, one in zip(spec.output_names, outputs, strict=True)}


@pytest.mark.parametrize("session", [PytorchSession, GraphSession])
def test_pictures_features_and_masks_are_sam2s(weights, answers, session):
    loaded = load_model(checkpoint=weights)
    assert loaded.model.config.name == "sam2_hiera_tiny"
    found = our_answers(Predictor(session(loaded.model), loaded.preprocessing))
    assert set(found) == set(answers) - {"keys", "chosen", "chosen_iou"}
    for name, array in found.items():
        expected = answers[name]
        assert array.size == expected.size, name
        error = np.abs(array.reshape(expected.shape) - expected).max()
        assert error <= CLOSE * np.abs(expected).max(), name


@pytest.mark.parametrize("choose", [single_mask, _single])
def test_an_unstable_single_mask_gives_way_to_the_best_alternative(answers, choose):
    logits, scores = torch.from_numpy(crafted()), torch.from_numpy(fixed_numbers("iou", (6, 4)))
    if choose is single_mask:
        masks, iou = (one[0] for one in choose(logits[None], scores[None]))
    else:
        masks, iou = choose(logits, scores)
    np.testing.assert_array_equal(masks, answers["chosen"])
    np.testing.assert_array_equal(iou, answers["chosen_iou"])
    kept = [torch.equal(mask[0], all_[0]) for mask, all_ in zip(masks, logits, strict=True)]
    assert set(kept) == {True, False}


def test_half_precision_counts_all_pixels_of_a_mask():
    """65,536 are too many for float16; 97 % within the margin are not stable."""
    logits = torch.full((1, 1, 4, 256, 256), 8, dtype=torch.float16)
    logits[..., :8, :] = 0
    masks, _ = single_mask(logits, torch.zeros(1, 1, 4, dtype=torch.float16))
    assert masks.dtype == torch.float16
    logits[:, :, 1:] = -8
    assert (single_mask(logits, torch.zeros(1, 1, 4))[0] == -8).all()
    logits[:, :, 0, 2:8] = 8
    assert (single_mask(logits, torch.zeros(1, 1, 4))[0] == logits[:, :, :1]).all()


def test_a_file_is_told_by_its_keys_and_its_memory_is_named(weights):
    facts = inspect_weights(weights)
    assert (facts["variant"], facts["family"], facts["refused"]) == ("sam2_hiera_tiny", "SAM 2", "")
    assert facts["layout"] == "SAM 2"
    ignored = "; ".join(load_model(checkpoint=weights).notes)
    for part in ("memory_attention", "memory_encoder", "maskmem_tpos_enc", "pred_obj_score_head"):
        assert any(part in name for name in facts["ignored"]), part
    assert "memory_attention" in ignored


def test_medsam2_is_told_by_its_name_alone(weights):
    medsam2 = weights.with_name("MedSAM2_latest.pt")
    weights.rename(medsam2)
    loaded = load_model(checkpoint=medsam2)
    assert loaded.model.config.name == "medsam2"
    assert loaded.preprocessing.mode == "medsam2"
    assert VARIANTS["medsam2"].hiera == VARIANTS["sam2_hiera_tiny"].hiera


def test_a_size_that_sam2_never_had_is_refused(weights, monkeypatch):
    monkeypatch.setitem(VARIANTS, "sam2_hiera_tiny", variant_config("sam2_hiera_small"))
    monkeypatch.setitem(VARIANTS, "medsam2", variant_config("sam2_hiera_small"))
    with pytest.raises(CheckpointError, match="a Hiera of 8 blocks, expected"):
        load_model(checkpoint=weights)


def test_another_image_size_needs_no_other_weights(weights):
    loaded = load_model(checkpoint=weights, image_size=96)
    features = loaded.model.features(torch.zeros(2, 3, 96, 96))
    assert [tuple(one.shape) for one in features] == [
        (2, 256, 6, 6),
        (2, 32, 24, 24),
        (2, 64, 12, 12),
    ]
    for size in (80, 100):
        with pytest.raises(InputError, match=f"image size {size}: expected a multiple of 32"):
            load_model(checkpoint=weights, image_size=size)


def test_earlier_logits_count_up_to_what_sam2_hands_out(weights):
    model = load_model(checkpoint=weights).model
    box = np.array([[4, 5, 40, 30]], np.float32)
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    for session in (PytorchSession(model), GraphSession(model)):
        predictor = Predictor(session, model.config.frame)
        predictor.set_image(image)
        logits = [
            predictor.predict_prompts(
                boxes=box, mask_input=np.full((1, 16, 16), value, np.float32)
            ).known_logits()
            for value in (32, 90, 9)
        ]
        np.testing.assert_array_equal(logits[0], logits[1])
        assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_a_box_with_too_many_points_is_refused(weights):
    loaded = load_model(checkpoint=weights)
    predictor = Predictor(PytorchSession(loaded.model), loaded.preprocessing)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8))
    asked = {"point_coords": np.ones((1, 62, 2)), "point_labels": np.ones((1, 62), int)}
    with pytest.raises(InputError, match="62 points with a box: SAM 2 takes at most 61"):
        predictor.predict_prompts(boxes=np.array([[1, 2, 30, 40]]), **asked)
    assert predictor.predict_prompts(**asked).masks.shape == (1, 1, 45, 70)


def test_what_cannot_carry_its_features_says_so(weights):
    loaded = load_model(checkpoint=weights)
    with pytest.raises(InputError, match="int8 quantises"):
        Quantizer.of(loaded, load_recipe("int8"), None, None, None)
    with pytest.raises(InputError, match="none of the fused operators"):
        FusedEncoder(loaded.model)


def test_an_adapter_of_the_mask_decoder_alone_has_sam2s_names_too(weights, tmp_path):
    layer = "sam_mask_decoder.transformer.layers.0.mlp.layers.0"
    down, up = torch.randn(2, 256), torch.randn(2048, 2)
    start = f"base_model.model.{layer}.lora_"
    save_file(
        {f"{start}A.weight": down, f"{start}B.weight": up}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers.0"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain, adapted = (
        load_model(checkpoint=weights, adapter=path).model.mask_decoder.transformer.layers[0].mlp
        for path in (None, tmp_path)
    )
    torch.testing.assert_close(adapted.lin1.weight - plain.lin1.weight, 2 * up @ down)


def test_fresh_weights_need_no_other_familys_decoder(weights):
    loaded = fresh_model("sam2_hiera_tiny", None, None)
    assert loaded.weights["source"] == "fresh weights"
    found = loaded.model.features(torch.randn(1, 3, 64, 64))
    assert len(found) == 1 + len(HIGH_RES_FEATS)
    assert all(torch.isfinite(one).all() and one.std() > 0 for one in found)
