"""A batch from its first study to its last: attempts, what is left, who died."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from .crews import Crew
from .manifest import Study
from .work import Orders, Outcome, log_of, tidy_up

Report = Callable[[Outcome, int], None]
"""Called with each study's last outcome and the number of its attempts."""


def run_batch(
    studies: Sequence[Study],
    orders: Orders,
    crew: Crew,
    report: Report,
    *,
    retries: int = 2,
) -> None:
    """Work on every study until it has a result or its attempts are used up.

    Args:
        studies: with names of their own.
        orders: what holds for all of them.
        crew: who works; it is stopped in the end.
        report: told of every study once, as they end.
        retries: further attempts for a study whose worker died or whose failure may pass.

    Raises:
        DbsamError: the model cannot be opened, or the crew cannot work.
    """
    attempts: Counter[str] = Counter()
    waiting: dict[Future[Outcome], Study] = {}
    ended: SimpleQueue[Future[Outcome]] = SimpleQueue()

    def hand_out(study: Study) -> None:
        attempts[study.name] += 1
        future = crew.submit(study, orders)
        waiting[future] = study
        future.add_done_callback(ended.put)

    try:
        for study in studies:
            hand_out(study)
        while waiting:
            future = ended.get()
            study = waiting.pop(future)
            outcome = _outcome(future, study, orders, crew)
            if outcome.refusal is not None:
                raise outcome.refusal
            if outcome.again and attempts[study.name] <= retries:
                hand_out(study)
            else:
                report(outcome, attempts[study.name])
    finally:
        crew.stop()
        for study in studies:
            tidy_up(study, orders)


def _outcome(future: Future[Outcome], study: Study, orders: Orders, crew: Crew) -> Outcome:
    try:
        return future.result()
    except Exception as error:
        told = " ".join(crew.death(error).split())
        return _death(study, orders, told, "".join(traceback.format_exception(error)))


def _death(study: Study, orders: Orders, told: str, error: str) -> Outcome:
    """What became of a study whose worker died, by the log that it kept, or else by the error."""
    path = log_of(study, orders)
    try:
        words = path.read_text(errors="replace")[:20_000]
        path.unlink(missing_ok=True)
    except OSError:
        words = ""
    if words.startswith("Timeout"):
        failure = f"not done within {orders.timeout_s:g} s (--study-timeout); its process was ended"
    else:
        first = next(iter(words.splitlines()), "")
        failure = f"its process died: {first or told[:300]}"
    return Outcome(study, failure=failure, details=words or error, again=True)
