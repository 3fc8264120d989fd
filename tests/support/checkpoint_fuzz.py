"""Damages the description of a model, not its bytes, and says what a reader may make of it.

A model in each known layout, with small tensors of distinct numbers. A change is one thing that a
writer gets wrong: a key is missing, renamed or there twice; a tensor has another shape, type or
value; something else lies beside it. What every key must hold afterwards is known without reading:
a file is loaded with exactly that, or refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.efficient_vit_reference import CONFIGS
from support.sam2_references import SMALL as SMALL_SAM2
from support.wrapper_cases import LAYOUTS, keys_of
from torch import Tensor

from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.config import ModelConfig, TinyVitConfig
from dbsam_deploy.model.layouts import own_names
from dbsam_deploy.model.shapes import shapes_of

State = dict[Any, Any]
VARIANT_OF = {
    **LAYOUTS,
    "SAM 2": "sam2_hiera_tiny",
    "Sam2Model": "sam2_hiera_tiny",
    "SamModel": "sam_vit_b",
}
"""Layout → the variant that its file is."""
VIT: dict[str, Any] = {"embed_dim": 8, "num_heads": 2, "depth": 4, "image_size": 64}
_TINY = {"embed_dims": (4, 4, 8, 8), "depths": (1,) * 4, "num_heads": (0, 1, 2, 2)}


def thin_variants() -> dict[str, ModelConfig]:
    """Every variant that a layout stands for, with few numbers."""
    db_sam = VARIANTS["db_sam"]
    adapter: Any = db_sam.adapter
    thin = replace(adapter, stem_channels=(4, 4), num_heads=2, fusion_reduction=2)
    tiny = TinyVitConfig(**_TINY)
    return {
        "db_sam": replace(db_sam, adapter=thin, **VIT),
        **{name: replace(VARIANTS[name], **VIT) for name in ("sam_vit_b", "sam_med2d")},
        "lite_medsam": replace(VARIANTS["lite_medsam"], tiny_vit=tiny, image_size=64),
        "mobile_sam": replace(
            VARIANTS["mobile_sam"], tiny_vit=replace(tiny, patch_stride=2), image_size=128
        ),
        "efficientvit_sam_l0": replace(
            VARIANTS["efficientvit_sam_l0"], **CONFIGS["efficientvit_sam_l0"]
        ),
        "sam2_hiera_tiny": SMALL_SAM2,
    }


class Described:
    """Names and shapes of a variant in place of the model: nothing of it is computed.

    Wide tensors of the decoder and the neck are narrow here, which no rule of loading looks at.
    """

    def __init__(self, name: str, image_size: int | None = None, fusion: Any = None) -> None:
        size = {"image_size": image_size} if image_size else {}
        self.config = replace(VARIANTS[name], **size)
        self.tensors = dict(narrow_shapes(name, image_size=image_size, fusion=fusion))

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors."""
        return self.tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], strict: bool) -> None:
        """Take them, as `torch.nn.Module` does: in its own types."""
        if not strict or tensors.keys() != self.tensors.keys():
            raise RuntimeError("other keys than the model's")
        self.tensors = {
            name: torch.empty_like(own).copy_(tensors[name]) for name, own in self.tensors.items()
        }

    def eval(self) -> Described:
        """Itself."""
        return self

    def set_decoder_norm_eps(self, eps: float) -> None:
        """What a layout may ask for."""


@cache
def narrow_shapes(
    name: str, *, image_size: int | None = None, fusion: Any = None
) -> dict[str, Tensor]:
    """Zeros of the shapes that `Described` has."""
    made = {}
    for key, tensor in shapes_of(name, image_size=image_size, fusion=fusion).items():
        wide = not key.startswith("image_encoder.") or ".neck." in key
        shape = [min(side, 6) if wide else side for side in tensor.shape]
        made[key] = torch.zeros(shape, dtype=tensor.dtype)
    return made


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a name's own."""
    start = zlib.crc32(name.encode()) % 9973
    count = math.prod(shape)
    return ((torch.arange(count) * 7 + start) % 9973 / 1024).reshape(shape)


@dataclass
class Case:
    """A file's content, and what must come of it.

    Attributes:
        layout: of `LAYOUTS`.
        state: file's key → tensor.
        expected: own key → what the model must then hold; None where loading must be refused.
        own_of: file's key → own key.
        must_refuse: changes that no reader may take, for the report.
    """

    layout: str
    state: State
    expected: dict[str, Tensor | None]
    own_of: dict[str, str]
    must_refuse: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    def change(self, name: str, key: int, pick: int) -> None:
        """Make one of `CHANGES`, of a key that none was made of."""
        left = self.left
        chosen = left[key % len(left)]
        self.touched.add(chosen)
        CHANGES[name](self, chosen, pick)

    @property
    def left(self) -> list[str]:
        """The file's keys of the model that are as they were."""
        return [name for name in self.own_of if name not in self.touched]


@cache
def _good(layout: str) -> tuple[State, dict[str, Tensor], dict[str, str]]:
    wanted = narrow_shapes(VARIANT_OF[layout])
    names = {name: next(iter(own_names({name: torch.empty(())}))) for name in keys_of(layout)}
    if layout in ("SamModel", "Sam2Model", "SAM 2"):  # the layout is told by all names together
        names = {name: _own_alone(name, layout) for name in keys_of(layout)}
    if layout == "Sam2Model":  # where the small model halves its maps, the list's has no layer
        halving = "vision_encoder.backbone.blocks.6.proj."
        names |= {halving + word: _own_alone(halving + word, layout) for word in ("weight", "bias")}
    expected = {
        name: numbers(name, tuple(t.shape)) if t.is_floating_point() else t.clone()
        for name, t in wanted.items()
    }
    state: State = {}
    for name, own in names.items():
        if own in expected:
            state[name] = expected[own].clone()
        elif own == "prompt_encoder.point_embeddings.weight":
            rows = [f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]
            state[name] = torch.cat([expected[row] for row in rows])
    return state, expected, {name: names[name] for name in state}


def _own_alone(name: str, layout: str) -> str:
    from dbsam_deploy.model import layouts

    table = {
        "SamModel": layouts.HUGGING_FACE,
        "Sam2Model": layouts.HUGGING_FACE_2,
        "SAM 2": layouts.SAM2,
    }
    return layouts.own_name(name, table[layout])


def good_case(layout: str) -> Case:
    """A file as it should be."""
    state, expected, own_of = _good(layout)
    copies = {name: tensor.clone() for name, tensor in state.items()}
    return Case(layout, copies, dict(expected), dict(own_of))


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _miss(case: Case, key: str) -> None:
    """The key's tensor is not in the file any more."""
    own = case.own_of[key]
    others = [k for k, v in case.own_of.items() if v == own and k != key and k in case.state]
    if _is_counter(own) or others:  # counts from 0, or is there under another name too
        return
    case.expected[own] = None
    case.must_refuse.append(f"{key} is missing")


def drop(case: Case, key: str, _: int) -> None:
    """A key is not there."""
    case.state.pop(key, None)
    _miss(case, key)


def rename(case: Case, key: str, pick: int) -> None:
    """A key has another word in it."""
    words = key.split(".")
    words[pick % len(words)] += ("x", "1", ".", "_")[pick % 4]
    if key in case.state:
        case.state[".".join(words)] = case.state.pop(key)
        _miss(case, key)


def add(case: Case, _: str, pick: int) -> None:
    """Something that no model has."""
    case.state[EXTRAS[pick % len(EXTRAS)]] = torch.ones(2)


EXTRAS = (
    *("image_encoder.extra", "mask_decoder.transformer.extra", "extra.weight", "w_a_000", "w_b_x"),
    *("image_encoder.backbone.stages.9.op_list.0.x", "image_encoder.trunk.blocks.40.x"),
    *("image_encoder.blocks.0.attn.qkv.linear_a_q.weight", "image_encoder.adapter.x"),
    *("image_encoder.blocks.0.mlp.lin1.lora_A.default.weight", "vision_encoder.layers.9.x"),
    *("optimizer.image_encoder.pos_embed", "image_encoder.patch_embed.seq.9.c.weight"),
    *("image_encoder.blocks.0.mlp.adapter.norm.weight", "prompt_encoder.point_embed.weight"),
    *("pixel_mean", "n_averaged", "loss.weight", "image_encoder.module.neck.9.weight"),
)


def twice(case: Case, key: str, pick: int) -> None:
    """A tensor a second time, under a name that means the same, with other numbers."""
    tensor = case.state.get(key)
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.is_complex():
        return
    own = case.own_of[key]
    head, _, rest = key.partition(".")
    names = [f"{head}.module.{rest}", f"{head}._orig_mod.{rest}", own]
    if ".mlp.adapter." in own:
        names.append(own.replace(".mlp.adapter.", ".Adapter."))
    name = names[pick % len(names)]
    if name != key and name not in case.state:
        case.state[name] = torch.zeros_like(tensor) + 77
        case.must_refuse.append(f"{key} is there as {name} too")


def reshape(case: Case, key: str, pick: int) -> None:
    """A tensor has another shape."""
    tensor = case.state.get(key)
    if not isinstance(tensor, Tensor) or _is_size(case.own_of[key]):
        return
    shape = tuple(tensor.shape)
    other = [
        lambda: tensor[..., None, None],
        lambda: tensor[None],
        lambda: tensor.flatten()[:0],
        lambda: tensor.flatten()[0].clone() if tensor.numel() else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.transpose(0, -1).contiguous() if tensor.dim() > 1 else tensor[None, None],
        lambda: tensor[:-1] if tensor.dim() else tensor[None],
        lambda: tensor.reshape(1, *shape, 1),
        lambda: tensor[..., 0, 0] if tensor.dim() == 4 else tensor[..., None],
    ][pick % 10]()
    case.state[key] = other
    after = tuple(other.shape)
    if after == shape:
        if pick % 10 == 6:  # square: another tensor of the same shape, which nobody can tell
            _hold(case, key, other)
        return
    if after == (*shape, 1, 1) or (*after, 1, 1) == shape:
        return
    case.must_refuse.append(f"{key} is {after}, not {shape}")


def _is_size(own: str) -> bool:
    """Whether a table's shape tells the image size that the model was trained at."""
    return "pos_embed" in own or ".rel_pos_" in own


def _hold(case: Case, key: str, tensor: Tensor) -> None:
    own = case.own_of[key]
    if own in case.expected and case.expected[own] is not None:
        case.expected[own] = tensor.to(torch.float32)
    elif own.startswith("prompt_encoder.point_embeddings"):
        for i in range(4):
            case.expected[f"prompt_encoder.point_embeddings.{i}.weight"] = tensor[i : i + 1].float()


TYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.uint16),
)


def retype(case: Case, key: str, pick: int) -> None:
    """A tensor of another type."""
    tensor, dtype = case.state.get(key), TYPES[pick % len(TYPES)]
    if not isinstance(tensor, Tensor) or tensor.is_complex() or _is_counter(case.own_of[key]):
        return
    case.state[key] = tensor.to(dtype)
    if dtype.is_floating_point and dtype.itemsize > 1 and tensor.is_floating_point():
        _hold(case, key, case.state[key])
    else:
        case.must_refuse.append(f"{key} is {dtype}")


def poison(case: Case, key: str, pick: int) -> None:
    """A number that is none."""
    tensor = case.state.get(key)
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
        bad = tensor.double() if pick % 4 == 3 else tensor.float().clone()
        bad.view(-1)[pick % tensor.numel()] = (math.nan, math.inf, -math.inf, 1e300)[pick % 4]
        case.state[key] = bad
        case.must_refuse.append(f"{key} holds no number")


def swap(case: Case, key: str, pick: int) -> None:
    """Two tensors under each other's names."""
    other = case.left[pick % len(case.left)]
    case.touched.add(other)
    first, second = case.state.get(key), case.state.get(other)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or key == other:
        return
    if _is_size(case.own_of[key]) or _is_size(case.own_of[other]):
        return
    if any("point_embed" in name or "positional" in name for name in (key, other)):
        return
    squeezed = [tuple(one.shape) for one in (first, second)]
    if squeezed[0] == squeezed[1] and first.dtype == second.dtype:
        case.state[key], case.state[other] = second, first
        _hold(case, key, second)
        _hold(case, other, first)


def alias(case: Case, key: str, pick: int) -> None:
    """One tensor's numbers under two names, strided, or spread over a larger shape."""
    tensor = case.state.get(key)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return
    if pick % 2:
        wide = torch.stack([tensor.float(), tensor.float()], -1)
        case.state[key] = wide[..., 0]
    else:
        case.state[key] = tensor.float().flatten()[0].expand(tensor.shape)
        if not _is_size(case.own_of[key]) and "positional" not in key:
            _hold(case, key, case.state[key].clone())
        else:
            case.expected.pop(case.own_of[key], None)


def no_tensor(case: Case, key: str, pick: int) -> None:
    """Something else under a tensor's name."""
    if key in case.state:
        case.state[key] = [None, "text", 3.0, [], {}, {"a": torch.ones(2)}, b"x", (1, 2)][pick % 8]
        _miss(case, key)


def odd_key(case: Case, _: str, pick: int) -> None:
    """A key that is no text."""
    case.state[[3, None, (1, "a"), True, 2.5, ""][pick % 6]] = torch.ones(2)


CHANGES: dict[str, Callable[[Case, str, int], None]] = {
    change.__name__: change
    for change in (
        *(drop, rename, add, twice, reshape, retype, poison, swap, alias, no_tensor, odd_key),
    )
}

WRAPPERS: tuple[Callable[[State], Any], ...] = (
    lambda state: state,
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {f"net._orig_mod.{k}": v for k, v in state.items()},
    lambda state: [state, {"lr": 0.1}],
)


def write(case: Case, path: Path, wrapper: int) -> None:
    """The case as a file of PyTorch."""
    torch.save(WRAPPERS[wrapper % len(WRAPPERS)](case.state), path)
