"""The blocking client of a Triton server's ensembles; `async_client` has the asyncio one."""

from __future__ import annotations

import threading
import time
from typing import Any, Self, Unpack

import numpy.typing as npt

from ..core.errors import InputError
from ..core.masks import Prediction
from ..core.prompts import PromptArrays
from .exchange import Exchange, Exchanges, Returned


class DbsamClient(Exchanges):
    """A blocking client; a context manager that closes its connection.

    One client belongs to one thread; over HTTP another one is refused. Nothing is retried.

    Args:
        url: host:port, by default 8001 for gRPC and 8000 for HTTP.
        transport: `grpc` or `http`.
        shared_memory: move images and masks through shared memory; the server must be on this
            machine (and in a container share its /dev/shm).
        timeout_s: how long one request may take.

    Raises:
        EngineError: `tritonclient` is not installed.
        InputError: an unusable option.
    """

    def _connect(self, timeout_s: float) -> Any:
        self._thread = threading.get_ident()
        if self.transport == "grpc":
            return self._library.InferenceServerClient(self.url)
        return self._library.InferenceServerClient(
            self.url, connection_timeout=timeout_s, network_timeout=timeout_s
        )

    def _check_usable(self) -> None:
        super()._check_usable()
        # tritonclient's HTTP runs on gevent, which hangs or fails in another thread.
        if self.transport == "http" and threading.get_ident() != self._thread:
            raise InputError(
                f"the HTTP client of {self.url} belongs to the thread that made it: make one in "
                "each thread, or use gRPC"
            )

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def segment(
        self,
        image: npt.NDArray[Any],
        boxes: npt.NDArray[Any],
        *,
        logits: bool = False,
        check: bool = True,
    ) -> Prediction:
        """One independent mask for each box.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (N, 4) x0, y0, x1, y1 in the image frame.
            logits: ask for the low-resolution logits too, to prompt again with.
            check: look for mistakes before sending; the server checks again in any case.

        Returns:
            masks (N, 1, H, W), ious (N, 1) and, if asked for, logits (N, 1, 4G, 4G).

        Raises:
            InputError: an unusable image or box, found here or by the server.
            ServingError: no server, a timeout, or an error inside the server.
        """
        return _finish(self._boxes(image, boxes, logits=logits, check=check))

    def segment_prompts(
        self, image: npt.NDArray[Any], *, multimask: bool = False, **prompts: Unpack[PromptArrays]
    ) -> Prediction:
        """Masks for N prompt sets: box, points and an earlier mask, combined.

        Args:
            image: (H, W, 3) uint8 RGB.
            multimask: return the three alternatives instead of the single mask.
            **prompts: `boxes`, `point_coords`, `point_labels` and `mask_input`, see
                `core.prompts.PromptArrays`.

        Returns:
            masks (N, M, H, W), ious (N, M) and logits (N, M, 4G, 4G).

        Raises:
            InputError: an unusable image or prompt, found here or by the server.
            ServingError: no server, a timeout, or an error inside the server.
        """
        return _finish(self._prompts(image, multimask=multimask, **prompts))

    def close(self) -> None:
        """Free shared memory and close the connection; stop the server after this, not before."""
        _finish(self._closing())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _finish(exchange: Exchange[Returned]) -> Returned:
    """Run an exchange to its end by calling what it yields."""
    try:
        call = next(exchange)
        while True:
            try:
                answer = call()
            except BaseException as error:
                call = exchange.throw(error)
            else:
                call = exchange.send(answer)
    except StopIteration as end:
        result: Returned = end.value
        return result
