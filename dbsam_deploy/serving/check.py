"""`dbsam serve --check`: whether a server answers, and answers right; for probes of any kind.

It needs NumPy alone over HTTP, and `tritonclient` over gRPC.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..core.contract import IOU_SCORES, MASK_INPUT, MASKS, TRITON_TYPES
from ..core.errors import InputError, ServingError
from ..core.imaging import Arrays
from ..extras import require
from . import probe
from .known_answer import compare
from .repository import read_repository

_SCHEMES = {"": "http", "http": "http", "grpc": "grpc", "triton": "grpc"}


def check_server(url: str, repository: Path | None = None, *, timeout_s: float = 30.0) -> str:
    """Ask each model that clients use, and look at the answers.

    Args:
        url: `host:port` or `http://host:port` (HTTP), `triton://host:port` or `grpc://…` (gRPC).
        repository: the repository that it serves: all its models have to answer what it says. Else
            those that the server has, and any mask will do.
        timeout_s: for all of it.

    Returns:
        One line.

    Raises:
        InputError: an unusable url or repository.
        ServingError: it is not healthy, and why.
    """
    server = _server(url)
    known: dict[str, Any] = {}
    models: list[str] | None = None
    if repository is not None:
        found = read_repository(repository)
        known, prompts = found.known_answers, "prompt_decoder" in found.platforms
        models = [name for name in probe.SERVED if prompts or name != probe.PROMPTS_MODEL]
    began = time.monotonic()
    end = began + timeout_s
    try:
        answered = []
        for model in probe.SERVED if models is None else models:
            if models is None and not server.has(model, _left(end)):
                continue
            image = probe.probe_image()
            answer = server.ask(model, image, _left(end))
            probe.check_answer(model, answer, image.shape[:2], url)
            compare(model, answer, known)
            answered.append(model)
        if not answered:
            raise ServingError(f"{url} serves none of {', '.join(probe.SERVED)}")
    except ServingError as error:
        if probe.is_overload(error.message):
            return f"alive: {error.message}"
        raise
    finally:
        server.close()
    how = " as its repository says" if known else ""
    return f"healthy: {', '.join(answered)} answered{how} in {time.monotonic() - began:.2f} s"


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise ServingError("no time is left for the next model")
    return left


class _Http:
    def __init__(self, url: str) -> None:
        self.url = url

    def has(self, model: str, timeout_s: float) -> bool:
        return probe.is_served(self.url, model, timeout_s)

    def ask(self, model: str, image: Any, timeout_s: float) -> Arrays:
        return probe.ask(self.url, model, timeout_s=timeout_s, image=image)

    def close(self) -> None:
        pass


class _Grpc:
    def __init__(self, url: str) -> None:
        self.url = url
        self._library = require("tritonclient.grpc", extra="client", what_for="a check over gRPC")
        self._client = self._library.InferenceServerClient(url)

    def has(self, model: str, timeout_s: float) -> bool:
        try:
            self._call(lambda: self._client.get_model_metadata(model, client_timeout=timeout_s))
        except ServingError as error:
            if "is not found" in error.message:
                return False
            raise
        return True

    def ask(self, model: str, image: Any, timeout_s: float) -> Arrays:
        side = 0
        if model == probe.PROMPTS_MODEL:
            told = self._call(
                lambda: self._client.get_model_metadata(model, client_timeout=timeout_s)
            )
            side = next(int(item.shape[-1]) for item in told.inputs if item.name == MASK_INPUT)
        inputs = []
        for name, array in probe.question(model, image, side).items():
            dtype = TRITON_TYPES[str(array.dtype)]
            inputs.append(self._library.InferInput(name, list(array.shape), dtype))
            inputs[-1].set_data_from_numpy(array)
        names = (MASKS.name, IOU_SCORES.name)
        outputs = [self._library.InferRequestedOutput(name) for name in names]
        answer = self._call(
            lambda: self._client.infer(model, inputs, outputs=outputs, client_timeout=timeout_s)
        )
        return {name: answer.as_numpy(name) for name in names}

    def close(self) -> None:
        self._client.close()

    def _call(self, call: Any) -> Any:
        try:
            return call()
        except self._library.InferenceServerException as error:
            raise ServingError(f"{self.url}: {error.message()}") from error


def _server(url: str) -> _Http | _Grpc:
    parts = urlsplit(url if "://" in url else f"//{url}")
    try:
        good = parts.scheme in _SCHEMES and parts.hostname and parts.port
    except ValueError:
        good = False
    if not good or parts.path or parts.query:
        raise InputError(
            f"{url!r}: expected host:port for HTTP or triton://host:port for gRPC, for example "
            "localhost:8000"
        )
    return _Http(parts.netloc) if _SCHEMES[parts.scheme] == "http" else _Grpc(parts.netloc)
