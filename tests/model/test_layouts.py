"""Other names for the same model: transformers' `SamModel`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import build_model
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.layouts import POSITIONS, own_name, own_names

TABLE = Path(__file__).parent / "keys" / "hugging_face.tsv"
"""Names and shapes of `SamModel(SamConfig()).state_dict()`, transformers 5.24.0."""


def hugging_face() -> dict[str, list[int]]:
    rows = (line.split("\t") for line in TABLE.read_text().splitlines())
    return {name: [int(side) for side in shape.strip("[]").split(",")] for name, shape in rows}


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


def test_two_matrices_of_positions(tmp_path):
    state = {k: torch.full((2,), float(i)) for i, k in enumerate(sorted(hugging_face()))}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ, expected one matrix"):
        read_checkpoint(tmp_path)
