"""Time as a ratio: a subject measured in turns with a fixed reference workload, and the gate on it.

An absolute time on a shared machine says more about its neighbours than about the code. Here every
round times the subject and then the reference, so that both see the same machine; what is stored
and judged is the ratio of the two (docs/adr/002-benchmark-ratios.md). `pytest --benchmark` (root
`conftest.py`) is the only caller of the gate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.extras import require
from dbsam_deploy.machine.hardware import Hardware, installed_versions

ROUNDS = 40
WARM_UP_ROUNDS = 5
TOLERANCE = 0.20
"""Largest accepted growth of a ratio. The largest run-to-run spread measured is in ADR 002."""

BASELINE_FORMAT = 1
RERECORD = "pytest --benchmark --rebaseline"

Workload = Callable[[], object]


RoundTimer = Callable[[Workload, Callable[[], None], int], Sequence[float]]
"""(subject, before each round, rounds) → seconds of the subject's one call in each round."""


@dataclass(frozen=True)
class Measurement:
    """What one benchmark measured.

    Attributes:
        ratio: median over rounds of one subject call / one reference call of the same round.
        median_ms: median time of one call of the subject, milliseconds.
        p95_ms: 95th percentile of the same.
        reference_ms: median time of one call of the reference, milliseconds.
        rounds: number of timed rounds.
        facts: what else belongs in the row, such as precision, batch or mask agreement.
    """

    ratio: float
    median_ms: float
    p95_ms: float
    reference_ms: float
    rounds: int
    facts: dict[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """The committed figures of one kind of hardware, by benchmark name."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    recorded: str
    benchmarks: dict[str, Measurement]


def measure(
    subject: Workload,
    reference: Workload,
    *,
    rounds: int = ROUNDS,
    facts: Mapping[str, str | float] | None = None,
    time_rounds: RoundTimer | None = None,
) -> Measurement:
    """Time `subject` and `reference` in turns.

    Both must return only when their work is done (synchronise a device inside the call). Where the
    subject takes longer, a round repeats the reference until it takes about as long, so that both
    average over the same stretches of a busy machine.

    Args:
        subject: what is measured, one call.
        reference: a fixed workload of like character, see `reference_workload`.
        rounds: timed rounds after the warm-up.
        facts: stored and shown with the figures.
        time_rounds: what times the subject; pytest-benchmark's `pedantic` under `--benchmark`.
    """
    warm = np.array([(_seconds(subject), _seconds(reference)) for _ in range(WARM_UP_ROUNDS)])
    repeats = max(1, round(float(np.median(warm[:, 0] / warm[:, 1]))))
    reference_s: list[float] = []

    def before_round() -> None:
        reference_s.append(_seconds(reference, repeats))

    subject_s = (time_rounds or _time_rounds)(subject, before_round, rounds)
    subject_ms, reference_ms = np.array(subject_s) * 1e3, np.array(reference_s) * 1e3
    return Measurement(
        ratio=float(np.median(subject_ms / reference_ms)),
        median_ms=float(np.median(subject_ms)),
        p95_ms=float(np.percentile(subject_ms, 95)),
        reference_ms=float(np.median(reference_ms)),
        rounds=rounds,
        facts=dict(facts or {}),
    )


def _time_rounds(subject: Workload, before_round: Callable[[], None], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        before_round()
        seconds.append(_seconds(subject))
    return seconds


def _seconds(work: Workload, calls: int = 1) -> float:
    """Mean time of one of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def reference_workload(threads: int = 1) -> Workload:
    """A fixed ONNX Runtime CPU graph: 3×3 convolution, LayerNorm, attention, MLP.

    Its weights and input come from a fixed seed. Changing it in any way makes every baseline void.

    Raises:
        EngineError: onnxruntime is missing.
    """
    onnxruntime = require("onnxruntime", extra="cpu", what_for="a benchmark")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        reference_graph(), options, providers=["CPUExecutionProvider"]
    )
    feed = reference_feed()
    return lambda: session.run(None, feed)


def reference_feed() -> dict[str, npt.NDArray[np.float32]]:
    """The reference graph's input: `x` (1, 64, 48, 48) float32, always the same."""
    return {"x": np.random.default_rng(2).standard_normal((1, 64, 48, 48), np.float32)}


# One node a line: operator, inputs, output, attributes.
_REFERENCE_NODES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Conv", "x conv_w", "conv", {"pads": [1, 1, 1, 1]}),
    ("Reshape", "conv tokens", "t0", {}),
    ("LayerNormalization", "t0 scale", "t1", {}),
    ("MatMul", "t1 qkv_w", "qkv0", {}),
    ("Reshape", "qkv0 heads", "qkv1", {}),
    ("Transpose", "qkv1", "qkv2", {"perm": [1, 2, 0, 3]}),
    ("Split", "qkv2", "q k v", {"axis": 0, "num_outputs": 3}),
    ("Transpose", "k", "kt", {"perm": [0, 1, 3, 2]}),
    ("MatMul", "q kt", "scores", {}),
    ("Softmax", "scores", "weights", {"axis": -1}),
    ("MatMul", "weights v", "a0", {}),
    ("Squeeze", "a0", "a1", {}),
    ("Transpose", "a1", "a2", {"perm": [1, 0, 2]}),
    ("Reshape", "a2 tokens", "a3", {}),
    ("MatMul", "a3 up_w", "m0", {}),
    ("Erf", "m0", "m1", {}),
    ("MatMul", "m1 down_w", "y", {}),
)
_REFERENCE_WEIGHTS = {
    "conv_w": (64, 64, 3, 3),
    "scale": (256,),
    "qkv_w": (256, 768),
    "up_w": (256, 1024),
    "down_w": (1024, 256),
}
_REFERENCE_SHAPES = {"tokens": (576, 256), "heads": (576, 3, 8, 32)}


def reference_graph() -> bytes:
    """The reference as ONNX: conv (64 channels, 48×48) → 8 heads over 576 tokens → MLP → `y`."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(1)
    constants = [
        numpy_helper.from_array(0.05 * random.standard_normal(shape, np.float32), name)
        for name, shape in _REFERENCE_WEIGHTS.items()
    ]
    constants += [
        numpy_helper.from_array(np.array(sizes, np.int64), name)
        for name, sizes in _REFERENCE_SHAPES.items()
    ]
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs.split(), outputs.split(), **attributes)
            for op, inputs, outputs, attributes in _REFERENCE_NODES
        ],
        "reference",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 48, 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [576, 256])],
        initializer=constants,
    )
    opset = [helper.make_opsetid("", 18)]
    model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    return model


def judge(
    measured: Mapping[str, Measurement], baseline: Baseline, *, tolerance: float = TOLERANCE
) -> list[str]:
    """Compare a run with its baseline; one line for each reason to fail, none when it passes.

    A benchmark that the baseline does not know, and one that it knows but that did not run, are
    reasons to fail: a renamed benchmark is both.
    """
    problems = []
    for name, now in measured.items():
        old = baseline.benchmarks.get(name)
        if old is None:
            problems.append(f"{name}: not in the baseline; record it with `{RERECORD}`")
        elif not now.ratio <= old.ratio * (1 + tolerance):  # NaN fails too
            problems.append(
                f"{name}: {now.ratio:.3f} × the reference workload, baseline {old.ratio:.3f} × "
                f"({now.ratio / old.ratio - 1:+.0%}, at most {tolerance:+.0%} is accepted)"
            )
    problems += [
        f"{name}: in the baseline but it did not run to its end; run every benchmark, or record "
        f"the new set with `{RERECORD}`"
        for name in baseline.benchmarks
        if name not in measured
    ]
    return problems


def version_changes(baseline: Baseline) -> list[str]:
    """Package versions that differ from the baseline's, for the reader of a changed ratio."""
    now = installed_versions()
    return [
        f"{name} {baseline.versions.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted(now.keys() | baseline.versions.keys())
        if now.get(name) != baseline.versions.get(name)
    ]


def baseline_path(folder: Path, hardware: Hardware) -> Path:
    """File of this hardware's baseline in `folder`."""
    return folder / f"{hardware.key}.json"


def write_baseline(path: Path, hardware: Hardware, measured: Mapping[str, Measurement]) -> Path:
    """Record `measured` as the baseline, replacing the file.

    Raises:
        InputError: nothing was measured.
    """
    if not measured:
        raise InputError(f"no benchmark ran to its end: {path} is left as it was")
    body = {
        "format": BASELINE_FORMAT,
        "hardware": asdict(hardware),
        "versions": installed_versions(),
        "recorded": datetime.now(UTC).date().isoformat(),
        "benchmarks": {name: _rounded(measured[name]) for name in sorted(measured)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
    return path


def _rounded(measurement: Measurement) -> dict[str, Any]:
    """Four significant digits: more would only be noise in the diff."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in asdict(measurement).items()
    }


def read_baseline(path: Path) -> Baseline:
    """Read a recorded baseline.

    Raises:
        InputError: no such file, or one that is not a baseline of this format.
    """
    if not path.is_file():
        raise InputError(
            f"no baseline for this hardware ({path}): run `{RERECORD}` and commit the file"
        )
    try:
        body = json.loads(path.read_text())
        if body.pop("format") != BASELINE_FORMAT:
            raise ValueError("another format")
        benchmarks = {name: Measurement(**row) for name, row in body.pop("benchmarks").items()}
        if not all(row.ratio > 0 for row in benchmarks.values()):
            raise ValueError("a ratio is not positive")
        return Baseline(benchmarks=benchmarks, **body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a baseline ({error}): run `{RERECORD}`") from error


def table(measured: Mapping[str, Measurement], baseline: Baseline | None) -> list[str]:
    """Lines of the closing table: p50, p95, throughput, ratio, change, and each row's facts."""
    columns = ("benchmark", "p50 ms", "p95 ms", "calls/s", "ratio", "baseline", "change", "facts")
    rows: list[Sequence[str]] = [columns]
    for name, now in measured.items():
        old = baseline.benchmarks.get(name) if baseline else None
        facts = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in now.facts.items()
        )
        rows.append(
            (
                name,
                f"{now.median_ms:.2f}",
                f"{now.p95_ms:.2f}",
                f"{1e3 / now.median_ms:.1f}",
                f"{now.ratio:.3f}",
                f"{old.ratio:.3f}" if old else "–",
                f"{now.ratio / old.ratio - 1:+.0%}" if old else "–",
                facts,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) - 1)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 7)), row[7]]
        )
        for row in rows
    ]
