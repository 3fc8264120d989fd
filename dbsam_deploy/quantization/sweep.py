"""Which layers stay as they are: a sweep over groups of layers, then a greedy choice.

A group is quantised alone to see what it costs, and left out of the whole to see what it saves:
errors interact, so neither is enough. The choice ranks the groups by what they cost alone for their
work, by error and by masks, finds by bisection how many of the first must stay as they are among
all the others, and then tries to put each of them back; every step is measured. Each measurement is
kept in a state file, so that an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from ..cli import say_on_stderr
from ..core.contract import IMAGE
from ..core.errors import AccuracyError, ExportError, InputError
from ..files.atomic import sha256_of, write_atomically
from ..machine.hardware import installed_versions
from ..recipe import Gate, Quantization
from ..sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
from ..verification.parity import cosine
from .held_back import View
from .layers import Layer, is_excluded
from .put_back import put_back
from .qdq import Calibrated, chosen_layers, mac_share, quantize_graph
from .rounding import TextProgress

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "ml-dtypes", "numpy")
"""What can change a measurement, beside the views."""
WIDTH = 3
"""Parts of a module path that make a block: `image_encoder.blocks.0`."""
MARGIN = 0.2
"""Part of the room above a floor of the gate that a choice keeps free: the held-back images are few
and not those that the gate is measured on."""


@dataclass(frozen=True)
class Group:
    """Layers that are quantised together.

    Attributes:
        name: pattern of their module paths.
        layers: how many.
        macs: their work for one image.
    """

    name: str
    layers: int
    macs: int


@dataclass(frozen=True)
class Measured:
    """What one choice of layers costs on the held-back images.

    Attributes:
        cosine: smallest cosine of an image's embedding with the float graph's.
        error: mean relative error of the embeddings, |q - f| / |f|.
        agreement: mean Dice of the masks with the float graph's.
        agreement_p5: 5th percentile of the same.
        dice_drop: mean loss of Dice with the truth, of the objects that have one.
        mac_share: work that is quantised, 0–1.
    """

    cosine: float
    error: float
    agreement: float
    agreement_p5: float
    dice_drop: float
    mac_share: float

    @property
    def loss(self) -> float:
        """1 - agreement."""
        return 1 - self.agreement


Measure = Callable[[tuple[str, ...]], Measured]
"""Patterns that are excluded → what the rest costs."""


@dataclass(frozen=True)
class Ranked:
    """One group of the table: quantised alone, and left out of the whole."""

    group: Group
    alone: Measured
    left_out: Measured


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`.

    Attributes:
        ranked: groups, the costliest first.
        everything: all of them quantised.
        exclude: patterns that the choice leaves out.
        chosen: what the choice costs.
        budget: the loss of Dice that it had to keep to.
    """

    ranked: tuple[Ranked, ...]
    everything: Measured
    exclude: tuple[str, ...]
    chosen: Measured
    budget: float


def groups_of(layers: Iterable[Layer], plan: Quantization) -> tuple[Group, ...]:
    """Groups by block and, within a block, by kind of layer (attention, MLP, convolution).

    Layers that the recipe excludes, or whose weights alone it rounds, are in no group.
    """
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if not is_excluded(layer.module, (*plan.exclude, *plan.weights_only)):
            found.setdefault(group_name(layer.module), []).append(layer)
    return tuple(
        Group(name, len(members), sum(layer.macs for layer in members))
        for name, members in found.items()
    )


def group_name(module: str) -> str:
    """The pattern for a module's group: its path up to the part that holds single layers.

    >>> group_name("image_encoder.blocks.0.mlp.lin1")
    'image_encoder.blocks.0.mlp.*'
    >>> group_name("image_encoder.layers.2.blocks.3.local_conv.c")
    'image_encoder.layers.2.blocks.3.local_conv.*'
    >>> group_name("image_encoder.neck.2")
    'image_encoder.neck.2'
    """
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
    # The last number that something other than one layer's name follows is the block's.
    blocks = [index for index in numbers if index + 2 < len(parts)]
    if blocks:
        return ".".join(parts[: blocks[-1] + 2]) + ".*"
    return module if len(parts) <= WIDTH else ".".join(parts[:WIDTH]) + ".*"


class Judge:
    """Quantises a choice of layers and measures it on held-back views; remembers every answer.

    Args:
        calibrated: the float graph with its ranges.
        plan: the recipe's table.
        views: held-back images, with what the float model makes of them.
        scratch: folder for the graph with everything quantised, and `sweep.json`.
    """

    def __init__(
        self, calibrated: Calibrated, plan: Quantization, views: list[View], scratch: Path
    ) -> None:
        if not views:
            raise InputError("no held-back image to judge by; the recipe's held_back is at least 1")
        if all(view.truth is None for view in views):
            raise InputError(
                f"none of the {len(views)} held-back images has labels, and a budget is a loss of "
                "Dice with the truth: calibrate on npz files with imgs and gts"
            )
        self._calibrated, self._plan, self._views = calibrated, plan, views
        self._whole, self._state = scratch / "everything.onnx", scratch / "sweep.json"
        parts = (
            *(sha256_of(calibrated.path), repr(plan), repr(sorted(calibrated.thresholds.items()))),
            json.dumps(installed_versions(PACKAGES), sort_keys=True),
            *(view.sha256 for view in views),
        )
        self._key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self._known: dict[str, Measured] = self._load()
        self._graphs: tuple[onnx.ModelProto, onnx.ModelProto] | None = None
        self.measured = 0

    def _load(self) -> dict[str, Measured]:
        if not self._state.is_file():
            return {}
        try:
            body = json.loads(self._state.read_text())
            if body["key"] != self._key:
                return {}  # of another graph, recipe or other images
            return {name: Measured(**values) for name, values in body["measured"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            say_on_stderr(f"{self._state} is damaged ({error}); the sweep starts anew")
            return {}

    def __call__(self, exclude: tuple[str, ...]) -> Measured:
        """Measure everything quantised but `exclude`."""
        name = " ".join(sorted(exclude))
        if name not in self._known:
            self._known[name] = self._measure(exclude)
            self.measured += 1
            known = {key: asdict(value) for key, value in self._known.items()}
            with write_atomically(self._state) as stream:
                stream.write(json.dumps({"key": self._key, "measured": known}).encode())
        return self._known[name]

    def _measure(self, exclude: tuple[str, ...]) -> Measured:
        model, share = self._quantize(exclude)
        session = open_session(import_onnxruntime(), model, CPU)
        cosines, errors = [], []
        agreement: list[float] = []
        drops: list[float] = []
        for view in self._views:
            (embedding,) = session.run(None, {IMAGE: view.image})
            cosines.append(cosine(embedding, view.embedding))
            norm = float(np.linalg.norm(view.embedding))
            errors.append(float(np.linalg.norm(embedding - view.embedding)) / norm)
            same, lost = view.judge(embedding)
            agreement += same
            drops += lost
        return Measured(
            min(cosines),
            float(np.mean(errors)),
            float(np.mean(agreement)),
            float(np.percentile(agreement, 5)),
            float(np.mean(drops)),
            share,
        )

    def _quantize(self, exclude: tuple[str, ...]) -> tuple[bytes, float]:
        """The choice's graph, and the part of the work that is quantised in it.

        Everything is quantised once; a choice has the float layers put back, which takes a
        hundredth of the time.
        """
        if self._graphs is None:
            whole = quantize_graph(self._calibrated, self._plan, self._whole).path
            self._graphs = onnx.load(whole), onnx.load(self._calibrated.path)
            whole.unlink()
        chosen = chosen_layers(self._calibrated, self._plan, exclude)
        model = put_back(*self._graphs, self._calibrated.layers, chosen, self._plan.outputs)
        return model.SerializeToString(), mac_share(self._calibrated, self._plan, chosen)


def accepts(found: Measured, budget: float, gate: Gate) -> bool:
    """Whether a choice keeps to the budget, and to the gate's floors with `MARGIN` to spare."""
    floors = (
        (found.cosine, gate.embedding_cosine),
        (found.agreement, gate.mask_agreement_mean),
        (found.agreement_p5, gate.mask_agreement_p5),
    )
    # `all` and `<=` so that a NaN is not accepted
    return found.dice_drop <= budget and all(
        value >= floor + MARGIN * (1 - floor) for value, floor in floors
    )


class _Counted:
    """Measures, and tells progress."""

    def __init__(self, measure: Measure, progress: TextProgress, total: int) -> None:
        self._measure, self._progress = measure, progress
        self._done, self.total = 0, total

    def __call__(self, text: str, exclude: Iterable[str]) -> Measured:
        self._progress(text, self._done, self.total)
        found = self._measure(tuple(exclude))
        self._done += 1
        return found

    def expect(self, more: int) -> None:
        """Say that there are at most so many measurements to come."""
        self.total = self._done + more

    def finish(self) -> None:
        self._progress("done", self._done, self._done)


def sweep(
    groups: tuple[Group, ...],
    measure: Measure,
    accept: Callable[[Measured], bool],
    *,
    budget: float,
    progress: TextProgress = lambda text, done, total: None,
) -> Sweep:
    """Measure each group alone and left out, then choose.

    Args:
        groups: that the choice is made of.
        measure: what a choice costs, see `Judge`.
        accept: whether that is good enough.
        budget: for the result's table.
        progress: called before each measurement and at the end.

    Raises:
        AccuracyError: not even one group alone is good enough.
    """
    names = [group.name for group in groups]
    counted = _Counted(measure, progress, 3 * len(groups) + 2 * (len(names).bit_length() + 1) + 1)
    everything = counted("everything", ())
    ranked = []
    for group in groups:
        alone = counted(f"{group.name} alone", (name for name in names if name != group.name))
        ranked.append(Ranked(group, alone, counted(f"without {group.name}", (group.name,))))
    ranked.sort(key=lambda r: r.alone.error, reverse=True)
    out = _choose(ranked, everything, counted, accept)
    counted.finish()
    return Sweep(tuple(ranked), everything, out, measure(out), budget)


def _choose(
    ranked: list[Ranked],
    everything: Measured,
    counted: _Counted,
    accept: Callable[[Measured], bool],
) -> tuple[str, ...]:
    """Leave out groups until it is good enough, then put back what can be put back."""
    if accept(everything):
        return ()
    macs = {r.group.name: r.group.macs for r in ranked}
    # Squares of errors add up; masks say more of what matters, and less exactly. What leaving a
    # group out saves is no guide: behind one that spoils everything, the others' savings are noise.
    orders = [
        [r.group.name for r in sorted(ranked, key=cost, reverse=True)]
        for cost in (
            lambda r: r.alone.error**2 / max(r.group.macs, 1),
            lambda r: r.alone.loss / max(r.group.macs, 1),
        )
    ]
    steps = len(ranked).bit_length() + 1
    counted.expect(2 * steps + len(ranked))
    found = []
    for number, order in enumerate(orders):
        found.append(_shortest(order, counted, accept))
        counted.expect((1 - number) * steps + len(ranked))
    choices = [choice for choice in found if choice is not None]
    if not choices:
        least = counted(f"only {orders[0][-1]}", orders[0][:-1])
        raise AccuracyError(
            f"not even {orders[0][-1]} alone keeps to the budget and the gate (Dice drop "
            f"{least.dice_drop:.4f}, agreement {least.agreement:.4f}, 5th percentile of agreement "
            f"{least.agreement_p5:.4f}, cosine {least.cosine:.4f}); use another calibrator or "
            "raise the budget"
        )
    out = min(choices, key=lambda choice: sum(macs[name] for name in choice))
    counted.expect(len(out))
    for name in sorted(out, key=lambda name: macs[name], reverse=True):
        fewer = [other for other in out if other != name]
        if accept(counted(f"choosing: {name} again", fewer)):
            out = fewer
    return tuple(out)


def _shortest(
    order: list[str], counted: _Counted, accept: Callable[[Measured], bool]
) -> list[str] | None:
    """How many of the first groups must be left out, by bisection; None if not even one stays."""
    if not accept(counted(f"only {order[-1]}", order[:-1])):
        return None
    refused, accepted = 0, len(order) - 1
    while accepted - refused > 1:
        middle = (refused + accepted) // 2
        if accept(counted(f"choosing: {middle} left out", order[:middle])):
            accepted = middle
        else:
            refused = middle
    return order[:accepted]


def check_groups(groups: tuple[Group, ...]) -> None:
    """Refuse a sweep without a choice.

    Raises:
        ExportError: fewer than two groups.
    """
    if len(groups) < 2:
        raise ExportError(f"{len(groups)} groups of layers: there is nothing to choose between")
