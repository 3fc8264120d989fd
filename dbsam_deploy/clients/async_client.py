"""The asyncio client of a Triton server's ensembles; `dbsam_deploy.client` has the blocking one."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from ..core.errors import ServingError
from ..core.masks import Prediction
from .calls import (
    BOX_MODEL,
    Arrays,
    Call,
    Protocol,
    box_call,
    box_result,
    check_options,
    load_library,
    mask_side,
    prompt_call,
    prompt_result,
    read_result,
    tensors,
    translated,
)
from .shared_memory import (
    CLOSE_WAIT_S,
    IN_USE_PAUSE_S,
    RegionPool,
    SharedRegion,
    is_in_use,
    region_size,
    warn_registered,
)


class AsyncDbsamClient:
    """`client.DbsamClient` for asyncio; any number of requests may be in flight.

    Make it inside a running loop and close it with `async with` or `await close()`. Arguments and
    errors are those of `DbsamClient`.
    """

    def __init__(
        self,
        url: str,
        protocol: Protocol = "grpc",
        *,
        shared_memory: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        check_options(url, protocol, timeout_s)
        self.url, self.protocol = url, protocol
        self._shared = shared_memory
        self._pool = RegionPool()
        self._library = load_library(f"tritonclient.{protocol}")
        self._refused = load_library("tritonclient.utils").InferenceServerException
        self._timeout: dict[str, float] = {}
        self._errors: tuple[type[BaseException], ...] = ()
        self._side: int | None = None
        transport = load_library(f"tritonclient.{protocol}.aio")
        if protocol == "grpc":
            self._timeout = {"client_timeout": timeout_s}
            self._client = transport.InferenceServerClient(url)
        else:
            self._errors = (load_library("aiohttp").ClientError,)
            self._client = transport.InferenceServerClient(url, conn_timeout=timeout_s)

    async def segment(
        self,
        image: npt.NDArray[Any],
        boxes: npt.NDArray[Any],
        *,
        logits: bool = False,
        check: bool = True,
    ) -> Prediction:
        """See `DbsamClient.segment`."""
        side = await self._mask_side() if logits else None
        call = box_call(image, boxes, side=side, check=check)
        return box_result(await self._run(call), call.spec)

    async def segment_prompts(
        self,
        image: npt.NDArray[Any],
        *,
        boxes: npt.NDArray[Any] | None = None,
        point_coords: npt.NDArray[Any] | None = None,
        point_labels: npt.NDArray[Any] | None = None,
        mask_input: npt.NDArray[Any] | None = None,
        multimask: bool = False,
    ) -> Prediction:
        """See `DbsamClient.segment_prompts`."""
        call = prompt_call(
            image,
            await self._mask_side(),
            boxes=boxes,
            point_coords=point_coords,
            point_labels=point_labels,
            mask_input=mask_input,
        )
        return prompt_result(await self._run(call), call.spec, multimask=multimask)

    async def _mask_side(self) -> int:
        if self._side is None:
            with translated(self.url, *self._errors):
                metadata = await self._client.get_model_metadata(BOX_MODEL, **self._timeout)
            self._side = mask_side(metadata)
        return self._side

    async def _run(self, call: Call) -> Arrays:
        with translated(self.url, *self._errors):
            if not self._shared:
                return await self._infer(call, None)
            region = await self._region(region_size(call.regions()[1]))
            try:
                arrays = await self._infer(call, region)
            except BaseException:
                self._pool.retire(region)
                raise
            self._pool.idle.append(region)
            return arrays

    async def _region(self, size: int) -> SharedRegion:
        region = self._pool.take(size)
        if region is None:
            await self._unregister(wait_s=0)
            region = SharedRegion(size)
            try:
                await self._client.register_system_shared_memory(
                    region.name, region.key, region.size, **self._timeout
                )
            except (self._refused, OSError):
                region.unlink()
                raise
            except BaseException:  # cancelled: the server may have registered it
                self._pool.retire(region)
                raise
        return region

    async def _unregister(self, *, wait_s: float) -> None:
        """See `DbsamClient._unregister`; names are claimed first, other requests may run."""
        names, self._pool.stale = self._pool.stale, []
        deadline = time.monotonic() + wait_s
        while names:
            try:
                await self._client.unregister_system_shared_memory(names[-1], **self._timeout)
            except self._refused as error:
                if not is_in_use(error):
                    raise
                if time.monotonic() >= deadline:
                    break
                await asyncio.sleep(IN_USE_PAUSE_S)
            else:
                names.pop()
        self._pool.stale += names

    async def _infer(self, call: Call, region: SharedRegion | None) -> Arrays:
        inputs, outputs = tensors(self._library, call, region)
        result = await self._client.infer(call.spec.name, inputs, outputs=outputs, **self._timeout)
        return read_result(call, result, region)

    async def close(self) -> None:
        """See `DbsamClient.close`."""
        self._pool.retire_all()
        try:
            with translated(self.url, *self._errors):
                await self._unregister(wait_s=CLOSE_WAIT_S)
        except ServingError as error:
            warn_registered(str(error))
        finally:
            await self._client.close()
        if self._pool.stale:
            warn_registered("a request still uses it")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
