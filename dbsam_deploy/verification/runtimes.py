"""Tries the CPU's runtimes on an export: which keep its gate here, and which is the quickest.

ONNX Runtime is what the export was compared with PyTorch on. The others are held against the masks
of PyTorch that the export keeps, by the gate of its recipe, before they may be chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..artefact import Artefact
from ..core.contract import BOXES, IMAGE
from ..core.errors import DbsamError, InputError
from ..core.imaging import FloatArray, preprocess
from ..machine.hardware import cpuinfo, has_bfloat16
from ..recipe import Gate, load_recipe
from ..sessions.onnxruntime_session import OnnxRuntimeSession
from ..sessions.session import Session
from ..sessions.trial_records import MARGIN, Record, Trial, find_record, keep_record
from .answers import read_answers
from .cases import Case
from .parity import GateMasks, ask, cosine, dice, prompt_agreement
from .references import AskedOnce

Say = Callable[[str], None]
DEFAULT = "onnxruntime"
PARTS = {"encoder": "cosine", "decoder": "boxes", "prompt_decoder": "prompts"}
"""Graph → what its figures are of."""
DECODERS = ("decoder", "prompt_decoder")
_CANDIDATES: tuple[tuple[str, str | None], ...] = (
    (DEFAULT, None),
    ("openvino", "float32"),
    ("openvino", "bfloat16-decoders"),
    ("openvino", "bfloat16"),
)
_ROUNDS, _SECONDS = 5, 0.4
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
class Agreement:
    """How near a runtime's masks are to PyTorch's on the gate's images.

    Attributes:
        missed: graph of `PARTS` → what of it misses the gate; "" if nothing does.
        text: the figures.
    """

    missed: dict[str, str]
    text: str


def runtime_record(
    artefact: Artefact, place: Place, say: Say, *, every: bool = False, again: bool = False
) -> Record:
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
        return found
    say(f"trying the runtimes of this machine on {artefact.folder}, once")
    record = try_runtimes(artefact, place, every=every)
    path = keep_record(artefact, record, place.threads)
    say(f"{record.chosen.name} is the quickest that keeps its gate, see {path}")
    return record


def try_runtimes(artefact: Artefact, place: Place, *, every: bool = False) -> Record:
    """Time every candidate, and hold them against PyTorch, the quickest first.

    Args and errors: see `runtime_record`.
    """
    start = time.perf_counter()
    answers: list[tuple[Case, GateMasks]] | None = None
    reason = ""
    try:
        answers = read_answers(artefact)
    except InputError as error:
        reason = error.message
    trials = {key: _timed(artefact, place, answers, *key) for key in _CANDIDATES}
    waiting = [trial for trial in trials.values() if trial.backend != DEFAULT and trial.encoder_ms]
    best = trials[DEFAULT, None].total_ms
    for trial in sorted(waiting, key=lambda one: one.total_ms):
        if answers is None:
            judged = replace(trial, verdict=reason)
        elif trial.total_ms >= best and not every:
            judged = replace(trial, verdict="not compared, since it is slower than the choice")
        else:
            judged = _judged(artefact, place, answers, trial)
        if judged.passes:
            best = min(best, judged.total_ms)
        trials[trial.backend, trial.runtime_precision] = judged
    return Record(tuple(trials.values()), every, round(time.perf_counter() - start, 1))


def _open(artefact: Artefact, place: Place, backend: str, precision: str | None) -> Session:
    threads = place.threads or 0
    if backend == DEFAULT:
        return OnnxRuntimeSession(artefact, threads=threads)
    from ..sessions.openvino_session import OpenvinoSession

    lowered = DECODERS if precision == "bfloat16-decoders" else ()
    whole = "bfloat16" if precision == "bfloat16" else "float32"
    return OpenvinoSession(
        artefact, precision=whole, lowered=lowered, cache=place.engine_cache, threads=threads
    )


def _timed(
    artefact: Artefact,
    place: Place,
    answers: list[tuple[Case, GateMasks]] | None,
    backend: str,
    precision: str | None,
) -> Trial:
    """How fast one candidate is, on a real image where the export keeps any."""
    trial = Trial(backend, precision, passes=backend == DEFAULT, verdict="the export's own gate")
    if precision not in (None, "float32") and not has_bfloat16(cpuinfo()):
        return replace(trial, verdict="this processor has no instructions for bfloat16")
    how = artefact.preprocessing
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8) if answers is None else answers[0][0].image
    pixels = preprocess(image, how)
    corners = np.sort(rng.uniform(0, how.image_size, (1, 8, 2, 2)), axis=2)
    boxes: FloatArray = corners.reshape(1, 8, 4).astype(np.float32)
    try:
        session = _open(artefact, place, backend, precision)
        features = session.run("encoder", {IMAGE: pixels})
        taken = [_ms(partial(session.run, "encoder", {IMAGE: pixels}))]
        for count in (1, 8):
            feed = {**features, BOXES: boxes[:, :count]}
            session.run("decoder", feed)
            taken.append(_ms(partial(session.run, "decoder", feed)))
    except DbsamError as error:
        if backend == DEFAULT:
            raise
        return replace(trial, verdict=error.message)
    encoder, one, eight = (round(ms, 2) for ms in taken)
    return replace(trial, encoder_ms=encoder, box_ms=one, eight_ms=eight)


def _ms(work: Callable[[], object]) -> float:
    """The least, which other programs on the machine lengthen least."""
    taken: list[float] = []
    while len(taken) < _ROUNDS and (not taken or sum(taken) < _SECONDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)


def _judged(
    artefact: Artefact, place: Place, answers: list[tuple[Case, GateMasks]], trial: Trial
) -> Trial:
    """A candidate with its verdict."""
    session = _open(artefact, place, trial.backend, trial.runtime_precision)
    found = agreement(session, artefact, answers, load_recipe(artefact.precision).gate)
    kept = tuple(graph for graph in DECODERS if not found.missed[graph])
    missed = "; ".join(filter(None, found.missed.values()))
    if trial.runtime_precision == "bfloat16-decoders" and kept and not found.missed["encoder"]:
        exact = f"; float32 for {missed}" if missed else ""
        return replace(trial, passes=True, lowered=kept, verdict=f"{found.text}{exact}")
    if missed:
        return replace(trial, verdict=f"misses its gate: {missed}")
    return replace(trial, passes=True, verdict=found.text)


def agreement(
    session: Session, artefact: Artefact, answers: list[tuple[Case, GateMasks]], gate: Gate
) -> Agreement:
    """Ask a session all that PyTorch was asked, and compare its masks by the recipe's gate.

    Its floors are raised by `MARGIN`.

    Args:
        session: the runtime.
        artefact: what it has opened.
        answers: see `read_answers`.
        gate: the recipe's floors.
    """
    asked = AskedOnce(session)
    values: dict[str, list[float]] = {graph: [] for graph in DECODERS}
    drops, cosines = [], []
    for case, want in answers:
        got = ask(asked, artefact.preprocessing, case, want)
        asked.forget()
        cosines.append(cosine(got.sample, want.sample))
        values["decoder"] += map(dice, got.boxes.masks, want.boxes.masks)
        values["prompt_decoder"] += prompt_agreement(got, want)
        drops += [
            dice(theirs[0], truth) - dice(ours[0], truth)
            for ours, theirs, truth in zip(
                got.boxes.masks, want.boxes.masks, case.truth, strict=True
            )
        ]
    parts = [f"{PARTS['encoder']} {min(cosines):.5f}"]
    near, mean_floor, p5_floor = (
        round(1 - (1 - MARGIN) * (1 - floor), 6)
        for floor in (gate.embedding_cosine, gate.mask_agreement_mean, gate.mask_agreement_p5)
    )
    missed = {"encoder": "" if min(cosines) >= near else f"{parts[0]} (wanted {near})"}
    for graph in DECODERS:
        mean, p5 = float(np.mean(values[graph])), float(np.percentile(values[graph], 5))
        parts.append(f"{PARTS[graph]} {mean:.4f} / {p5:.4f}")
        held = mean >= mean_floor and p5 >= p5_floor
        missed[graph] = "" if held else f"{parts[-1]} (wanted {mean_floor} / {p5_floor})"
    drop = float(np.mean(drops))
    if not drop <= gate.dice_drop:
        missed["decoder"] += f", Dice drop {drop:.4f} (wanted {gate.dice_drop})"
    return Agreement(missed, ", ".join(parts))
