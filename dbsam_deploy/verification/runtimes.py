"""Tries the CPU's runtimes on an export: which keep its gate here, and which is the quickest.

ONNX Runtime is what the export was compared with PyTorch on. The others are held against the masks
of PyTorch that the export keeps, by the gate of its recipe, before they may be chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..artefact import Artefact
from ..core.contract import BOXES
from ..core.errors import DbsamError, InputError
from ..core.graph_imaging import encoder_feed
from ..core.imaging import ByteArray, FloatArray, Preprocessing
from ..core.prompt_adapter import AT_ONCE
from ..machine.hardware import cpuinfo, has_bfloat16
from ..recipe import load_recipe
from ..sessions.onnxruntime_session import OnnxRuntimeSession
from ..sessions.session import Feed, Session
from ..sessions.trial_records import MISSES, Record, Trial, find_record, keep_record
from .agreement import DECODERS, Agreement, KnownMasks, agreement
from .answers import read_answers
from .references import question

Say = Callable[[str], None]
DEFAULT = "onnxruntime"
FLOAT32, LOWERED, BFLOAT16 = "float32", "bfloat16-decoders", "bfloat16"
_ORDER = (BFLOAT16, LOWERED, FLOAT32)
"""OpenVINO's precisions, the one that is the quickest where a processor has bfloat16 first."""
_SHOWN: tuple[tuple[str, str | None], ...] = (
    (DEFAULT, None),
    *(("openvino", precision) for precision in reversed(_ORDER)),
)
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
    tried = try_runtimes(artefact, place, every=every)
    path = keep_record(artefact, tried.record, place.threads)
    say(f"{tried.record.chosen.name} is the quickest that keeps its gate, see {path}")
    return tried


def try_runtimes(artefact: Artefact, place: Place, *, every: bool = False) -> Tried:
    """Time the candidates, and hold those against PyTorch that would be quicker than the choice.

    Args and errors: see `tried_runtime`.
    """
    start = time.perf_counter()
    answers: KnownMasks = ()
    reason = ""
    try:
        answers = sorted(read_answers(artefact), key=lambda pair: -len(pair[0].boxes))
    except InputError as error:
        reason = error.message
    bench = _Bench(artefact, place, answers, reason, every)
    if answers or every:
        bench.time_default()
    for precision in _ORDER:
        bench.add(precision)
    trials = tuple(bench.trials[key] for key in _SHOWN)
    seconds = round(time.perf_counter() - start, 1)
    return Tried(Record(trials, every, seconds), bench.session)


@dataclass
class _Encoder:
    """What encoders that compute alike have answered, and how fast.

    Attributes:
        answers: question → answer.
        ms: of each run but a session's first, which opens the graph.
    """

    answers: dict[str, dict[str, FloatArray]] = field(default_factory=dict)
    ms: list[float] = field(default_factory=list)


class _Known:
    """A session whose encoder is not asked what one like it has answered.

    Args:
        session: what is asked.
        encoder: what is known of its encoder, and adds to it.
    """

    def __init__(self, session: Session, encoder: _Encoder) -> None:
        self.backend, self.session, self._encoder = session.backend, session, encoder
        self._is_warm = False

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        if graph != "encoder":
            return self.session.run(graph, feed)
        key = question(graph, feed)
        if key not in self._encoder.answers:
            self._encoder.answers[key] = self._encode(feed)
        return dict(self._encoder.answers[key])

    def encoder_ms(self, feed: Feed) -> float:
        """The least, which other programs on the machine lengthen least; `feed` where none is."""
        while not self._encoder.ms:
            self._encode(feed)
        return min(self._encoder.ms)

    def _encode(self, feed: Feed) -> dict[str, FloatArray]:
        start = time.perf_counter()
        found = self.session.run("encoder", feed)
        if self._is_warm:
            self._encoder.ms.append(1000 * (time.perf_counter() - start))
        self._is_warm = True
        return found


class _Bench:
    """One trial: what was found of each candidate, and the session of the choice.

    Args:
        artefact: what is run.
        place: how.
        answers: of PyTorch, or nothing.
        reason: why there are none.
        every: see `tried_runtime`.
    """

    def __init__(
        self, artefact: Artefact, place: Place, answers: KnownMasks, reason: str, every: bool
    ) -> None:
        self._artefact, self._place, self._every = artefact, place, every
        self._answers, self._reason = answers, reason
        self._encoders = {kind: _Encoder() for kind in (DEFAULT, FLOAT32, BFLOAT16)}
        self._image, self._boxes = _questions(artefact.preprocessing, answers)
        default = Trial(DEFAULT, None, passes=True, verdict="the export's own gate")
        self.trials: dict[tuple[str, str | None], Trial] = {(DEFAULT, None): default}
        self.session: Session | None = None

    def time_default(self) -> None:
        """Time what the others have to beat."""
        session = _open(self._artefact, self._place, DEFAULT, None)
        known = _Known(session, self._encoders[DEFAULT])
        trial = self._with_decoder(self.trials[DEFAULT, None], known)
        self.trials[DEFAULT, None] = self._with_encoder(trial, known)
        # After so many boxes it gives the memory back that it ran in.
        many = np.repeat(self._boxes[:, :1], AT_ONCE + 1, axis=1)
        session.run("decoder", {**known.run("encoder", self._image), BOXES: many})

    def add(self, precision: str) -> None:
        """Try OpenVINO in a precision, as far as it may be chosen."""
        trial = Trial("openvino", precision, passes=False, verdict=self._needless(precision))
        if not trial.verdict:
            try:
                trial = self._tried(trial)
            except DbsamError as error:
                trial = replace(trial, verdict=error.message)
        self.trials[trial.backend, precision] = trial

    def _needless(self, precision: str) -> str:
        """Why a candidate is not even opened; "" if it is."""
        if precision != FLOAT32 and not has_bfloat16(cpuinfo()):
            return "this processor has no instructions for bfloat16"
        if self._every:
            return ""
        if not self._answers:
            return self._reason
        lowered = self.trials.get(("openvino", LOWERED))
        if precision == FLOAT32 and lowered is not None and lowered.passes:
            return "not tried, since the same encoder with bfloat16 decoders keeps the gate"
        return ""

    def _best_ms(self) -> float:
        return min(trial.total_ms for trial in self.trials.values() if trial.passes)

    def _tried(self, trial: Trial) -> Trial:
        """A candidate with its times and its verdict."""
        precision = trial.runtime_precision
        session = _open(self._artefact, self._place, trial.backend, precision)
        encoder = self._encoders[BFLOAT16 if precision == BFLOAT16 else FLOAT32]
        known = _Known(session, encoder)
        trial = self._with_decoder(trial, known)
        if not self._answers:
            return replace(self._with_encoder(trial, known), verdict=self._reason)

        def enough(found: Agreement) -> bool:
            slow = encoder.ms and min(encoder.ms) + trial.eight_ms >= self._best_ms()
            return not self._every and bool(slow or not _kept(precision, found))

        gate = load_recipe(self._artefact.precision).gate
        found = agreement(known, self._artefact, self._answers, gate, enough=enough)
        trial, kept = self._with_encoder(trial, known), _kept(precision, found)
        missed = "; ".join(filter(None, found.missed.values()))
        if not kept:
            return replace(trial, verdict=f"{MISSES}: {missed}")
        if not found.whole:
            return replace(trial, verdict="not compared, since it is slower than the choice")
        if trial.total_ms < self._best_ms():
            self.session = session if kept == DECODERS else None
        exact = f"; float32 for {missed}" if missed else ""
        lowered = kept if precision == LOWERED else ()
        return replace(trial, passes=True, lowered=lowered, verdict=f"{found.text}{exact}")

    def _with_encoder(self, trial: Trial, known: _Known) -> Trial:
        return replace(trial, encoder_ms=round(known.encoder_ms(self._image), 2))

    def _with_decoder(self, trial: Trial, known: _Known) -> Trial:
        """A trial with the times of one box and eight."""
        features = known.run("encoder", self._image)
        feeds = [{**features, BOXES: self._boxes[:, :count]} for count in (1, 8)]
        one, eight = (_ms(partial(known.run, "decoder", feed)) for feed in feeds)
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
    threads = place.threads or 0
    if backend == DEFAULT:
        return OnnxRuntimeSession(artefact, threads=threads)
    from ..sessions.openvino_session import OpenvinoSession

    lowered = DECODERS if precision == LOWERED else ()
    whole = BFLOAT16 if precision == BFLOAT16 else FLOAT32
    return OpenvinoSession(
        artefact, precision=whole, lowered=lowered, cache=place.engine_cache, threads=threads
    )


def _ms(work: Callable[[], object]) -> float:
    """The least after a first time."""
    work()
    taken: list[float] = []
    while len(taken) < _ROUNDS and (not taken or sum(taken) < _SECONDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)
