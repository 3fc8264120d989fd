"""Other names for the same model: transformers' `SamModel` and `Sam2Model`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import LayerNorm

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import VARIANTS, build_model
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.layouts import HUGGING_FACE_2, POSITIONS, own_name, own_names
from dbsam_deploy.model.weights import load_model

TABLE = Path(__file__).parent / "keys" / "hugging_face.tsv"
"""Names and shapes of `SamModel(SamConfig()).state_dict()`, transformers 5.24.0."""


TABLE_2 = TABLE.with_name("sam2_hugging_face.tsv")
"""Those of `Sam2Model(Sam2Config())`."""
POINTS_2 = "prompt_encoder.point_embed.weight"


def hugging_face() -> dict[str, list[int]]:
    rows = (line.split("\t") for line in TABLE.read_text().splitlines())
    return {name: [int(side) for side in shape.strip("[]").split(",")] for name, shape in rows}


def test_a_folder_of_sam2_model_or_of_its_film_model(tmp_path, monkeypatch):
    rows = (line.split("\t") for line in TABLE_2.read_text().splitlines())
    shapes = {name: json.loads(shape) for name, shape in rows}
    # The large ones a number each: it is the names that count.
    state = {
        name: torch.full((4, 1) if name == POINTS_2 else (2,), float(i))
        for i, name in enumerate(sorted(shapes))
    }
    state[POINTS_2] += torch.arange(4)[:, None] / 8
    state[POSITIONS[1]] = state[POSITIONS[0]].clone()
    memory = {"memory_attention.layer_norm.weight": torch.zeros(2)}
    save_file({**state, **memory}, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path)
    assert found.layout == HUGGING_FACE_2
    assert "ignored: mask_decoder.pred_obj_score_head, memory_attention" in found.notes
    with torch.device("meta"):
        wanted = build_model("sam2_hiera_tiny").state_dict()
    assert set(found.tensors) == set(wanted)
    for name, tensor in state.items():
        if name == POINTS_2:
            for i in range(4):
                row = found.tensors[f"prompt_encoder.point_embeddings.{i}.weight"]
                assert torch.equal(row, tensor[i : i + 1])
        elif "pred_obj_score_head" not in name:
            own = own_name(name, HUGGING_FACE_2)
            assert torch.equal(found.tensors[own], tensor)
            assert list(wanted[own].shape) == shapes[name]


def test_every_name_of_sam_model_is_one_of_sams():
    with torch.device("meta"):
        wanted = {name: list(t.shape) for name, t in build_model("sam_vit_b").state_dict().items()}
    assert own_names(hugging_face()) == wanted
    assert len(hugging_face()) == len(wanted) + 1  # the matrix of positions, under both names


@pytest.mark.parametrize("left_out", [None, *POSITIONS])
def test_a_folder_of_save_pretrained(tmp_path, left_out):
    """Which of the two names of one matrix is written changes with the version."""
    state = {k: torch.full((2,), float(i)) for i, k in enumerate(sorted(hugging_face()))}
    state[POSITIONS[1]] = state[POSITIONS[0]].clone()
    state.pop(left_out, None)
    save_file(state, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_checkpoint(path)
        assert "layout of Hugging Face SamModel" in found.notes
        assert len(found.tensors) == 314
        assert all(torch.equal(found.tensors[own_name(k)], v) for k, v in state.items())


@pytest.mark.parametrize("name", ["image_encoder.pos_embed", "mask_decoder.upscale_conv1.bias"])
def test_one_tensor_under_the_names_of_two_layouts(tmp_path, name):
    """Which of them is the model's cannot be told."""
    state = {k: torch.full((2,), float(i)) for i, k in enumerate(sorted(hugging_face()))}
    save_file({**state, own_name(name): torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="are one tensor of the model; expected one"):
        read_checkpoint(tmp_path)


def test_two_matrices_of_positions(tmp_path):
    state = {k: torch.full((2,), float(i)) for i, k in enumerate(sorted(hugging_face()))}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ, expected one matrix"):
        read_checkpoint(tmp_path)


def test_the_decoder_computes_with_the_eps_of_sam_model(tmp_path, monkeypatch):
    """Its masks differ by 1e-4 from transformers' own otherwise, and by 4e-6 so."""
    thin = replace(VARIANTS["sam_vit_b"], embed_dim=24, num_heads=2, depth=4, image_size=64)
    monkeypatch.setitem(VARIANTS, "sam_vit_b", thin)
    state = build_model("sam_vit_b").state_dict()
    back = {own_name(name): name for name in hugging_face()}
    save_file(
        {back[k]: v.contiguous() for k, v in state.items() if k in back},
        tmp_path / "model.safetensors",
    )
    torch.save(state, tmp_path / "sam.pth")
    for path, eps in ((tmp_path, 1e-6), (tmp_path / "sam.pth", 1e-5)):
        model = load_model(checkpoint=path).model
        norms = [m for m in model.mask_decoder.transformer.modules() if isinstance(m, LayerNorm)]
        assert [norm.eps for norm in norms] == [eps] * 8 + [1e-5]
        assert model.config.decoder_norm_eps == eps
