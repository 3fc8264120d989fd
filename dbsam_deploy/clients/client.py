"""The blocking client of a Triton server's ensembles; `async_client` has the asyncio one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self, Unpack

import numpy.typing as npt

from ..core.masks import Prediction
from ..core.points import PointRules
from ..core.prompts import PromptArrays
from .calls import CHANNEL, BoxOptions
from .exchange import Exchange, Exchanges, Returned, carry_out
from .http_connection import HttpConnection
from .known_images import KnownImage, KnownPrompts


class DbsamClient(Exchanges):
    """A blocking client; a context manager that closes its connections.

    Threads may share one: over gRPC their requests share a channel, over HTTP each takes a
    connection of a pool. A process forked from the client's own may use it over HTTP, with
    connections of its own; gRPC does not survive a fork, and is refused there.

    Args:
        url: host:port, by default 8001 for gRPC and 8000 for HTTP.
        transport: `grpc` or `http`.
        shared_memory: move images and masks through shared memory; the server must be on this
            machine (and in a container share its /dev/shm).
        timeout_s: how long one request may take, all attempts together; the server is told, too.
        retries: when a refused request is sent again, see `Retries`.
        key: of the server's restricted interfaces, which shared memory needs; by default that of
            the environment's DBSAM_SERVER_KEY, if there is one.
        packed: masks of opened images come as compressed bits, unless through shared memory.
        access: TLS and a login, for a proxy before the server, see `Access`.

    Raises:
        EngineError: `tritonclient` is not installed.
        InputError: an unusable option, or gRPC in a process forked from one that used it.
    """

    def _connect(self, timeout_s: float) -> Any:
        if self.transport == "grpc":
            options = {} if self._access is None else self._access.grpc_options()
            return self._library.InferenceServerClient(
                self.url, channel_args=list(CHANNEL), **options
            )
        return HttpConnection(self.url, self._library, self._access)

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def segment(
        self, image: npt.NDArray[Any], boxes: npt.NDArray[Any], **options: Unpack[BoxOptions]
    ) -> Prediction:
        """One independent mask for each box.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (N, 4) x0, y0, x1, y1 in the image frame.
            **options: `logits` (by default False) and `check` (by default True), see
                `calls.BoxOptions`.

        Returns:
            masks (N, 1, H, W), ious (N, 1) and, if asked for, logits (N, 1, 4G, 4G).

        Raises:
            InputError: an unusable image or box, found here or by the server.
            ServingError: no server, a timeout, or an error inside the server; its subclasses tell
                these apart.
        """
        return _finish(self._boxes(image, boxes, **options))

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
            ServingError: no server, a timeout, or an error inside the server; its subclasses tell
                these apart.
        """
        return _finish(self._prompts(image, multimask=multimask, **prompts))

    def open(self, image: npt.NDArray[Any]) -> OpenImage:
        """An image to prompt many times, which the server encodes once: now, if it lacks it.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            InputError: an unusable image.
            ServingError: see `segment`.
        """
        return OpenImage(self, _finish(self._open(image)))

    def take(self, image: npt.NDArray[Any]) -> OpenImage:
        """As `open`, but nothing is asked before the first prompt.

        Raises:
            InputError: an unusable image.
        """
        return OpenImage(self, KnownImage.of(image))

    def note(self) -> str:
        """What the user must know of the server's weights; empty where they are trained.

        Raises:
            InputError, ServingError: see `segment`.
        """
        return _finish(self._note())

    def points(self) -> PointRules | None:
        """How the server answers prompts with points; None where its repository is older.

        Raises:
            InputError, ServingError: see `segment`.
        """
        return _finish(self._points())

    def close(self) -> None:
        """Free shared memory and close the connection; stop the server after this, not before."""
        _finish(self._closing())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class OpenImage:
    """An image that a server keeps encoded; threads may share it.

    Requests name it by its content. Where the server does not keep it (any more), the image itself
    is sent, and the same request goes on: nobody notices but by the time it takes.

    Attributes:
        known: the image, its id, and whether the last answer needed no encoder (`cached`).
    """

    def __init__(self, client: DbsamClient, known: KnownImage) -> None:
        self._client, self.known = client, known

    def predict(self, **asked: Unpack[KnownPrompts]) -> Prediction:
        """Masks for N prompt sets, see `DbsamClient.segment_prompts`.

        Boxes alone go to the box decoder, as in `DbsamClient.segment`, unless `multimask`.

        Args:
            **asked: the prompts of `core.prompts.PromptArrays`, with `multimask`, `adapt_points`
                and `logits`, see `core.prompts.DecoderPrompts` and `known_images.KnownPrompts`.

        Raises:
            InputError: an unusable prompt, found here or by the server.
            ServingError: see `DbsamClient.segment`.
        """
        return _finish(self._client._known_prompts(self.known, **asked))

    def predict_boxes(self, boxes: npt.NDArray[Any], *, logits: bool = False) -> Prediction:
        """One mask a box, by the box decoder; see `predict`."""
        return _finish(self._client._known_boxes(self.known, boxes, logits=logits))

    def predict_prompts(self, **asked: Unpack[KnownPrompts]) -> Prediction:
        """Masks by the prompt decoder, for boxes alone as well; see `predict`."""
        return _finish(self._client._known_prompts(self.known, boxes_apart=False, **asked))


def _finish(exchange: Exchange[Returned]) -> Returned:
    """Run an exchange to its end by calling what it yields, in a coroutine that never waits."""
    try:
        carry_out(exchange, _called).send(None)
    except StopIteration as end:
        result: Returned = end.value
        return result
    raise AssertionError("unreachable: nothing in it awaits")


async def _called(call: Callable[[], Any]) -> Any:
    return call()
