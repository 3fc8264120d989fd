"""Runtimes that were tried on an export, on this machine: their gate, their times, the choice.

`verification.runtimes` measures; whoever opens an export reads the record. It lies beside the
export, or in this user's cache where nobody may write there, under a name with all that it depends
on. Another processor, runtime or export has another record.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..artefact import TRIALS, Artefact
from ..core.contract import Geometry, graph_specs
from ..core.errors import CacheError, EngineError, InputError
from ..files.inputs import code_digest, key_of
from ..files.manifests import Body, ManifestKind
from ..files.private import cache_folder, private_folder
from ..machine.hardware import cpuinfo, describe_hardware, installed_versions, processor
from ..recipe import load_recipe

MARGIN = 0.1
"""Of what a gate lets be lost, a runtime leaves this share: the images are few, and what is at the
floor on these is below it on others."""
MISSES = "misses its gate"
"""How the verdict on a runtime begins that was held against PyTorch and may not be chosen."""
OUT_OF_TIME = "not tried: out of time"
"""The verdict on a runtime that a trial of a few seconds left alone; nothing is known of it."""
_CODE = ("sessions.onnxruntime_session", "sessions.openvino_session")
"""What runs a graph, with all that these modules import."""
_DECIDING = ("dbsam-deploy", "numpy", "onnxruntime", "openvino")
_KIND = ManifestKind(
    "a record of tried runtimes",
    "delete it, and try again with `python -m dbsam_deploy.doctor --artefact DIR`",
    InputError,
    version=1,
)


@dataclass(frozen=True)
class Trial:
    """One runtime on one export.

    Attributes:
        backend: its name.
        runtime_precision: see `ModelOptions`; None for a runtime without a choice.
        passes: whether it may be chosen.
        verdict: why, in words.
        lowered: graphs in bfloat16 that may be used.
        encoder_ms: one image; 0 where nothing was timed, as the following.
        box_ms: one box on a known image, without its mask in the image's size.
        eight_ms: eight boxes.
    """

    backend: str
    runtime_precision: str | None
    passes: bool
    verdict: str
    lowered: tuple[str, ...] = ()
    encoder_ms: float = 0.0
    box_ms: float = 0.0
    eight_ms: float = 0.0

    @property
    def name(self) -> str:
        """As a user would say it."""
        precision = self.runtime_precision
        return self.backend if precision is None else f"{self.backend}, {precision}"

    @property
    def missed(self) -> bool:
        """Whether it was held against PyTorch, and is too far from it."""
        return not self.passes and self.verdict.startswith(MISSES)

    @property
    def total_ms(self) -> float:
        """An image and eight boxes, which is what the choice is made by."""
        return self.encoder_ms + self.eight_ms

    @property
    def further_ms(self) -> float:
        """Each box after the first."""
        return (self.eight_ms - self.box_ms) / 7


@dataclass(frozen=True)
class Record:
    """All runtimes that were tried.

    Attributes:
        trials: the candidates, the default first.
        every: whether each that could be opened was compared with PyTorch, not only those that
            were quicker than the choice, and for which there was time.
        seconds: how long it took.
    """

    trials: tuple[Trial, ...]
    every: bool
    seconds: float

    @property
    def chosen(self) -> Trial:
        """The quickest that may be."""
        return min((trial for trial in self.trials if trial.passes), key=lambda t: t.total_ms)

    @property
    def untried(self) -> tuple[Trial, ...]:
        """Those that were left alone for want of time."""
        return tuple(trial for trial in self.trials if trial.verdict == OUT_OF_TIME)

    def of(self, backend: str, runtime_precision: str | None) -> Trial | None:
        """One candidate."""
        wanted = (backend, runtime_precision)
        return next((t for t in self.trials if (t.backend, t.runtime_precision) == wanted), None)


def record_key(artefact: Artefact, threads: int | None = None) -> str:
    """Hash of all that a record depends on.

    Args:
        artefact: what is run.
        threads: that were asked for.
    """
    files = {f"graph {name}": item.sha256 for name, item in artefact.graphs.items()}
    return key_of(
        {
            **files,
            **installed_versions(_DECIDING),
            "code": code_digest(_CODE),
            "answers": "none" if artefact.answers is None else artefact.answers.sha256,
            "gate": f"{load_recipe(artefact.precision).gate}, margin {MARGIN}",
            "processor": processor(cpuinfo()),
            "cores": str(describe_hardware().cores),
            "threads": str(threads),
        }
    )


def find_record(artefact: Artefact, threads: int | None = None) -> Record | None:
    """What was measured of this export on this machine; None if nothing was.

    Raises:
        InputError: the record is damaged or was edited.
    """
    key = record_key(artefact, threads)
    for path in _places(artefact, key):
        if os.path.isfile(path):  # another user's cache is as good as none
            return _KIND.read(path, lambda body: _record(key, body))
    return None


def keep_record(artefact: Artefact, record: Record, threads: int | None = None) -> Path:
    """Write a record beside the export, or else into this user's cache, and return its place.

    Raises:
        CacheError: neither can be written.
    """
    key = record_key(artefact, threads)
    body = {"key": key, **asdict(record)}
    beside, cached = _places(artefact, key)
    with suppress(OSError):
        beside.parent.mkdir(exist_ok=True)
        return _KIND.write(beside, body)
    private_folder(cached.parent, "records of tried runtimes")
    try:
        return _KIND.write(cached, body)
    except OSError as error:
        raise CacheError(f"{cached} cannot be written: {error.strerror}") from error


def lowered_graphs(artefact: Artefact, threads: int | None = None) -> tuple[str, ...]:
    """Decoders that may compute in bfloat16 here.

    Raises:
        EngineError: nobody measured, or each of them misses its gate.
        InputError: see `find_record`.
    """
    record = find_record(artefact, threads)
    trial = None if record is None else record.of("openvino", "bfloat16-decoders")
    if trial is None or not (trial.passes or (record and record.every)):
        measure = f"python -m dbsam_deploy.doctor --artefact {shlex.quote(str(artefact.folder))}"
        raise EngineError(
            f"whether {artefact.folder} keeps its gate with bfloat16 decoders on this machine was "
            f"not measured: run `{measure}` first, or drop --runtime-precision"
        )
    if not trial.passes:
        raise EngineError(
            f"{artefact.folder} with bfloat16 decoders on this machine: {trial.verdict}; drop "
            "--runtime-precision"
        )
    return trial.lowered


def _places(artefact: Artefact, key: str) -> Iterator[Path]:
    for folder in (artefact.folder / TRIALS, cache_folder(TRIALS)):
        yield folder / f"{key[:16]}.json"


def _record(key: str, body: Body) -> Record:
    if body.pop("key") != key:
        raise ValueError("of another export or machine")
    trials = tuple(_trial(given) for given in body["trials"])
    if not any(trial.passes for trial in trials):
        raise ValueError("no runtime that may be used")
    return Record(trials, bool(body["every"]), float(body["seconds"]))


def _trial(given: Body) -> Trial:
    trial = Trial(**{**given, "lowered": tuple(given["lowered"])})
    times = (trial.encoder_ms, trial.box_ms, trial.eight_ms)
    if type(trial.passes) is not bool or not all(math.isfinite(ms) and ms >= 0 for ms in times):
        raise ValueError(f"{trial.backend!r:.40}: expected a verdict and times in ms")
    if not set(trial.lowered) <= set(graph_specs(Geometry(1024))) - {"encoder"}:
        raise ValueError(f"{trial.lowered!r:.80}: expected decoders")
    return trial
