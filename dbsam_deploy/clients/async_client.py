"""The asyncio client of a Triton server's ensembles; `dbsam_deploy.client` has the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, Unpack

import numpy.typing as npt

from ..core.masks import Prediction
from ..core.prompts import PromptArrays
from .calls import CHANNEL, BoxOptions, load_library
from .exchange import Exchanges, carry_out
from .known_images import KnownImage, KnownPrompts
from .retries import ServerRequest


class AsyncDbsamClient(Exchanges):
    """`client.DbsamClient` for asyncio; any number of requests may be in flight.

    Make it inside a running loop and close it with `async with` or `await close()`. Arguments and
    errors are those of `DbsamClient`.
    """

    def _connect(self, timeout_s: float) -> Any:
        transport = load_library(f"tritonclient.{self.transport}.aio")
        if self.transport == "grpc":
            options = {} if self._access is None else self._access.grpc_options()
            return transport.InferenceServerClient(self.url, channel_args=list(CHANNEL), **options)
        self._errors = (load_library("aiohttp").ClientError,)
        options = {} if self._access is None else {"ssl_context": self._access.context()}
        return transport.InferenceServerClient(
            self.url, conn_timeout=timeout_s, ssl=bool(options), **options
        )

    def _ask(
        self, request: ServerRequest, method: Callable[..., Any], *args: Any, **options: Any
    ) -> Callable[[], Any]:
        if self.transport == "grpc":
            return super()._ask(request, method, *args, **options)
        left_s, options = request.left_s(), self._with_login(options)

        async def ask() -> Any:  # this transport knows no time limit of one call
            async with asyncio.timeout(left_s):
                return await method(*args, **options)

        return ask

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def segment(
        self, image: npt.NDArray[Any], boxes: npt.NDArray[Any], **options: Unpack[BoxOptions]
    ) -> Prediction:
        """See `DbsamClient.segment`."""
        return await carry_out(self._boxes(image, boxes, **options), _awaited)

    async def segment_prompts(
        self, image: npt.NDArray[Any], *, multimask: bool = False, **prompts: Unpack[PromptArrays]
    ) -> Prediction:
        """See `DbsamClient.segment_prompts`."""
        return await carry_out(self._prompts(image, multimask=multimask, **prompts), _awaited)

    async def open(self, image: npt.NDArray[Any]) -> AsyncOpenImage:
        """See `DbsamClient.open`."""
        return AsyncOpenImage(self, await carry_out(self._open(image), _awaited))

    async def close(self) -> None:
        """See `DbsamClient.close`."""
        await carry_out(self._closing(), _awaited)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


class AsyncOpenImage:
    """`client.OpenImage` for asyncio."""

    def __init__(self, client: AsyncDbsamClient, known: KnownImage) -> None:
        self._client, self.known = client, known

    async def predict(self, **asked: Unpack[KnownPrompts]) -> Prediction:
        """See `client.OpenImage.predict`."""
        return await carry_out(self._client._known_prompts(self.known, **asked), _awaited)


async def _awaited(call: Callable[[], Any]) -> Any:
    return await call()
