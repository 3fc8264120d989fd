"""Channel attention: the fused kernels beside PyTorch's operators, alone and as the whole block."""

from functools import partial

import pytest
import torch
from timing.gpu_peers import eager_channel_attention

from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.model.blocks import ChannelAttentionBlock
from dbsam_deploy.sessions.fused_model import FusedChannelAttention
from dbsam_deploy.validation.measuring import Demand

CHANNELS, GRID, EPSILON = 768, 64, 1e-6
WEIGHTS = CHANNELS**2
BATCHES = [1, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_channel_attention(compare_kernel, batch) -> None:
    reduced = CHANNELS // 4
    shapes = [
        (CHANNELS,),
        (CHANNELS,),
        (CHANNELS, 1, 3, 3),
        (reduced, CHANNELS),
        (CHANNELS, reduced),
        (CHANNELS, CHANNELS),
    ]

    def draw() -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, GRID, GRID, CHANNELS)
        drawn = (x, *(torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes))
        return tuple(tensor.to("cuda", torch.float16) for tensor in drawn)

    variants = {
        "ours": partial(torch_ops.channel_attention, epsilon=EPSILON),
        "eager": partial(eager_channel_attention, epsilon=EPSILON),
        "compile": torch.compile(partial(eager_channel_attention, epsilon=EPSILON), dynamic=False),
    }
    reference = partial(torch_ops.channel_attention_reference, epsilon=EPSILON)
    elements = 2 * batch * GRID**2 * CHANNELS + (1 + batch) * WEIGHTS + 2 * reduced * CHANNELS
    compare_kernel(variants, draw, reference, Demand(2 * elements), {"batch": batch})


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_channel_attention_block(compare_kernel, batch) -> None:
    """With the 1×1 convolution and the residual, against the model's own module."""
    precise = ChannelAttentionBlock(CHANNELS).cuda().eval().requires_grad_(False)
    block = ChannelAttentionBlock(CHANNELS).cuda().eval().requires_grad_(False).half()
    block.load_state_dict(precise.state_dict())
    precise.load_state_dict(block.state_dict())  # the same rounded weights

    def draw() -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, CHANNELS, GRID, GRID, device="cuda", dtype=torch.float16)
        return (x.contiguous(memory_format=torch.channels_last),)

    variants = {
        "ours": FusedChannelAttention(block),
        "eager": block,
        "compile": torch.compile(block, dynamic=False),
    }
    tokens = batch * GRID**2
    work = Demand(2 * (2 * tokens * CHANNELS + WEIGHTS), 2 * tokens * WEIGHTS)
    facts: dict[str, str | float] = {"batch": batch}
    compare_kernel(variants, draw, precise, work, facts, bound="float16")
