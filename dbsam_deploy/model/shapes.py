"""A variant's names and shapes, without its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import Fusion
from .db_sam import build_model

_FILLING = frozenset(
    {"uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}
    | {"constant_", "ones_", "zeros_", "fill_", "zero_"}
)
"""What `torch.nn.init` and the modules' own beginnings call."""


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are made.

    The first random number on the device meta loads torch's compiler, which takes two seconds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _FILLING:
            return args[0] if args else options["tensor"]
        if name == "randn":  # of SAM's positions, which it multiplies with a number
            return torch.empty(*args, device="cpu")
        return func(*args, **options)


def shapes_of(
    variant: str, *, image_size: int | None = None, fusion: Fusion | None = None
) -> dict[str, Tensor]:
    """The state dict of a variant on the device meta; arguments are those of `build_model`."""
    with torch.device("meta"), _Unfilled():
        state = build_model(variant, image_size=image_size, fusion=fusion).state_dict()
    return {name: tensor.to("meta") for name, tensor in state.items()}
