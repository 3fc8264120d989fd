"""Adapters of low rank: merged, they give what the unmerged model gives."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.wrapper_files import answers, thin_sam
from torch import nn

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import VARIANTS, build_model
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.layouts import own_name, own_names
from dbsam_deploy.model.weights import load_model

WRITTEN = Path(__file__).parent / "wrappers"
HUGGING_FACE = Path(__file__).parent / "keys" / "hugging_face.tsv"
WIDTH, RANK, DEPTH = 24, 3, 4
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """ViT-B at width 24, so that its files stay small."""
    config = VARIANTS["sam_vit_b"]
    small = replace(config, embed_dim=WIDTH, num_heads=2, depth=DEPTH, image_size=64)
    monkeypatch.setitem(VARIANTS, "sam_vit_b", small)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "base.pth"
    torch.save(build_model("sam_vit_b").state_dict(), path)
    return path


class Adapted(nn.Module):
    """A linear layer with SAMed's adapter, as SAMed computes it."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        for kind in "qv":
            down, up = (
                nn.Linear(self.width, RANK, bias=False),
                nn.Linear(RANK, self.width, bias=False),
            )
            self.add_module(f"linear_a_{kind}", down)
            self.add_module(f"linear_b_{kind}", up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed = self.qkv(x)
        changed[..., : self.width] += self.linear_b_q(self.linear_a_q(x))
        changed[..., -self.width :] += self.linear_b_v(self.linear_a_v(x))
        return changed


def adapted():
    torch.manual_seed(3)
    model = build_model("sam_vit_b")
    for block in model.image_encoder.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    return model.eval()


def samed_file(model, path):
    """What SAMed's `save_lora_parameters` writes."""
    state = {}
    for i, block in enumerate(model.image_encoder.blocks):
        for j, kind in enumerate("qv"):
            for half in "ab":
                layer = getattr(block.attn.qkv, f"linear_{half}_{kind}")
                state[f"w_{half}_{2 * i + j:03d}"] = layer.weight
    parts = ("prompt_encoder", "mask_decoder")
    state |= {k: v for k, v in model.state_dict().items() if k.startswith(parts)}
    torch.save(state, path)


def test_samed_merged_is_samed(tmp_path, base):
    model = adapted()
    with torch.no_grad():
        model.mask_decoder.iou_token.weight += 1
    samed_file(model, tmp_path / "lora.pth")
    loaded = load_model(checkpoint=base, adapter=tmp_path / "lora.pth")
    assert "with the LoRA lora.pth" in loaded.weights["note"]
    plain = load_model(checkpoint=base).model
    with torch.no_grad():
        expected, found = model.encode(IMAGE), loaded.model.encode(IMAGE)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert not torch.allclose(plain.encode(IMAGE), expected, atol=1e-3)
    assert torch.equal(
        loaded.model.mask_decoder.iou_token.weight, model.mask_decoder.iou_token.weight
    )


def test_a_whole_state_dict_with_adapters_is_merged(tmp_path):
    model = adapted()
    torch.save(
        {"model": {f"sam.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    loaded = load_model(checkpoint=tmp_path / "w.pth")
    assert "its LoRA is merged" in loaded.weights["note"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode(IMAGE), model.encode(IMAGE), rtol=0, atol=2e-6
        )


def peft_folder(path, names, **changed):
    """A folder as peft's `save_pretrained` writes it; returns the product of each layer."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", **changed}
    (path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    state, products = {}, {}
    for name, (rows, columns) in names.items():
        down = torch.randn(RANK, columns, generator=generator)
        up = torch.randn(rows, RANK, generator=generator)
        state[f"base_model.model.{name}.lora_A.weight"] = down
        state[f"base_model.model.{name}.lora_B.weight"] = up
        products[name] = up @ down
    save_file(state, path / "adapter_model.safetensors")
    return products


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2), (True, 6 / math.sqrt(RANK))])
@pytest.mark.parametrize("layers", ["vision_encoder.layers", "image_encoder.blocks"])
def test_peft(tmp_path, base, layers, rslora, scale):
    names = {
        f"{layers}.0.attn.qkv": (3 * WIDTH, WIDTH),
        "mask_decoder.transformer.layers.1.self_attn.q_proj": (256, 256),
    }
    products = peft_folder(tmp_path / "lora", names, use_rslora=rslora)
    before = load_model(checkpoint=base).model.state_dict()
    after = load_model(checkpoint=base, adapter=tmp_path / "lora").model.state_dict()
    expected = own_names({f"{name}.weight": product for name, product in products.items()})
    for name, tensor in before.items():
        change = scale * expected[name] if name in expected else 0
        torch.testing.assert_close(after[name], tensor + change)


@pytest.mark.parametrize("name", ["peft", "peft_sam_model", "peft_decoder"])
def test_a_folder_that_peft_wrote(tmp_path, name):
    """What peft's unmerged model answered, around ours and around transformers' `SamModel`.

    The last adapts one layer of the decoder, whose name in both layouts is another layer's.
    """
    state = thin_sam().state_dict()
    base = tmp_path / "base.safetensors"
    if name != "peft":
        names = [line.split("\t")[0] for line in HUGGING_FACE.read_text().splitlines()]
        state = {key: state[own_name(key)] for key in names if own_name(key) in state}
    save_file({key: tensor.clone() for key, tensor in state.items()}, base)
    loaded = load_model(checkpoint=base, adapter=WRITTEN / name)
    plain = answers(load_model(checkpoint=base).model)
    expected = np.load(WRITTEN / name / "answers.npz")
    for key, found in answers(loaded.model).items():
        largest = np.abs(expected[key]).max()
        assert np.abs(found.numpy() - expected[key]).max() <= 1e-5 * largest, key
    assert np.abs(plain["ious"].numpy() - expected["ious"]).max() > 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not merged here"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]"),
        ({"use_dora": True}, "use_dora is True, which is not merged here: save"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern is {'q': 2}, which is not merged"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 0}, "rank 0"),
        ({"r": RANK + 1}, r"is \(3, 24\), and the rank in adapter_config\.json is 4"),
        ({"r": float("inf")}, "is no configuration of LoRA"),
        ({"r": 10**400}, "rank 1000"),
        ({"lora_alpha": "x"}, "is no configuration of LoRA"),
        ({"lora_alpha": 10**400}, "is no configuration of LoRA"),
    ],
)
def test_what_is_not_merged(tmp_path, base, changed, message):
    peft_folder(
        tmp_path / "lora", {"image_encoder.blocks.0.attn.qkv": (3 * WIDTH, WIDTH)}, **changed
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint=base, adapter=tmp_path / "lora")


def test_an_adapter_of_another_model(tmp_path, base):
    peft_folder(tmp_path / "a", {"image_encoder.blocks.9.attn.qkv": (3 * WIDTH, WIDTH)})
    with pytest.raises(CheckpointError, match=r"blocks\.9\.attn\.qkv\.weight, which is no whole"):
        load_model(checkpoint=base, adapter=tmp_path / "a")
    peft_folder(tmp_path / "b", {"image_encoder.blocks.0.attn.qkv": (9, 9)})
    with pytest.raises(CheckpointError, match=r"\(9, 3\) · \(3, 9\), expected \(72, 24\)"):
        load_model(checkpoint=base, adapter=tmp_path / "b")


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_whole_numbers_are_not_merged(tmp_path, base, part):
    """Their sum would be of the model's own type, and nothing would tell it any more."""
    layer = "image_encoder.blocks.0.attn.qkv"
    peft_folder(tmp_path / "a", {layer: (3 * WIDTH, WIDTH)})
    path = tmp_path / "a" / "adapter_model.safetensors"
    if part == "adapter":
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    else:
        state = read_checkpoint(base).tensors
        torch.save({**state, f"{layer}.weight": state[f"{layer}.weight"].to(torch.int8)}, base)
    with pytest.raises(CheckpointError, match="is int8, expected float32: quantised weights"):
        load_model(checkpoint=base, adapter=tmp_path / "a")


def test_an_adapter_that_names_a_layer_twice(tmp_path, base):
    layer = "image_encoder.blocks.0.attn.qkv"
    peft_folder(tmp_path / "a", {layer: (3 * WIDTH, WIDTH)})
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    more = {f"base_model.model.{layer}.lora_A.other.weight": torch.zeros(RANK, WIDTH)}
    save_file({**state, **more}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts image_encoder.*qkv\.weight twice"):
        load_model(checkpoint=base, adapter=tmp_path / "a")


@pytest.mark.parametrize("name", ["mask_decoder.iou_token.lora_embedding_A", "image_encoder.more"])
def test_an_adapter_with_more_than_the_model(tmp_path, base, name):
    peft_folder(tmp_path / "a", {"image_encoder.blocks.0.attn.qkv": (3 * WIDTH, WIDTH)})
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    state[f"base_model.model.{name}"] = torch.zeros(2)
    save_file(state, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"has {re.escape(name)}, which is no part of the"):
        load_model(checkpoint=base, adapter=tmp_path / "a")


def test_an_adapter_alone(tmp_path, base):
    samed_file(adapted(), tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match="is an adapter of SAMed: name the model"):
        load_model(checkpoint=tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match="--adapter belongs to a file: name it with"):
        load_model(variant="sam_vit_b", adapter=tmp_path / "lora.pth")
    stored = read_checkpoint(base).tensors
    state = {k.replace("qkv.", "qkv.base_layer."): v for k, v in stored.items()}
    state["image_encoder.blocks.0.attn.qkv.lora_A.default.weight"] = torch.zeros(RANK, WIDTH)
    torch.save(state, tmp_path / "peft.pth")
    with pytest.raises(CheckpointError, match="layers of peft whose scale is not in it"):
        load_model(checkpoint=tmp_path / "peft.pth")


@pytest.mark.parametrize("shape", [(), (0, 50_000), (3, 50_000)], ids=str)
def test_an_adapter_of_nothing(tmp_path, shape):
    """Of rank 0 and some hundred bytes, with a product (50 000, 50 000) of 10 GB."""
    layer, wide = "image_encoder.blocks.0.attn.qkv", shape[-1] if shape else 1
    state = {
        "image_encoder.patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16),
        f"{layer}.qkv.weight": torch.zeros(shape),
        **{f"{layer}.linear_a_{kind}.weight": torch.zeros(0, wide) for kind in "qv"},
        **{f"{layer}.linear_b_{kind}.weight": torch.zeros(wide, 0) for kind in "qv"},
    }
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="expected three times as many rows as columns"):
        load_model(checkpoint=tmp_path / "w.safetensors")
