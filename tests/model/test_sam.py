"""SAM's own modules, and what was made of them."""

from __future__ import annotations

import pytest
import torch
from support.references import check_close
from torch.utils._python_dispatch import TorchDispatchMode

from dbsam_deploy.model import sam


def _attention(side: int) -> torch.nn.Module:
    attention = sam.ViTAttention(24, 3, use_rel_pos=True, input_size=(side, side))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("queries", [1, 10, 49, 50, 100, 10_000])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 7, 7), (3, 7, 7), (2, 5, 5)])
def test_some_queries_at_a_time_are_all_of_them(monkeypatch, queries, batch, height, width):
    monkeypatch.setattr(sam, "SCORES_BYTES", queries * height * width * 4)
    attention = _attention(height)
    x = torch.randn(batch, height, width, 24, requires_grad=True)
    own, other = attention(x), super(sam.ViTAttention, attention).forward(x)
    check_close(own.detach().numpy(), other.detach().numpy(), "float32 kernel")
    grad, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (own, other))
    check_close(grad.numpy(), expected.numpy(), "float32 kernel", "gradient")


def test_in_bfloat16_as_an_autocast_makes_it_too():
    attention, x = _attention(7), torch.randn(2, 7, 7, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, other = attention(x), super(sam.ViTAttention, attention).forward(x)
    assert own.dtype == other.dtype
    check_close(own.float().numpy(), other.float().numpy(), "bfloat16")


@pytest.mark.parametrize("window", [0, 4])
def test_blocks_of_the_vit_have_it(window):
    block = sam.ViTBlock(24, 3, use_rel_pos=True, window_size=window, input_size=(7, 7))
    assert isinstance(block.attn, sam.ViTAttention)


class Largest(TorchDispatchMode):
    """The most bytes of an array that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1280, 16)])
def test_no_array_of_it_is_larger_than_a_cache_at_1024_pixels(width, heads):
    attention = sam.ViTAttention(width, heads, use_rel_pos=True, input_size=(64, 64)).to("meta")
    with Largest() as largest:
        attention(torch.empty(1, 64, 64, width, device="meta"))
    qkv = 3 * 64 * 64 * width * 4
    assert largest.nbytes == qkv
