"""Each wrapper around each layout of a model: what the reader makes of it, and the table of it.

`PYTHONPATH=.:tests python tests/support/wrapper_cases.py` prints the table that stands in
docs/how-to/checkpoint.md, where tests/model/test_wrapper_table.py compares it.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.config import ModelConfig
from dbsam_deploy.model.layouts import own_names
from dbsam_deploy.model.shapes import shapes_of

State = dict[str, Tensor]
_KEYS = Path(__file__).parents[1] / "model" / "keys"
_LISTS = {"SamModel": _KEYS / "hugging_face.tsv", "Sam2Model": _KEYS / "sam2_hugging_face.tsv"}


def keys_of(layout: str) -> list[str]:
    """A layout's own names, of its variant as it is now: tests put small ones in its place."""
    variant = LAYOUTS[layout] or "sam2_hiera_tiny"
    return list(_keys_of(layout, variant, VARIANTS[variant]))


@functools.cache
def _keys_of(layout: str, variant: str, _: ModelConfig) -> list[str]:
    if layout in _LISTS:
        names = [line.split("\t")[0] for line in _LISTS[layout].read_text().splitlines()]
        return [name for name in names if "pred_obj_score_head" not in name]
    if layout == "SAM 2":
        return [_of_sam2(name) for name in shapes_of(variant)]
    names = list(shapes_of(variant))
    return [re.sub(r"\.mlp\.adapter\.", ".Adapter.", name) for name in names]


LAYOUTS = {
    "SAM": "sam_vit_b",
    "DB-SAM": "db_sam",
    "LiteMedSAM": "lite_medsam",
    "MobileSAM": "mobile_sam",
    "SAM-Med2D": "sam_med2d",
    "EfficientViT-SAM": "efficientvit_sam_l0",
    "SAM 2": "",
    "SamModel": "",
    "Sam2Model": "",
}


def _of_sam2(name: str) -> str:
    """Facebook's name of one of ours."""
    name = re.sub(r"(transformer\.layers\.\d+\.mlp)\.lin1", r"\1.layers.0", name)
    name = re.sub(r"(transformer\.layers\.\d+\.mlp)\.lin2", r"\1.layers.1", name)
    name = re.sub(r"^image_encoder\.(conv_s\d)", r"sam_mask_decoder.\1", name)
    name = re.sub(r"^(mask_decoder|prompt_encoder)", r"sam_\1", name)
    return name.removeprefix("image_encoder.") if name.endswith("no_mem_embed") else name


def numbers(names: list[str], start: float = 0) -> State:
    """Small tensors with a number of their own; Hugging Face's two names of one matrix have one.

    Four rows, as of the one tensor of `Sam2Model` that is four here.
    """
    state = {name: torch.full((4,), start + i) for i, name in enumerate(names)}
    positions = [name for name in names if name.endswith("positional_embedding")]
    return {**state, **dict.fromkeys(positions, torch.full((2,), start - 1.0))}


def _under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _apart(state: State) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if rest:
            parts.setdefault(part, {})[rest] = tensor
        else:
            parts[name] = tensor
    return parts


def _more(state: State) -> State:
    return {name: tensor + 1000 for name, tensor in state.items()}


_OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
WRAPPERS: dict[str, Callable[[State], Any]] = {
    "state dict": lambda state: state,
    "`model`, `optimizer`, `epoch`": lambda state: {
        "model": state,
        "optimizer": _OPTIMIZER,
        "epoch": 3,
    },
    "`net` with `module.`": lambda state: {"net": _under("module.", state)},
    "Lightning, compiled": lambda state: {
        "state_dict": _under("net._orig_mod.", state),
        "callbacks": {},
        "hyper_parameters": {"lr": 0.1},
    },
    "MMEngine": lambda state: {"meta": {"epoch": 1}, "message_hub": {}, "state_dict": state},
    "parts apart": _apart,
    "timm with an average": lambda state: {"state_dict": state, "state_dict_ema": _more(state)},
    "student and teacher": lambda state: {
        "state_dict": {**_under("student.", state), **_under("teacher.", _more(state))}
    },
}


@functools.cache
def outcome(wrapper: str, layout: str) -> str:
    """The largest difference after loading, or the words of the refusal."""
    state = numbers(keys_of(layout))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(WRAPPERS[wrapper](state), path)
        try:
            found = read_checkpoint(path).tensors
        except CheckpointError as error:
            return error.message.removeprefix(f"checkpoint {path}: ").partition(";")[0]
    expected = own_names(state)
    if found.keys() != expected.keys():
        return f"{len(found.keys() ^ expected.keys())} other names"
    return f"{max(float((found[k] - t).abs().max()) for k, t in expected.items()):g}"


def table() -> str:
    """All of them in Markdown."""
    rows = [["", *LAYOUTS], ["---"] * (len(LAYOUTS) + 1)]
    rows += [[wrapper, *(outcome(wrapper, layout) for layout in LAYOUTS)] for wrapper in WRAPPERS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
