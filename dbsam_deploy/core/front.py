"""Triton's `dbsam_interactive`: admission, the answer's way back, metrics and log.

The repository carries a copy of this folder (`1/dbsam_runtime/`), so a server needs only NumPy and
Pillow, and scikit-image in MedSAM mode. Python 3.10 is enough, for server images that have it.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .admission import Admission, Limits
from .allocation import reuse_blocks
from .array_guard import guard_arrays
from .bls import BlsGraphs
from .contract import RAW_IMAGE
from .embedding_cache import EmbeddingCache
from .errors import DbsamError, InputError
from .front_metrics import (
    CACHE_METRICS,
    CANCELLED,
    IN_FLIGHT,
    LATE,
    QUEUE_US,
    REQUESTS,
    SHED,
    FrontMetrics,
)
from .imaging import Arrays, preprocess
from .interactive import Interactive
from .refusal import RefusedError
from .settings import points_from_config, preprocessing_from_config, settings_from_config

CONTROL_VARIABLE = "DBSAM_CONTROL"
"""Names the folder in which `dbsam serve` leaves word for the front model."""
DRAINING = "draining"
"""File in that folder: the server stops, nothing new is taken."""

_IMAGE, _PROMPT = "image", "prompt"
_STOP_S = 20.0
_BLOCK = 2 << 20
"""Bytes of a mask of 1024² and more; embeddings, which are kept, are larger."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request, its way back, and when it came and has to be answered (monotonic seconds)."""

    request: Any
    sender: Any
    arrays: Arrays
    arrived: float
    deadline: float


class TritonFront:
    """Base of the front's `TritonPythonModel`, which names Triton's module.

    `execute` only takes requests; threads answer them, so all that wait are known. A mistake in a
    request becomes an error of that request alone; the server lives on.
    """

    triton: Any

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration and try the imaging once, so that a missing library shows now."""
        try:
            how = preprocessing_from_config(args["model_config"])
            self._settings = settings = settings_from_config(args["model_config"])
            rules = points_from_config(args["model_config"])
            preprocess(np.zeros((2, 2, 3), np.uint8), how)
        except DbsamError as error:
            raise self.triton.TritonModelException(f"{args['model_name']}: {error}") from error
        guard_arrays(self.triton)
        reuse_blocks(_BLOCK)
        self._cache = EmbeddingCache(settings.cache_mib << 20)
        graphs = BlsGraphs(self.triton, how)
        self._interactive = Interactive(how, graphs, self._cache, settings.chunk, rules)
        self._metrics = FrontMetrics(self.triton, args["model_name"])
        self._counts = Counter[str]()
        self._lock = threading.Lock()
        control = os.environ.get(CONTROL_VARIABLE)
        self._draining = Path(control) / DRAINING if control else None
        self._admission = Admission[_Asked](
            Limits(settings.max_waiting, settings.max_waiting_mib << 20),
            {_IMAGE: settings.image_workers, _PROMPT: settings.prompt_workers},
            self._work,
        )

    def execute(self, requests: list[Any]) -> None:
        """Take the requests, or refuse them at once; the answers are sent later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except Exception as error:
                if isinstance(error, RefusedError):
                    self._count(SHED)
                self._send(sender, self._failure(error, request.request_id()))
        self._tell()

    def finalize(self) -> None:
        """Finish what was taken."""
        self._admission.close(_STOP_S)

    def _take(self, request: Any, sender: Any) -> None:
        arrived = time.monotonic()
        self._count(REQUESTS)
        if self._draining is not None and self._draining.exists():
            raise RefusedError(
                "stopping: this server takes no more; retry another one", "UNAVAILABLE"
            )
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        allowed_s = request.timeout() / 1e6 or math.inf
        job = _Asked(request, sender, arrays, arrived, arrived + allowed_s)
        lane = _IMAGE if RAW_IMAGE.name in arrays else _PROMPT
        self._count(IN_FLIGHT)
        try:
            self._admission.submit(lane, job, sum(array.nbytes for array in arrays.values()))
        except RefusedError:
            self._count(IN_FLIGHT, -1)
            raise

    def _work(self, job: _Asked) -> None:
        waited_s = time.monotonic() - job.arrived
        self._count(QUEUE_US, int(waited_s * 1e6))
        try:
            if waited_s > self._settings.max_wait_ms / 1000:
                raise self._late(waited_s)
            outputs = self._interactive.answer(
                job.arrays, job.request.requested_output_names(), self._check(job)
            )
            pb = self.triton
            response = pb.InferenceResponse([pb.Tensor(*item) for item in outputs.items()])
        except Exception as error:  # a thread that ends would answer nothing any more
            response = self._failure(error, job.request.request_id())
        self._send(job.sender, response)
        self._count(IN_FLIGHT, -1)
        self._tell()

    def _check(self, job: _Asked) -> Callable[[], None]:
        def check() -> None:
            if time.monotonic() > job.deadline:
                raise self._late(job.deadline - job.arrived)
            if job.request.is_cancelled():
                self._count(CANCELLED)
                raise RefusedError("the client has gone: dropped", "CANCELLED")

        return check

    def _late(self, seconds: float) -> RefusedError:
        self._count(LATE)
        return RefusedError(f"late: not answered within {seconds:.3g} s, dropped", "CANCELLED")

    def _failure(self, error: Exception, request_id: str) -> Any:
        """The error as a response, with the request's id; what is not the client's is logged."""
        pb, code = self.triton, "INTERNAL"
        name = re.sub(r"[^\w.:-]", "?", request_id)[:64] or "without id"
        text = f"{error} [request {name}]"
        if isinstance(error, RefusedError):
            code = error.code
            if code != "NOT_FOUND":  # usual, and a hash of a patient's image is nothing for a log
                self._log("info", text)
        elif isinstance(error, InputError):
            code = "INVALID_ARG"
        elif isinstance(error, DbsamError):
            self._log("error", text)
        else:
            text = f"{type(error).__name__}: {text}"
            self._log("error", "".join(traceback.format_exception(error)) + text)
        return pb.InferenceResponse(error=pb.TritonError(text, getattr(pb.TritonError, code)))

    def _send(self, sender: Any, response: Any) -> None:
        """Send an answer; one that cannot be is told in few bytes, so that nobody waits for it."""
        final = self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            sender.send(response, flags=final)
        except Exception as error:
            text = f"the answer could not be sent, is /dev/shm full? ({error})"
            self._log("error", text)
            pb = self.triton
            failed = pb.InferenceResponse(error=pb.TritonError(text, pb.TritonError.UNAVAILABLE))
            with suppress(Exception):
                sender.send(failed, flags=final)

    def _log(self, level: str, text: str) -> None:
        with suppress(Exception):  # it takes shared memory too
            getattr(self.triton.Logger, f"log_{level}")(text)

    def _count(self, what: str, by: int = 1) -> None:
        with self._lock:
            self._counts[what] += by

    def _tell(self) -> None:
        with suppress(Exception):  # it takes shared memory too
            self._metrics.tell(self._values)

    def _values(self) -> dict[str, int]:
        with self._lock:
            values = dict(self._counts)
        in_flight = values.pop(IN_FLIGHT, 0)
        cache = asdict(self._cache.counts)
        values.update({CACHE_METRICS[name]: cache[name] for name in cache})
        # The last one last: once nothing is in flight, the others are told.
        return {**values, IN_FLIGHT: in_flight}
