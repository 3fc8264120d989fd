"""Who works on the studies: worker processes of this machine, or a Ray cluster.

Both hand out one study at a time, and tell a worker that died from one that answers. A worker that
dies takes no other study with it. Executors for many workers (loky's, concurrent.futures') give up
all that is in flight when one dies, so each worker here has an executor of its own. Pebble, which
keeps them apart itself, is under the LGPL.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ..core.errors import EngineError
from ..extras import require
from .manifest import Study
from .work import Orders, Outcome, do_study

StudyWork = Callable[[Study, Orders], Outcome]


class Crew(Protocol):
    """Workers that take studies."""

    def submit(self, study: Study, orders: Orders) -> Future[Outcome]:
        """Hand out a study; it is worked on once."""

    def death(self, error: Exception) -> str:
        """How the worker of a future died, or its machine, that raised `error`.

        Raises:
            DbsamError: it did not die; the crew cannot work at all.
            Exception: `error`, where it is none of the crew's.
        """

    def stop(self) -> None:
        """End all workers, whatever they do."""


class LocalCrew:
    """Processes of this machine, which end with this one; none is forked.

    Args:
        workers: how many studies are worked on at a time.
        threads: that libraries use in each of them, 0 for their own choice.
        work: what is done with a study.

    Raises:
        MissingError: loky is not installed.
    """

    def __init__(self, workers: int, threads: int = 0, work: StudyWork = do_study) -> None:
        self._loky = require("loky", extra="batch", what_for="a batch")
        self._work, self._env = work, {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._executors: set[Any] = set()

    def submit(self, study: Study, orders: Orders) -> Future[Outcome]:
        """See `Crew.submit`."""
        return self._threads.submit(self._ask, study, orders)

    def _ask(self, study: Study, orders: Orders) -> Outcome:
        executor = getattr(self._own, "executor", None)
        if executor is None:
            executor = self._loky.ProcessPoolExecutor(
                1, initializer=_end_with, initargs=(os.getpid(),), env=self._env
            )
            self._own.executor = executor
            self._executors.add(executor)
        try:
            outcome: Outcome = executor.submit(self._work, study, orders).result()
            return outcome
        except self._loky.BrokenProcessPool:
            self._own.executor = None
            self._executors.discard(executor)
            executor.shutdown(kill_workers=True)
            raise

    def death(self, error: Exception) -> str:
        """See `Crew.death`."""
        if isinstance(error, self._loky.BrokenProcessPool):
            return str(error)
        raise error

    def stop(self) -> None:
        """See `Crew.stop`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for executor in list(self._executors):
            executor.shutdown(kill_workers=True)


def _end_with(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayCrew:
    """The machines of a Ray cluster, which share the folders of input and output.

    Ray's core is enough: its tasks go where there is room, and a study is larger than anything that
    Ray Data would cut and stream.

    Args:
        address: of a running cluster: `auto`, or host:port.
        cpus: cores that a study takes.
        gpus: GPUs that a study takes; a part of one lets several share it.
        work: what is done with a study.

    Raises:
        MissingError: Ray is not installed.
        EngineError: no cluster answers there.
    """

    def __init__(
        self, address: str, cpus: float = 1, gpus: float = 0, work: StudyWork = do_study
    ) -> None:
        self._ray = ray = require("ray", extra="cluster", what_for="--ray")
        try:
            if address != "auto":  # Ray itself tries for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
            why = " ".join(str(error).split())[:200]
            raise EngineError(
                f"no Ray cluster at {address} ({why}): expected auto, or host:port of one that was "
                "started by `ray start --head`"
            ) from error
        # Retries are counted and reported in one place for both crews.
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(work)

    def submit(self, study: Study, orders: Orders) -> Future[Outcome]:
        """See `Crew.submit`."""
        future: Future[Outcome] = self._remote.remote(study, orders).future()
        return future

    def death(self, error: Exception) -> str:
        """See `Crew.death`."""
        errors = self._ray.exceptions
        if isinstance(error, errors.RayTaskError):  # a study's own faults are no errors
            lines = str(error).strip().splitlines()  # with the traceback there
            raise EngineError(
                f"a machine of the Ray cluster cannot work on a study: {lines[-1][:300]}; it needs "
                "this library, of the same version and with the same extras",
                *lines,
            ) from error
        if isinstance(error, errors.RayError):
            return str(error)
        raise error

    def stop(self) -> None:
        """See `Crew.stop`; other jobs of the cluster go on."""
        self._ray.shutdown()
