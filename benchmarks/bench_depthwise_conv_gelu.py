"""Depthwise 3×3 and GELU of MixFFN: the fused kernel beside PyTorch's, alone and in its network."""

from functools import partial

import pytest
import torch
from timing.gpu_peers import eager_depthwise_conv_gelu

from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.model.blocks import MixFFN
from dbsam_deploy.sessions.fused_model import FusedMixFfn, LeanMixFfn
from dbsam_deploy.validation.measuring import Demand

DIM, GRID = 768, 64
HIDDEN = 4 * DIM
CASES = {"one level": (1, 1), "one level, batch 8": (8, 1), "five levels": (1, 5)}
"""Batch and levels of `db_sam`, and of `db_sam_plus`."""


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_depthwise_conv_gelu(compare_kernel, case) -> None:
    batch, levels = CASES[case]
    shapes = ((batch, levels * GRID**2, HIDDEN), (HIDDEN, 1, 3, 3), (HIDDEN,))
    sizes = {"height": GRID, "width": GRID}

    def draw() -> tuple[torch.Tensor, ...]:
        x, weight, bias = (
            torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes
        )
        return x, weight / 3, bias

    eager = partial(eager_depthwise_conv_gelu, **sizes)
    variants = {
        "ours": partial(torch_ops.depthwise_conv_gelu, **sizes),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    reference = partial(torch_ops.depthwise_conv_gelu_reference, **sizes)
    tokens = batch * levels * GRID**2
    work = Demand(2 * (2 * tokens * HIDDEN + 10 * HIDDEN))
    compare_kernel(variants, draw, reference, work, {"case": case})


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_mix_ffn(compare_kernel, case) -> None:
    """With the Linear layers around it, as `pytorch-fused` has it without the operator."""
    batch, levels = CASES[case]
    shapes = ((GRID, GRID),) * levels
    precise = MixFFN(DIM, HIDDEN).cuda().eval().requires_grad_(False)
    network = MixFFN(DIM, HIDDEN).cuda().eval().requires_grad_(False).half()
    network.load_state_dict(precise.state_dict())
    precise.load_state_dict(network.state_dict())  # the same rounded weights
    tokens = batch * levels * GRID**2

    def draw() -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, levels * GRID**2, DIM, device="cuda", dtype=torch.float16),)

    ours, lean = (partial(kind(network), shapes=shapes) for kind in (FusedMixFfn, LeanMixFfn))
    variants = {"ours": ours, "eager": lean, "compile": torch.compile(lean, dynamic=False)}
    work = Demand(2 * (2 * tokens * DIM + 2 * DIM * HIDDEN), 4 * tokens * DIM * HIDDEN)
    reference = partial(precise, shapes=shapes)
    compare_kernel(variants, draw, reference, work, {"case": case}, bound="float16")
