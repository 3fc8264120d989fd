"""Whether tensors fit a model, and the small differences that are made up for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import CheckpointError

StateDict = dict[str, Tensor]

DIFF_LINES = 8
"""How many keys of each kind an error lists; with its heading a diff fits one screen."""


def fit_tensors(tensors: StateDict, wanted: Mapping[str, Tensor]) -> StateDict:
    """Apply the small remap table: names and shapes on which DB-SAM checkpoints are known to vary.

    - `mlp.dwconv.weight` ↔ `mlp.dwconv.dwconv.weight` (and bias);
    - a 1×1 convolution (out, in, 1, 1) where a Linear (out, in) is wanted, and the reverse;
    - a missing `num_batches_tracked` counts as 0.

    Args:
        tensors: the file's tensors.
        wanted: the model's state dict, for its names and shapes.

    Returns:
        The tensors under the model's names where the table applies, all others unchanged.
    """
    fitted = {}
    for name, tensor in tensors.items():
        target = name
        if name not in wanted:
            for variant in (
                name.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv."),
                name.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv."),
            ):
                target = variant if variant in wanted and variant not in tensors else target
        shape = wanted[target].shape if target in wanted else tensor.shape
        if tensor.shape != shape and (*tensor.shape, 1, 1) == shape:
            tensor = tensor[..., None, None]
        elif tensor.shape != shape and tensor.shape == (*shape, 1, 1):
            tensor = tensor[..., 0, 0]
        fitted[target] = tensor
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked") and name not in fitted:
            fitted[name] = torch.zeros_like(tensor)
    return fitted


def check_fit(
    source: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], advice: str = ""
) -> None:
    """Compare a state dict with a model's, strictly.

    Args:
        source: what is being loaded, for the message.
        tensors: the candidate.
        wanted: the model's own state dict.
        advice: what shows more of the file, for the end of the message.

    Raises:
        CheckpointError: with a one-screen diff of missing, unexpected and mis-shaped keys, or the
            name of a tensor of another kind, or with NaN, infinity or a number that is too large.
    """
    if parts := differences(tensors, wanted):
        raise CheckpointError(
            f"{source} does not fit the model; name the variant the file was trained as "
            "with --variant" + (f"; {advice}" if advice else ""),
            *parts,
        )
    end = f"; {advice}" if advice else ""
    for name, tensor in tensors.items():
        dtype = wanted[name].dtype
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: {name} is {_word(tensor.dtype)}, expected {_word(dtype)}: quantised "
                f"weights cannot be taken{end}"
            )
        if not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinity; the file is damaged{end}"
            )
        if tensor.dtype.itemsize > dtype.itemsize and not torch.isfinite(tensor.to(dtype)).all():
            raise CheckpointError(
                f"{source}: {name} holds {tensor.abs().max().item():.3g}, more than {_word(dtype)} "
                f"can{end}"
            )


def differences(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Missing, unexpected and mis-shaped keys of a state dict, one line a kind."""
    missing = [k for k in wanted if k not in tensors]
    unexpected = [k for k in tensors if k not in wanted]
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape
    ]
    return [
        f"{len(keys)} {kind}: {'; '.join(keys[:DIFF_LINES])}"
        + (f"; and {len(keys) - DIFF_LINES} more" if len(keys) > DIFF_LINES else "")
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interpolate_position(
    tensors: StateDict, wanted: StateDict, image_size: int | None
) -> StateDict:
    """Resize a file's position tables to a model's.

    Args:
        tensors: the file's tensors.
        wanted: the model's state dict.
        image_size: the size that was asked for; None leaves the table of positions as it is. Those
            of relative positions are resized in any case, as SAM does it in every forward.
    """
    name = "image_encoder.pos_embed"
    if name not in tensors or name not in wanted or tensors[name].dim() != 4:
        return tensors
    resized = dict(tensors)
    table, grid = tensors[name], wanted[name].shape[1:3]
    fits = table.shape[-1] == wanted[name].shape[-1] and table.numel() > 0
    if image_size is not None and fits and table.shape[1:3] != grid:
        resized[name] = F.interpolate(
            table.permute(0, 3, 1, 2).float(), grid, mode="bicubic", align_corners=False
        ).permute(0, 2, 3, 1)
    for key, target in wanted.items():
        if ".attn.rel_pos_" in key and key in tensors and tensors[key].dim() == 2:
            source = tensors[key]
            fits = source.shape[1] == target.shape[1] and source.shape[0] > 0
            if fits and source.shape[0] != target.shape[0]:
                resized[key] = F.interpolate(
                    source.T[None].float(), target.shape[0], mode="linear", align_corners=False
                )[0].T
    return resized
