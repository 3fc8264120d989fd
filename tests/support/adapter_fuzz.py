"""Adapters of the thin ViT of `checkpoint_fuzz`, and what a model must hold with one merged."""

from __future__ import annotations

import torch
from support.checkpoint_fuzz import VIT, Case, numbers
from torch import Tensor


def adapter_case(form: str) -> Case:
    """An adapter of the thin ViT's queries, keys and values, as `peft` or `SAMed` writes it."""
    width, rank = VIT["embed_dim"], 2
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(VIT["depth"]):
        if form == "peft":
            layer = f"base_model.model.image_encoder.blocks.{block}.attn.qkv.lora"
            shapes |= {f"{layer}_A.weight": (rank, width), f"{layer}_B.weight": (3 * width, rank)}
            continue
        for i in (2 * block, 2 * block + 1):
            shapes |= {f"w_a_{i:03d}": (rank, width), f"w_b_{i:03d}": (width, rank)}
    state = {name: numbers(name, shape) for name, shape in shapes.items()}
    return Case(form, dict(state), dict(state), {name: name for name in state})


def with_adapter(weight: Tensor, block: int, case: Case, scale: float) -> Tensor | None:
    """What a block's weight must then be; None where a half of its adapter is not there.

    Args:
        weight: of the base, (3 C, C).
        block: its number.
        case: the adapter.
        scale: of the products.
    """
    layer = f"base_model.model.image_encoder.blocks.{block}.attn.qkv.lora"
    names = [f"w_{half}_{2 * block + i:03d}" for i in (0, 1) for half in "ba"]
    if case.layout == "peft":
        names = [f"{layer}_B.weight", f"{layer}_A.weight"]
    parts = [case.expected[name] for name in names]
    if case.layout == "peft" and parts == [None, None]:
        return weight
    found = [part.float() for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    products = [b @ a for b, a in zip(found[::2], found[1::2], strict=True)]
    if case.layout == "peft":
        return weight + scale * products[0]
    queries, values = products
    return weight + torch.cat([queries, torch.zeros_like(queries), values])
