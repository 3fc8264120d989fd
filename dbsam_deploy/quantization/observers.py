"""Ranges of activations: histograms of magnitudes over calibration images → one threshold each.

A symmetric quantiser of b bits maps [-threshold, threshold] to whole numbers and clips the rest.
`max` clips nothing; `percentile` clips a fixed share; `entropy` (Kullback–Leibler divergence, as in
NVIDIA's 8-bit calibration) and `mse` weigh clipping against resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from ..core.errors import EngineError, ExportError, InputError
from ..core.imaging import FloatArray
from ..sessions.onnxruntime_providers import import_onnxruntime

BINS = 2048
LEVELS = 128
"""Magnitudes of a symmetric 8-bit quantiser: 0 to 127."""

Counts = npt.NDArray[np.int64]


@dataclass
class Histogram:
    """Counts of magnitudes in `BINS` equal bins from 0 to `limit`, and each channel's largest.

    `lowest` is the least value, at most 0.
    `limit` doubles when a larger value comes, so that earlier counts are merged, not lost.
    """

    limit: float = 0.0
    lowest: float = 0.0
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    largest: float = 0.0
    channels: FloatArray | None = None

    def add(self, values: FloatArray, *, axis: int) -> None:
        """Count the values of one image.

        Args:
            values: any shape.
            axis: of the channels.

        Raises:
            EngineError: values that are not finite.
        """
        magnitudes = np.abs(values)
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        channels = magnitudes.max(axis=others)
        top = float(channels.max())
        if not np.isfinite(top):
            raise EngineError("an activation is not finite: the float model overflows on an image")
        self.channels = channels if self.channels is None else np.maximum(channels, self.channels)
        self.largest = max(self.largest, top)
        self.lowest = min(self.lowest, float(values.min()))
        if self.limit == 0:
            self.limit = top
        while top > self.limit:
            halves = self.counts.reshape(BINS // 2, 2).sum(1)
            self.counts = np.concatenate([halves, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        if self.limit > 0:
            bins = (magnitudes.ravel() * np.float32(BINS / self.limit)).astype(np.int32)
            self.counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    def threshold(self, calibrator: str, percentile: float) -> float:
        """Where to clip; at most the largest magnitude that was seen.

        Args:
            calibrator: see `recipe.CALIBRATORS`.
            percentile: for `percentile`.

        Raises:
            InputError: an unknown calibrator.
        """
        if self.largest == 0 or calibrator == "max":
            return self.largest
        if calibrator == "percentile":
            found = _percentile(self.counts, percentile)
        elif calibrator == "mse":
            found = _mse(self.counts)
        elif calibrator == "entropy":
            found = _entropy(self.counts)
        else:
            raise InputError(f"calibrator {calibrator!r}: expected max, percentile, entropy or mse")
        return min(found * self.limit / BINS, self.largest)


def _percentile(counts: Counts, percentile: float) -> float:
    """Bins that hold `percentile` % of the values."""
    reached = np.searchsorted(np.cumsum(counts), counts.sum() * percentile / 100)
    return float(min(int(reached) + 1, BINS))


def _mse(counts: Counts) -> float:
    """Bins to keep for the least squared error: rounding inside, clipping outside."""
    centres = np.arange(BINS) + 0.5
    best, least = float(BINS), np.inf
    for kept in np.linspace(BINS / 32, BINS, 125):
        step = kept / (LEVELS - 1)
        rounded = np.minimum(np.round(centres / step) * step, kept)
        # Steps narrower than a bin: what is left of the rounding is spread evenly over it.
        inside = counts * np.where(centres <= kept, max(step**2 / 12 - 1 / 12, 0), 0)
        clipped = counts * np.where(centres > kept, (centres - rounded) ** 2, 0)
        error = float(inside.sum() + clipped.sum())
        if error < least:
            best, least = float(kept), error
    return best


def _entropy(counts: Counts) -> float:
    """Bins to keep for the least Kullback–Leibler divergence from the unclipped distribution."""
    # The first bin holds exact zeros (padding, ReLU), which every quantiser represents.
    weights = counts.astype(np.float64)
    weights[0] = weights[1]
    best, least = float(BINS), np.inf
    for kept in range(LEVELS, BINS + 1, 16):
        clipped = weights[:kept].copy()
        clipped[-1] += weights[kept:].sum()
        divergence = _divergence(clipped, _coarse(weights[:kept]))
        if divergence < least:
            best, least = float(kept), divergence
    return best


def _coarse(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The distribution in `LEVELS` equal groups, spread evenly over each group's filled bins."""
    groups = np.arange(len(weights)) * LEVELS // len(weights)
    filled = weights > 0
    totals = np.bincount(groups, weights, LEVELS)
    sizes = np.maximum(np.bincount(groups, filled, LEVELS), 1)
    return np.where(filled, (totals / sizes)[groups], 0.0)


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    if p.sum() == 0 or q.sum() == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    q = np.maximum(q, 1e-10)
    filled = p > 0
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())


def observe(
    path: Path,
    tensors: dict[str, int],
    feeds: Iterable[dict[str, FloatArray]],
    *,
    watch: Callable[[dict[str, FloatArray]], None] = lambda values: None,
) -> dict[str, Histogram]:
    """Run a graph on images, one at a time, and collect histograms of some of its tensors.

    Args:
        path: graph in standard operators, with shapes.
        tensors: name → axis of its channels.
        feeds: inputs of the graph, one image each.
        watch: called with the tensors of each image.

    Raises:
        ExportError: a tensor that the graph does not have.
        EngineError: values that are not finite.
        InputError: no image.
    """
    runtime = import_onnxruntime()
    model = onnx.load(path)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    if unknown := [name for name in tensors if name not in known]:
        raise ExportError(f"{path.name}: no type is known for {unknown[:4]}")
    inputs = {value.name for value in model.graph.input}
    wanted = [name for name in tensors if name not in inputs]
    if wanted:
        del model.graph.output[:]
        model.graph.output.extend(known[name] for name in wanted)
    options = runtime.SessionOptions()
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    del model
    found = {name: Histogram() for name in tensors}
    images = 0
    for feed in feeds:
        images += 1
        values = dict(zip(wanted, session.run(wanted, feed), strict=True)) if wanted else {}
        for name, axis in tensors.items():
            values[name] = np.asarray(values[name] if name in values else feed[name], np.float32)
            found[name].add(values[name], axis=axis)
        watch(values)
    if not images:
        raise InputError("no calibration image was given")
    return found
