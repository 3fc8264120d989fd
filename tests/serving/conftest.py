"""A real server under a supervisor, whose models hang or are slow when a test says so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dbsam_deploy.core.bls import public_name
from dbsam_deploy.serving import runtime
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.processes import stubs
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.serving.supervisor import Supervisor

BACK_WITHIN_S = 10.0
_HOOK = """
        import os, time
        def named(file):
            return os.path.exists(file) and open(file).read() in self._graph
        while named({hang!r}):
            time.sleep(0.05)
        if named({slow!r}):
            time.sleep(0.3)
"""


class Watched:
    """A server and its supervisor, which looks when the test lets it."""

    def __init__(self, server: TritonServer, switches: Path) -> None:
        self.server, self.events = server, []
        self.hang, self.slow = switches / "hang", switches / "slow"  # hold the name of a model
        self.supervisor = Supervisor(server, self.events.append)
        self.supervisor.begin()

    @contextmanager
    def disturbed(self, switch: Path, model: str) -> Iterator[None]:
        """A model hangs or is slow, unless the switch is removed before."""
        written = switch.with_suffix(".new")
        written.write_text(model)
        written.replace(switch)
        try:
            yield
        finally:
            switch.unlink(missing_ok=True)

    @property
    def mended(self) -> int:
        """How often a model was revived, or the server restarted.

        Killing a stub under load makes Triton 2.51 itself abort at times (a lock in shared memory).
        """
        return self.supervisor.revived + self.supervisor.restarted

    def until(self, condition: Callable[[], bool], seconds: float = BACK_WITHIN_S) -> float:
        """Let it look until the condition is true; the seconds that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, self.events
            self.supervisor.look()
            time.sleep(0.1)
        return time.monotonic() - began

    def pid_of(self, model: str) -> int:
        """Process of a model."""
        return next(stub.pid for stub in stubs(self.server.pid) if public_name(stub.model) == model)


def _with_switches(folder: Path) -> Path:
    """The stand-ins, which look at two files before they run a request."""
    shutil.copytree(runtime.STANDINS, folder / "standins")
    model = folder / "standins" / "onnxruntime" / "model.py"
    text = model.read_text()
    end_of_docstring = 'is the requests\' error, sent by Triton itself.\n        """\n'
    assert end_of_docstring in text
    hook = _HOOK.format(hang=str(folder / "hang"), slow=str(folder / "slow"))
    text = text.replace(end_of_docstring, end_of_docstring + hook)
    place = "        self._batched = batched = config["
    assert place in text
    model.write_text(text.replace(place, "        self._graph = str(path)\n" + place))
    return folder / "standins"


@pytest.fixture
def watched(watched_server) -> Watched:
    """The server, which the test before may have left ended or the supervisor patient."""
    if watched_server.server.has_ended:
        watched_server.supervisor.look()
    supervisor = watched_server.supervisor
    supervisor._slowest = supervisor._probe_at = 0.0
    supervisor._asked, supervisor._round = None, []
    return watched_server


@pytest.fixture(scope="package")
def watched_server(tiny_artefact, server_environment, tmp_path_factory) -> Iterator[Watched]:
    """A supervised server on a repository of its own, which tests may spoil."""
    folder = tmp_path_factory.mktemp("watched")
    repository = build_repository(tiny_artefact, folder / "model_repository").folder
    server = TritonServer(repository, server_environment, log=folder / "log", ports=Ports(0, 0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "STANDINS", _with_switches(folder))
        with server:
            yield Watched(server, folder)
