"""Where in a file the model is: found by its own keys, whatever they are wrapped in.

A checkpoint is a tree of tables with tensors at its ends. The name of a tensor is the way to it,
joined by dots, which looks the same whether a table, a module or a compiler put a part in front:
`state_dict` → `model.image_encoder.pos_embed` is `state_dict.model.image_encoder.pos_embed`. What
comes before the model's own parts is its prefix, and each prefix in a file is one model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from .pickles import Items, OddTensor, StoredTensor

PARTS = frozenset(
    {"image_encoder", "prompt_encoder", "mask_decoder"}
    | {"vision_encoder", "shared_image_embedding"}  # as transformers calls them
    | {"sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}  # as SAM 2 does
    | {"no_memory_embedding"}  # and both
)
"""First word of the model's own keys."""
TRANSPARENT = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Words that data-parallel, compiled, sharded and checkpointed modules put anywhere in a key."""
HARMLESS = re.compile(r"pixel_mean|pixel_std|n_averaged|.*(loss|criterion|metric).*")
"""Tensors beside the model's own that are no part of it."""
_UNUSED = re.compile(
    r"image_encoder\.(norm_head|head)\.(weight|bias)"
    r"|(sam_)?mask_decoder\.pred_obj_score_head\..*"
)
"""The classifier with which MobileSAM's encoder was trained beforehand; its `forward` has none. And
what tells SAM 2 whether an object is still in a film."""
_OF_FILMS = re.compile(
    r"memory_attention|memory_encoder|maskmem_tpos_enc|mask_downsample"
    r"|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial|obj_ptr_proj|obj_ptr_tpos_proj"
    r"|memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer"
    r"|object_pointer_proj|temporal_positional_encoding_projection_layer"
    r"|occlusion_spatial_embedding_parameter"
)
"""Parts of SAM 2 that remember earlier frames, which an image alone does not have."""
_SCORE = re.compile(r"(\bpred_obj_score_head)\..*")
MAX_NESTING = 12
"""Deepest table that is looked into."""
MAX_MODELS = 100
"""Most models of one file."""
MAX_NAME = 200
"""Longest name that is shown."""
NAMED_AT_MOST = 8
"""How many names a note or an error lists."""

_ENCODERS = re.compile(
    r"image_encoder\.(trunk\.)?patch_embed\.(proj\.weight|seq\.0\.c\.weight)"
    r"|image_encoder\.backbone\.stages\.0\.op_list\.0\.conv\.weight"
    r"|vision_encoder\.(backbone\.)?patch_embed\.projection\.weight"
)
_AVERAGE = frozenset({"ema", "swa", "avg", "average", "averaged"})

AnyTensor = StoredTensor | OddTensor


@dataclass(frozen=True)
class FoundTensor:
    """One tensor of a file: the `way` to it through the tables, and how it is described."""

    way: tuple[Any, ...]
    tensor: AnyTensor


@dataclass(frozen=True)
class Candidate:
    """One model of a file.

    Attributes:
        prefix: what comes before its own keys, without the last dot.
        tensors: own key → tensor.
    """

    prefix: str
    tensors: dict[str, FoundTensor]

    @property
    def is_average(self) -> bool:
        """Whether the prefix says that these are moving averages of the weights."""
        words = {word for part in self.prefix.split(".") for word in part.split("_")}
        return bool(words & _AVERAGE)

    @property
    def has_encoder(self) -> bool:
        """Whether an image encoder is among it."""
        return any(_ENCODERS.fullmatch(key) for key in self.tensors)

    @property
    def label(self) -> str:
        """The prefix, for a sentence."""
        return self.prefix or "the file itself"


def flatten(content: Any) -> dict[str, FoundTensor]:
    """Every tensor of a file by its name, each table once.

    Raises:
        ValueError: two tensors with one name.
    """
    found: dict[str, FoundTensor] = {}
    for one in _ends(content, (), set()):
        name = _joined(one.way)
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = one
    return found


def _joined(way: tuple[Any, ...]) -> str:
    """The name of what is at the end of a way."""
    return _shown(".".join(str(word)[:MAX_NAME] for word in way))


def _shown(name: object) -> str:
    """A name from a file as a terminal can show it."""
    text = str(name)[:MAX_NAME]
    if text.isprintable():  # nearly always
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def _ends(node: Any, way: tuple[Any, ...], seen: set[int]) -> Iterator[FoundTensor]:
    if isinstance(node, StoredTensor | OddTensor):
        if way:
            yield FoundTensor(way, node)
        return
    if not isinstance(node, dict | list | Items) or id(node) in seen or len(way) > MAX_NESTING:
        return
    seen.add(id(node))
    if isinstance(node, dict):
        pairs = list(node.items())
    else:
        pairs = list(enumerate(node.items if isinstance(node, Items) else node))
    for name, value in pairs:
        yield from _ends(value, (*way, name), seen)


def find_models(found: Mapping[str, FoundTensor]) -> list[Candidate]:
    """The models of a file, in its order; equal ones, such as two names of one module, once.

    Raises:
        ValueError: a tensor that a model has twice, under names that only differ in wrappers; too
            many models.
    """
    models: dict[str, dict[str, FoundTensor]] = {}
    for name, one in found.items():
        words = name.split(".")
        at = max((i for i, word in enumerate(words) if word in PARTS), default=None)
        if at is None:
            continue
        own = ".".join(word for word in words[at:] if word not in TRANSPARENT)
        if _UNUSED.fullmatch(own):
            continue
        model = models.setdefault(".".join(words[:at]), {})
        if own in model and model[own].tensor != one.tensor:
            raise ValueError(f"{own} is there twice, once as {name}")
        model.setdefault(own, one)
    candidates = [Candidate(prefix, tensors) for prefix, tensors in models.items()]
    if len(candidates) > MAX_MODELS:
        raise ValueError(f"{len(candidates)} models in it; expected at most {MAX_MODELS}")
    with_encoder = [model for model in candidates if model.has_encoder]
    distinct: list[Candidate] = []
    for candidate in with_encoder or candidates:
        if not any(_same(candidate, other) for other in distinct):
            distinct.append(candidate)
    return [_with_siblings(model, found) for model in distinct] or _plain_tables(found)


def _same(one: Candidate, other: Candidate) -> bool:
    """Whether two models are the same numbers in the file."""
    return {k: v.tensor for k, v in one.tensors.items()} == {
        k: v.tensor for k, v in other.tensors.items()
    }


def _with_siblings(model: Candidate, found: Mapping[str, FoundTensor]) -> Candidate:
    """The model with all else of its own module: what does not belong there shall be refused."""
    start = f"{model.prefix}." if model.prefix else ""
    tables = {one.way[:-1] for one in model.tensors.values()}
    own = {one.way for one in model.tensors.values()}
    more = {}
    for name, one in found.items():
        if name.startswith(start) and one.way[:-1] in tables and one.way not in own:
            key = name.removeprefix(start)
            words = key.split(".")
            left_out = HARMLESS.fullmatch(words[0]) or _OF_FILMS.fullmatch(words[0])
            if PARTS.isdisjoint(words) and not left_out:
                more[key] = one
    return Candidate(model.prefix, {**model.tensors, **more})


def _plain_tables(found: Mapping[str, FoundTensor]) -> list[Candidate]:
    """The largest table of tensors of a file without a model that we know."""
    tables: dict[tuple[Any, ...], dict[str, FoundTensor]] = {}
    for one in found.values():
        key = _shown(one.way[-1]).removeprefix("module.")
        tables.setdefault(one.way[:-1], {})[key] = one
    largest = max(tables.items(), key=lambda pair: len(pair[1]), default=None)
    return [Candidate(_joined(largest[0]), largest[1])] if largest else []


def choose_model(
    models: list[Candidate], weights: str | None, key: str | None, *, swapped: bool
) -> tuple[Candidate, str]:
    """One model of a file, and a note where there are others.

    Args:
        models: of `find_models`, one at least.
        weights: `ema` for the moving average, `model` for the weights themselves; None: what the
            file's writer would load.
        key: prefix of the model, or the last words of it.
        swapped: see `is_swapped`.

    Raises:
        InputError: none or several fit; the message is to be completed with the file's name.
    """
    if key is not None:
        fitting = [model for model in models if _fits(model.prefix, key)]
        fitting = [model for model in fitting if model.prefix == key] or fitting
        if len(fitting) != 1:
            what = f"--key {key} fits {len(fitting)} of the {len(models)} models in it"
            raise InputError(what, *_rows(models))
        return fitting[0], ""
    kinds, default = _kinds(models, swapped)
    kind = weights or default
    if kind not in kinds:
        only = kinds[default].label
        raise InputError(f"--weights {kind}: it has one model only, {only}; drop --weights")
    if len(kinds) == 1:
        return kinds[kind], ""
    other = "ema" if kind == "model" else "model"
    return kinds[kind], (
        f"{_WORDS[kind]} ({kinds[kind].label}); --weights {other} takes {_WORDS[other]} "
        f"({kinds[other].label})"
    )


_WORDS = {"model": "the weights themselves", "ema": "the moving average of the weights"}
_UNAVERAGED = ("ema_state_dict", "current_model_state")


def is_swapped(content: Any) -> bool:
    """Whether the average stands in `state_dict`, as MMEngine and Lightning write it.

    The weights themselves are then in `ema_state_dict` or `current_model_state`.
    """
    if not isinstance(content, dict):
        return False
    mmengine = "ema_state_dict" in content and ("message_hub" in content or "meta" in content)
    return mmengine or ("current_model_state" in content and "averaging_state" in content)


def _kinds(models: list[Candidate], swapped: bool) -> tuple[dict[str, Candidate], str]:
    """`model` and `ema` → the models of a file that they are, and which one is the default.

    Raises:
        InputError: several models of one kind.
    """
    if swapped and len(models) == 2:
        first, second = models
        plain, average = (
            (first, second) if first.prefix.startswith(_UNAVERAGED) else (second, first)
        )
        return {"model": plain, "ema": average}, "ema"
    averages = [model for model in models if model.is_average]
    others = [model for model in models if not model.is_average]
    if len(averages) > 1 or len(others) > 1:
        raise InputError(f"{len(models)} models in it: name one with --key", *_rows(models))
    kinds = {name: found[0] for name, found in (("model", others), ("ema", averages)) if found}
    return kinds, next(iter(kinds))


def _fits(prefix: str, key: str) -> bool:
    words, wanted = prefix.split("."), key.strip(".").split(".")
    return words[-len(wanted) :] == wanted


def _rows(models: list[Candidate]) -> list[str]:
    width = max(len(model.label) for model in models)
    return [f"{model.label:{width}}  {about(model.tensors)}" for model in models]


def about(tensors: Mapping[str, FoundTensor]) -> str:
    """How many tensors and numbers, and of which types: `314 tensors, 93.7 M, float32`."""
    stored = [one.tensor for one in tensors.values() if isinstance(one.tensor, StoredTensor)]
    count = 0
    for tensor in stored:
        size = 1
        for side in tensor.shape:
            size *= side
        count += size
    types = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in stored)
    return f"{len(tensors)} tensors, {count / 1e6:.1f} M numbers, {', '.join(types)}"


def ignored(content: Any, found: Mapping[str, FoundTensor], model: Candidate) -> list[str]:
    """What of a file is no part of the chosen model, by the names of its tables and tensors."""
    own = {one.way for one in model.tensors.values()}
    ways = {way[: length + 1] for way in own for length in range(len(way))}
    names = list(content) if isinstance(content, dict) else []
    left = [_shown(name) for name in names if (name,) not in ways]
    start = model.prefix.split(".") if model.prefix else []
    for name, one in found.items():
        if one.way in own or one.way[:1] not in ways:
            continue
        words = name.split(".")
        same = next(
            (i for i, (a, b) in enumerate(zip(words, start, strict=False)) if a != b),
            min(len(words), len(start)),
        )
        label = ".".join(words[: same + 1 + (words[same] in PARTS)])
        left.append(label)
    return list(dict.fromkeys(_part_of_films(name) for name in left))


def _part_of_films(name: str) -> str:
    """The part that a key of a flat table belongs to, for SAM 2's; other names as they are."""
    first = name.split(".")[0]
    return first if _OF_FILMS.fullmatch(first) else _SCORE.sub(r"\1", name)


def shortened(names: list[str]) -> str:
    """A list of names for a sentence."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
