"""Tries the CPU's runtimes on an export: which keep its gate here, and which is the quickest.

ONNX Runtime is what the export was compared with PyTorch on. The others are held against the masks
of PyTorch that the export keeps, by the gate of its recipe, before they may be chosen. Somebody
may wait for a mask meanwhile: the likely choice is tried first, the others if there is time.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..artefact import Artefact
from ..core.contract import BOXES
from ..core.errors import CacheError, DbsamError, InputError
from ..core.graph_imaging import encoder_feed
from ..core.imaging import ByteArray, FloatArray, Preprocessing
from ..core.prompt_adapter import AT_ONCE
from ..machine.hardware import cpuinfo, has_bfloat16, instruction_sets
from ..recipe import load_recipe
from ..sessions.onnxruntime_session import OnnxRuntimeSession
from ..sessions.session import Feed, Session
from ..sessions.trial_records import (
    MISSES,
    OUT_OF_TIME,
    Record,
    Trial,
    find_record,
    keep_record,
)
from .agreement import DECODERS, Agreement, GateTally, KnownMasks, agreement
from .answers import read_answers
from .parity import cosine, sample_of
from .references import AskedOnce, Encodings

Say = Callable[[str], None]
DEFAULT = "onnxruntime"
FLOAT32, LOWERED, BFLOAT16 = "float32", "bfloat16-decoders", "bfloat16"
BUDGET_S = 8.0
"""Once a runtime keeps its gate, another is begun only if a trial that somebody waits for would end
within so long; with a program's start and its first prediction that is ten seconds."""
_SHOWN: tuple[tuple[str, str | None], ...] = (
    (DEFAULT, None),
    *(("openvino", precision) for precision in (FLOAT32, LOWERED, BFLOAT16)),
)
_SLOWER = "not compared, since it is slower than the choice"
_ROUNDS, _SECONDS = 5, 0.1
"""A question is timed at most so often, and repeated at most for so long."""


@dataclass(frozen=True)
class Place:
    """How and where an export is opened.

    Attributes:
        threads: see `ModelOptions`.
        engine_cache: see `ModelOptions`.
    """

    threads: int | None = None
    engine_cache: Path | None = None


@dataclass(frozen=True)
class Tried:
    """What came of a trial.

    Attributes:
        record: of all candidates.
        session: the chosen one as it was asked, where it is still open.
    """

    record: Record
    session: Session | None = None


def runtime_record(
    artefact: Artefact, place: Place, say: Say, *, every: bool = False, again: bool = False
) -> Record:
    """The record of an export on this machine, see `tried_runtime`."""
    return tried_runtime(artefact, place, say, every=every, again=again).record


def tried_runtime(
    artefact: Artefact, place: Place, say: Say, *, every: bool = False, again: bool = False
) -> Tried:
    """The record of an export on this machine, measured now if there is none.

    Args:
        artefact: what is run.
        place: how.
        say: told that something takes a while, and where the record is.
        every: hold each runtime against PyTorch, also those that would not be chosen.
        again: measure whether or not there is a record.

    Raises:
        InputError: a graph has changed.
        EngineError: the default does not open, or the record cannot be written.
    """
    try:
        found = None if again else find_record(artefact, place.threads)
    except InputError as error:
        say(f"{error.message}; it is measured again")
        found = None
    if found is not None and (found.every or not every):
        return Tried(found)
    say(f"trying the runtimes of this machine on {artefact.folder}, once")
    tried = try_runtimes(artefact, place, every=every, say=say)
    path = keep_record(artefact, tried.record, place.threads)
    say(f"{tried.record.chosen.name} is the quickest that keeps its gate, see {path}")
    if tried.record.untried:
        names = " and ".join(trial.name for trial in tried.record.untried)
        command = f"python -m dbsam_deploy.doctor --artefact {shlex.quote(str(artefact.folder))}"
        say(f"{names}: {OUT_OF_TIME}; `{command}` tries all")
    return tried


def try_runtimes(
    artefact: Artefact, place: Place, *, every: bool = False, say: Say = lambda text: None
) -> Tried:
    """Time the candidates, and hold those against PyTorch that would be quicker than the choice.

    Once one keeps its gate, another is begun only if it will have ended within `BUDGET_S`, unless
    it shall be `every` one.

    Args and errors: see `tried_runtime`.
    """
    bench = _Bench(artefact, place, every)
    if bench.answers or every:
        bench.time_default(say)
    for precision in _likely_first(artefact):
        bench.add(precision)
    trials = tuple(bench.trials[key] for key in _SHOWN)
    return Tried(Record(trials, every, round(bench.seconds, 1)), bench.session)


def _likely_first(artefact: Artefact) -> tuple[str, ...]:
    """OpenVINO's precisions, the likely choice first.

    All in bfloat16 is the quickest; that it keeps the gate is likely between int8 layers, for which
    a gate leaves more room, and with AMX. Else the encoder has to be float32 more often than not.
    """
    if artefact.quantization.get("graphs") or instruction_sets(cpuinfo())["AMX-bf16"]:
        return BFLOAT16, LOWERED, FLOAT32
    return LOWERED, FLOAT32, BFLOAT16


class _Bench:
    """One trial: what was found of each candidate, and the session of the choice.

    Args:
        artefact: what is run.
        place: how.
        every: see `tried_runtime`.

    Attributes:
        answers: of PyTorch, or nothing.
        trials: backend and runtime precision → what was found.
        session: of the choice, where it is still open and as it was asked.
    """

    def __init__(self, artefact: Artefact, place: Place, every: bool) -> None:
        self._start, self._took_s = time.perf_counter(), 0.0
        self._artefact, self._place, self._every = artefact, place, every
        self._gate = load_recipe(artefact.precision).gate
        self.answers: KnownMasks = ()
        self._reason = ""
        try:
            self.answers = sorted(read_answers(artefact), key=lambda pair: -len(pair[0].boxes))
        except InputError as error:
            self._reason = error.message
        self._encodings = {kind: Encodings() for kind in (FLOAT32, BFLOAT16)}
        self._image, self._boxes = _questions(artefact.preprocessing, self.answers)
        default = Trial(DEFAULT, None, passes=True, verdict="the export's own gate")
        self.trials: dict[tuple[str, str | None], Trial] = {(DEFAULT, None): default}
        self.session: Session | None = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._start

    def time_default(self, say: Say) -> None:
        """Time what the others have to beat, and say if that is going to take long."""
        asked = AskedOnce(_open(self._artefact, self._place, DEFAULT, None))
        trial = self._with_decoder(self.trials[DEFAULT, None], asked)
        trial = self.trials[DEFAULT, None] = self._with_encoder(trial, asked)
        # After so many boxes it gives the memory back that it ran in, which else outlives it.
        many = np.repeat(self._boxes[:, :1], AT_ONCE + 1, axis=1)
        asked.run("decoder", {**asked.run("encoder", self._image), BOXES: many})
        image_s = trial.encoder_ms / 1000
        if len(self.answers) * image_s > BUDGET_S:
            say(f"an image takes {image_s:.1f} s, and a runtime is asked about {len(self.answers)}")

    def add(self, precision: str) -> None:
        """Try OpenVINO in a precision, as far as it may be chosen."""
        trial = Trial("openvino", precision, passes=False, verdict=self._needless(precision))
        if not trial.verdict:
            start = time.perf_counter()
            try:
                trial = self._tried(trial)
            except CacheError:  # says nothing of the runtime, and would be believed for good
                raise
            except DbsamError as error:
                trial = replace(trial, verdict=error.message)
            self._took_s = max(self._took_s, time.perf_counter() - start)
        self.trials[trial.backend, precision] = trial

    def _needless(self, precision: str) -> str:
        """Why a candidate is not even opened; "" if it is."""
        if precision != FLOAT32 and not has_bfloat16(cpuinfo()):
            return "this processor has no instructions for bfloat16"
        if self._every:
            return ""
        if not self.answers:
            return self._reason
        lowered = self.trials.get(("openvino", LOWERED))
        if precision == FLOAT32 and lowered is not None and lowered.passes:
            return "not tried, since the same encoder with bfloat16 decoders keeps the gate"
        return OUT_OF_TIME if self._is_late() else ""

    def _is_late(self) -> bool:
        """Whether there is no time for one more, going by how long those before it took.

        Until one passes there is: to stop then would leave an export on the slowest for good.
        """
        has_passed = any(trial.passes for trial in self.trials.values() if trial.backend != DEFAULT)
        return has_passed and self.seconds + self._took_s > BUDGET_S

    def _best_ms(self) -> float:
        return min(trial.total_ms for trial in self.trials.values() if trial.passes)

    def _tried(self, trial: Trial) -> Trial:
        """A candidate with its times and its verdict."""
        precision = trial.runtime_precision
        session = _open(self._artefact, self._place, trial.backend, precision)
        encodings = self._encodings[BFLOAT16 if precision == BFLOAT16 else FLOAT32]
        asked = AskedOnce(session, encodings)
        if verdict := self._ruled_out(asked):
            return replace(self._with_encoder(trial, asked), verdict=verdict)
        trial = self._with_decoder(trial, asked)
        if not self.answers:
            return replace(self._with_encoder(trial, asked), verdict=self._reason)

        def enough(found: Agreement) -> bool:
            slow = 1000 * min(encodings.seconds) + trial.eight_ms >= self._best_ms()
            return not self._every and bool(slow or not _kept(precision, found))

        found = agreement(asked, self._artefact, self.answers, self._gate, enough=enough)
        trial, kept = self._with_encoder(trial, asked), _kept(precision, found)
        missed = "; ".join(filter(None, found.missed.values()))
        if not kept:
            return replace(trial, verdict=f"{MISSES}: {missed}")
        if not found.whole:
            return replace(trial, verdict=_SLOWER)
        if trial.total_ms < self._best_ms():
            self.session = session if kept == DECODERS else None
        exact = f"; float32 for {missed}" if missed else ""
        lowered = kept if precision == LOWERED else ()
        return replace(trial, passes=True, lowered=lowered, verdict=f"{found.text}{exact}")

    def _ruled_out(self, asked: AskedOnce) -> str:
        """What one image's encoding decides, before a decoder is compiled; "" if it does not."""
        if self._every:
            return ""
        near = cosine(sample_of(asked.run("encoder", self._image)), self.answers[0][1].sample)
        if missed := GateTally(self.answers, self._gate).missed_encoder(near):
            return f"{MISSES}: {missed}"
        return _SLOWER if 1000 * min(asked.seconds["encoder"]) >= self._best_ms() else ""

    def _with_encoder(self, trial: Trial, asked: AskedOnce) -> Trial:
        """A trial with the least time of an image, which other programs lengthen least.

        Where somebody waits, one run has to do for ONNX Runtime: it is a first one, as is what a
        candidate is then compared by.
        """
        seconds = asked.seconds["encoder"]
        while len(seconds) < 1 + self._every:
            start = time.perf_counter()
            asked.session.run("encoder", self._image)
            seconds.append(time.perf_counter() - start)
        return replace(trial, encoder_ms=round(1000 * min(seconds), 2))

    def _with_decoder(self, trial: Trial, asked: AskedOnce) -> Trial:
        """A trial with the times of one box and eight."""
        features = asked.run("encoder", self._image)
        feeds = [{**features, BOXES: self._boxes[:, :count]} for count in (1, 8)]
        one, eight = (_ms(partial(asked.session.run, "decoder", feed)) for feed in feeds)
        return replace(trial, box_ms=round(one, 2), eight_ms=round(eight, 2))


def _kept(precision: str | None, found: Agreement) -> tuple[str, ...]:
    """Decoders that may be used as they were asked, if the encoder may; else nothing."""
    kept = tuple(graph for graph in DECODERS if not found.missed[graph])
    if found.missed["encoder"] or (precision != LOWERED and kept != DECODERS):
        return ()
    return kept


def _questions(how: Preprocessing, answers: KnownMasks) -> tuple[Feed, FloatArray]:
    """An image as the encoder takes it, a real one if there is any, and eight boxes in it."""
    rng = np.random.default_rng(0)
    drawn: ByteArray = rng.integers(0, 256, (64, 64, 3), np.uint8)
    feed = encoder_feed(answers[0][0].image if answers else drawn, how)
    corners = np.sort(rng.uniform(0, how.image_size, (1, 8, 2, 2)), axis=2)
    return feed, corners.reshape(1, 8, 4).astype(np.float32)


def _open(artefact: Artefact, place: Place, backend: str, precision: str | None) -> Session:
    """A runtime whose encoder is ready: its first run is timed."""
    threads = place.threads or 0
    if backend == DEFAULT:
        return OnnxRuntimeSession(artefact, threads=threads)
    from ..sessions.openvino_session import OpenvinoSession

    lowered = DECODERS if precision == LOWERED else ()
    whole = BFLOAT16 if precision == BFLOAT16 else FLOAT32
    session = OpenvinoSession(
        artefact, precision=whole, lowered=lowered, cache=place.engine_cache, threads=threads
    )
    session.compiled("encoder")
    return session


def _ms(work: Callable[[], object]) -> float:
    """The least after a first time."""
    work()
    taken: list[float] = []
    while len(taken) < _ROUNDS and (not taken or sum(taken) < _SECONDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)
