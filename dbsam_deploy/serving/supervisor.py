"""Keeps a Triton server serving: finds models that are dead or stuck, revives them, or restarts it.

What it looks at, from cheap to dear: whether the process lives, whether each model's own process
lives and runs (every half second), whether requests are being answered (Triton's counts), and where
none are, a request of its own through each ensemble.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ..core.bls import public_name
from ..core.errors import ServingError
from .control import requests_in_flight
from .probe import (
    BOXES_MODEL,
    INTERACTIVE_MODEL,
    PROMPTS_MODEL,
    SERVED,
    ask_stage,
    is_refusal,
)
from .processes import STOPPED, Stub, stubs
from .server import TritonServer
from .triton_config import GRAPH_MODELS

FRONT = INTERACTIVE_MODEL
_ENCODER, _DECODER, _PROMPT_DECODER, _ = GRAPH_MODELS.values()
_GRAPHS = {
    BOXES_MODEL: (_ENCODER, _DECODER),
    PROMPTS_MODEL: (_ENCODER, _PROMPT_DECODER),
    INTERACTIVE_MODEL: (_ENCODER, _DECODER),
}
"""Model for clients → the models that its answer comes from, in their order."""
_LONGEST_S = 600.0


@dataclass(frozen=True)
class Pace:
    """How patient the supervisor is, in seconds unless said.

    Attributes:
        look: between two looks at the processes.
        stopped: how long a model's process may be stopped.
        probe_least: between two requests of its own, if they take next to no time.
        probe_most: the same, however long they take.
        probe_share: part of the server's time that these requests may take.
        patience: how long one may take where no model computes; ten times the longest of late, if
            more.
        slow: how many times as long where one does.
        reload: how long loading one model may take.
        proof: how long the answer may take that proves that it helped; others wait before it.
        unheard: calls in a row, of five seconds each, that Triton may leave unanswered.
        calm: after which failures are forgotten.
        tries: restarts within `calm` before it gives up; each pause is twice the one before.
    """

    look: float = 0.5
    stopped: float = 1.0
    probe_least: float = 3.0
    probe_most: float = 60.0
    probe_share: float = 0.05
    patience: float = 5.0
    slow: float = 6.0
    reload: float = 120.0
    proof: float = 10.0
    unheard: int = 2
    calm: float = 60.0
    tries: int = 5


class _Question:
    """A request of our own, asked in a thread: behind a dead model it waits for very long."""

    def __init__(
        self, server: TritonServer, model: str, counts: dict[str, int], cpu_s: dict[int, float]
    ) -> None:
        self.model, self.counts, self.cpu_s = model, counts, cpu_s
        self.graphs = tuple(name + server.ending for name in _GRAPHS[model])
        self.path = (FRONT, *self.graphs)
        self.error = ""
        self.is_done = threading.Event()
        self._began = self._changed = time.monotonic()
        self._took, self._noted = 0.0, dict[str, int]()
        self.looked_at = self._began
        threading.Thread(target=self._ask, args=(server,), daemon=True).start()

    def note(self, counts: dict[str, int]) -> None:
        """Note what the graphs have answered by now."""
        if counts != self._noted:
            self._noted, self._changed = counts, time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds in which no graph answered anything."""
        return time.monotonic() - self._changed

    @property
    def age_s(self) -> float:
        """Seconds since it was asked, until the answer."""
        return self._took or time.monotonic() - self._began

    def _ask(self, server: TritonServer) -> None:
        try:
            server.ask(self.model, timeout_s=_LONGEST_S)
        except ServingError as error:
            self.error = error.message
        self._took = time.monotonic() - self._began
        self.is_done.set()


@dataclass
class Supervisor:
    """Watches one started server; `run` does so until it is interrupted.

    Attributes:
        server: it, started.
        say: told each event in one line, which is in the log as well.
        pace: how patient it is.
        sleep: waits some seconds.
        revived: how often a model was loaded anew.
        restarted: how often the server was started anew.
    """

    server: TritonServer
    say: Callable[[str], None] = lambda text: None
    pace: Pace = Pace()
    sleep: Callable[[float], None] = time.sleep
    revived: int = 0
    restarted: int = 0
    _expected: dict[str, int] = field(default_factory=dict)
    _stopped: dict[int, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _restarts: list[float] = field(default_factory=list)
    _round: list[str] = field(default_factory=list)
    _asked: _Question | None = None
    _unheard: int = 0
    _probe_at: float = 0.0
    _slowest: float = 0.0

    def run(self) -> None:
        """Watch until interrupted.

        Raises:
            ServingError: the server could not be kept alive; it is stopped by its owner.
        """
        self.begin()
        while True:
            self.look()
            self.sleep(self.pace.look)

    def begin(self) -> None:
        """Remember what a healthy server looks like: right after its start."""
        self._expected = _by_model(stubs(self.server.pid))
        self._stopped, self._counts, self._round, self._asked = {}, {}, [], None
        self._unheard = 0
        self._probe_at = time.monotonic() + self.pace.probe_least

    def look(self) -> None:
        """One look, and what follows from it.

        Raises:
            ServingError: it gives up.
        """
        if self.server.has_ended:
            self._restart(self.server.why_ended())
        elif faults := self._faults():
            self._revive(faults)
        elif self._asked is not None:
            self._judge(self._asked)
        elif time.monotonic() >= self._probe_at:
            self._next_question()

    def _event(self, text: str) -> None:
        self.server.event(text)
        self.say(text)

    def _faults(self) -> dict[str, str]:
        """Model → why it cannot answer, by its processes."""
        try:
            found = stubs(self.server.pid)
        except ServingError:
            return {}  # the next look sees that the server has ended
        now = time.monotonic()
        since = {stub.pid: self._stopped.get(stub.pid, now) for stub in found if _is_stopped(stub)}
        self._stopped = since
        late = [stub for stub in found if now - since.get(stub.pid, now) >= self.pace.stopped]
        faults = {stub.model: f"process {stub.pid} is stopped" for stub in late}
        alive = _by_model(found)
        for model, count in self._expected.items():
            if alive.get(model, 0) < count:
                faults[model] = "its process has ended"
        return faults

    def _revive(self, faults: dict[str, str]) -> None:
        """Load models anew, whose processes are killed first: unloading waits for what they run."""
        began, self._asked, self._round = time.monotonic(), None, []
        if FRONT in faults and (lost := self._unanswered()):
            # Triton fails no answer that a dead process owes: only its own end ends the waiting.
            self._restart(f"{FRONT}: {faults[FRONT]}, and owes {lost} answers", counted=False)
            return
        names = ", ".join(map(public_name, faults))
        for model, reason in faults.items():
            self._event(f"{public_name(model)}: {reason}; loading it anew")
        try:
            for stub in stubs(self.server.pid):
                if stub.model in faults:
                    with suppress(ProcessLookupError):
                        os.kill(stub.pid, signal.SIGKILL)
            for model in faults:
                self.server.control.reload(model, self.pace.reload)
            for name in self._served():
                self._ask_after_reviving(name)
        except ServingError as error:
            reason = f"{names} could not be revived: {error.message}"
            if self.server.has_ended:  # its processes went with it
                self._restart(self.server.why_ended())
            elif FRONT in faults:
                self._restart(reason)
            else:
                self._revive({FRONT: reason})
            return
        self.revived += len(faults)
        seconds = time.monotonic() - began
        self._event(f"{names}: revived after {seconds:.1f} s")
        self._later(0.0)

    def _unanswered(self) -> int:
        """Requests that the front took and did not answer; its last word, if it is dead."""
        try:
            return requests_in_flight(self.server.metrics_url)
        except ServingError:
            return 0

    def _ask_after_reviving(self, model: str) -> None:
        try:
            self.server.ask(model, timeout_s=max(self.pace.proof, self._patience()))
        except ServingError as error:
            if not is_refusal(error.message):
                raise

    def _restart(self, reason: str, *, counted: bool = True) -> None:
        """Start the server anew, with longer and longer pauses.

        Args:
            reason: what led to it.
            counted: False where the server itself is well, so that there is nothing to wait for.

        Raises:
            ServingError: that was in vain too often.
        """
        while True:
            now = time.monotonic()
            self._restarts = [at for at in self._restarts if now - at < self.pace.calm]
            if counted and len(self._restarts) >= self.pace.tries:
                text = f"gave up after {len(self._restarts)} restarts: {reason}"
                self.server.event(text)
                raise ServingError(text)
            pause = 0.5 * 2 ** len(self._restarts) if self._restarts and counted else 0.0
            self._event(f"{reason}; starting the server anew" + f" in {pause:g} s" * (pause > 0))
            self.sleep(pause)
            began = time.monotonic()
            try:
                self.server.restart()
                self.begin()
            except ServingError as error:
                self._restarts.append(time.monotonic())
                reason, counted = error.message, True
                continue
            if counted:
                self._restarts.append(time.monotonic())
            self.restarted += 1
            self._event(f"the server answers again, {time.monotonic() - began:.1f} s later")
            return

    def _served(self) -> list[str]:
        models = self.server.control.models()
        return [name for name in SERVED if name in models]

    def _next_question(self) -> None:
        """Ask the next model that has answered nothing since the last round."""
        try:
            if not self._round:
                self._round = self._silent()
            if self._round:
                counts = self.server.control.answered()
                busy = {stub.pid: stub.cpu_s for stub in stubs(self.server.pid)}
                self._asked = _Question(self.server, self._round[0], counts, busy)
                self._unheard = 0
                return
        except ServingError as error:
            self._left_unanswered(error)
            return
        self._unheard = 0
        self._later(0.0)

    def _left_unanswered(self, error: ServingError) -> None:
        """Triton itself gave no answer: once may be a busy machine."""
        self._unheard += 1
        if self._unheard >= self.pace.unheard and not self.server.has_ended:
            self._restart(error.message)

    def _silent(self) -> list[str]:
        """Models for clients that have answered nothing since this was last called."""
        last, self._counts = self._counts, self.server.control.answered()
        return [name for name in self._served() if self._counts.get(name, 0) <= last.get(name, 0)]

    def _judge(self, asked: _Question) -> None:
        """What an answer, or having none for long, tells."""
        if asked.is_done.is_set():
            self._asked = None
            if asked.error and not is_refusal(asked.error):
                self._revive(dict.fromkeys(asked.path, asked.error))
                return
            self._round = self._round[1:]
            if not self._round:
                self._later(asked.age_s)
            return
        try:
            now = self.server.control.answered()
        except ServingError as error:
            self._left_unanswered(error)
            return
        self._unheard = 0
        asked.note({name: now.get(name, 0) for name in self._graphs()})
        still = [name for name in asked.graphs if now.get(name, 0) == asked.counts.get(name, 0)]
        overdue = asked.age_s > self.pace.slow * self._patience()
        if overdue and not still:
            self._asked, self._round = None, []  # slow, since all of them answer others
            self._later(asked.age_s)
        elif self._is_stuck(asked, still, overdue=overdue):
            text = f"it answers nothing ({asked.model} waits for {asked.age_s:.0f} s)"
            self._revive({still[0] if still else self._mute(): text})

    def _mute(self) -> str:
        """A graph that answers no more, be it one the question does not need; else the front."""
        for name in self._graphs():
            try:
                ask_stage(self.server.http_url, name, self._patience())
            except ServingError:
                return name
        return FRONT

    def _is_stuck(self, asked: _Question, still: list[str], *, overdue: bool) -> bool:
        """Whether the first graph that has answered nothing since, or the front, is to blame."""
        patience = self._patience()
        if asked.idle_s > patience and not self._is_computing(asked):
            return True
        if not still or still[0] == asked.graphs[0]:
            return overdue
        # Images are encoded, and nothing is decoded: nobody may have asked for it yet.
        if time.monotonic() - asked.looked_at <= patience or self._is_computing(asked, still[0]):
            return False
        try:
            ask_stage(self.server.http_url, still[0], patience)
        except ServingError:
            return True
        asked.looked_at = time.monotonic()
        return False

    def _graphs(self) -> list[str]:
        found = (name for name in GRAPH_MODELS.values() if (self.server.repository / name).is_dir())
        return [name + self.server.ending for name in found]

    def _is_computing(self, asked: _Question, model: str = "") -> bool:
        """Whether a model, or this one, computed since the question for half of a core's time."""
        try:
            found = stubs(self.server.pid)
        except ServingError:
            return False
        own = [stub for stub in found if model in ("", stub.model)]
        spent = [stub.cpu_s - asked.cpu_s.get(stub.pid, stub.cpu_s) for stub in own]
        return max(spent, default=0.0) > 0.5 * asked.age_s

    def _patience(self) -> float:
        return max(self.pace.patience, 10 * self._slowest)

    def _later(self, took: float) -> None:
        self._slowest = max(took, self._slowest / 2)  # a busy hour makes no patience for ever
        least, most = self.pace.probe_least, self.pace.probe_most
        pause = min(max(took / self.pace.probe_share, least), most)
        self._probe_at = time.monotonic() + pause


def _by_model(found: list[Stub]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for stub in found:
        counts[stub.model] = counts.get(stub.model, 0) + 1
    return counts


def _is_stopped(stub: Stub) -> bool:
    return stub.state in STOPPED
