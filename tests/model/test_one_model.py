"""One fine-tune, written by four trainers: the exported files are the same, bit for bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.references import small_model

from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import load_recipe


def written(folder, state):
    """The same weights as Lightning, timm, MONAI and accelerate write them, and the bare ones."""
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    files = {
        "bare.pth": state,
        "lightning.ckpt": {
            "state_dict": {f"net._orig_mod.{name}": tensor for name, tensor in state.items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "hyper_parameters": {"lr": 0.1},
        },
        "timm.pth.tar": {"epoch": 3, "state_dict": state, "state_dict_ema": averaged},
        "monai.pt": {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    (folder / "accelerate").mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "accelerate" / "model.safetensors",
    )
    return [*files, "accelerate"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    thin = replace(VARIANTS["sam_vit_b"], embed_dim=24, num_heads=2, depth=4, image_size=64)
    monkeypatch.setitem(VARIANTS, "sam_vit_b", thin)
    state = small_model("sam_vit_b", 64, embed_dim=24, depth=4).state_dict()
    return [tmp_path / name for name in written(tmp_path, state)]


def test_a_model_from_any_wrapper_is_the_same(files):
    """All that an export is made of: its key has this hash, the recipe, code and versions."""
    assert len({load_model(checkpoint=path).weights["sha256"] for path in files}) == 1


@pytest.mark.slow
def test_a_model_from_any_wrapper_is_the_same_onnx(files):
    hashes = set()
    for path in files:
        folder = path.with_name(f"{path.name}.onnx")
        folder.mkdir()
        export_graph(load_model(checkpoint=path).model, "encoder", load_recipe("fp32"), folder)
        hashes.add(sha256_of(folder / "encoder.onnx"))
    assert len(hashes) == 1
