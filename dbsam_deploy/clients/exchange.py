"""What a Triton client does apart from waiting: requests, shared memory, answers, errors.

An exchange is a generator. It yields a call of the transport, is sent what the call gave (or thrown
what it raised), and returns the result. `client.DbsamClient` runs one by calling, in the thread;
`async_client.AsyncDbsamClient` by awaiting, in the event loop. Nothing else differs between them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar, Unpack

import numpy.typing as npt

from ..core.errors import InputError, ServingError
from ..core.imaging import Arrays
from ..core.masks import Prediction
from ..core.prompts import PromptArrays
from .calls import (
    BOX_MODEL,
    Call,
    Transport,
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

Returned = TypeVar("Returned")
Exchange = Generator[Callable[[], Any], Any, Returned]


class Exchanges(ABC):
    """One client's connection and its exchanges; other exchanges may run while one waits.

    Args:
        url: host:port.
        transport: `grpc` or `http`.
        shared_memory: move images and masks through shared memory.
        timeout_s: how long one request may take.

    Raises:
        EngineError: `tritonclient` is not installed.
        InputError: an unusable option.
    """

    _errors: tuple[type[BaseException], ...] = ()
    """Further exceptions of the transport that mean "no server"."""

    def __init__(
        self,
        url: str,
        transport: Transport = "grpc",
        *,
        shared_memory: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        check_options(url, transport, timeout_s)
        self.url, self.transport = url, transport
        self._shared = shared_memory
        self._pool = RegionPool()
        self._library = load_library(f"tritonclient.{transport}")
        self._refused = load_library("tritonclient.utils").InferenceServerException
        self._timeout = {"client_timeout": timeout_s} if transport == "grpc" else {}
        self._side: int | None = None
        self._closed = False
        self._client = self._connect(timeout_s)

    @abstractmethod
    def _connect(self, timeout_s: float) -> Any:
        """`tritonclient`'s client of the transport; its methods are what exchanges yield."""

    @abstractmethod
    def _pause(self, seconds: float) -> Any:
        """Wait while the server is busy."""

    def _check_usable(self) -> None:
        """Refuse a request that this client cannot send any more.

        Raises:
            InputError: the client was closed.
        """
        if self._closed:
            raise InputError(f"this client of {self.url} is closed: make another one")

    def _boxes(
        self, image: npt.NDArray[Any], boxes: npt.NDArray[Any], *, logits: bool, check: bool
    ) -> Exchange[Prediction]:
        side = (yield from self._mask_side()) if logits else None
        call = box_call(image, boxes, side=side, check=check)
        arrays = yield from self._run(call)
        return box_result(arrays, call.spec)

    def _prompts(
        self, image: npt.NDArray[Any], *, multimask: bool, **prompts: Unpack[PromptArrays]
    ) -> Exchange[Prediction]:
        side = yield from self._mask_side()
        call = prompt_call(image, side, **prompts)
        arrays = yield from self._run(call)
        return prompt_result(arrays, call.spec, multimask=multimask)

    def _mask_side(self) -> Exchange[int]:
        self._check_usable()
        if self._side is None:
            with translated(self.url, *self._errors):
                metadata = yield partial(
                    self._client.get_model_metadata, BOX_MODEL, **self._timeout
                )
            self._side = mask_side(metadata)
        return self._side

    def _run(self, call: Call) -> Exchange[Arrays]:
        self._check_usable()
        with translated(self.url, *self._errors):
            if not self._shared:
                return (yield from self._infer(call, None))
            region = yield from self._region(region_size(call.regions()[1]))
            try:
                arrays = yield from self._infer(call, region)
            except BaseException:
                self._pool.retire(region)
                raise
            self._pool.idle.append(region)
            return arrays

    def _infer(self, call: Call, region: SharedRegion | None) -> Exchange[Arrays]:
        inputs, outputs = tensors(self._library, call, region)
        result = yield partial(
            self._client.infer, call.spec.name, inputs, outputs=outputs, **self._timeout
        )
        return read_result(call, result, region)

    def _region(self, size: int) -> Exchange[SharedRegion]:
        region = self._pool.take(size)
        if region is None:
            yield from self._unregister(wait_s=0)
            region = SharedRegion(size)
            register = self._client.register_system_shared_memory
            try:
                yield partial(register, region.name, region.key, region.size, **self._timeout)
            except (self._refused, OSError):
                region.unlink()
                raise
            except BaseException:  # interrupted or cancelled: the server may have registered it
                self._pool.retire(region)
                raise
        return region

    def _unregister(self, *, wait_s: float) -> Exchange[None]:
        """Let the server forget retired regions; it refuses while a request still uses one.

        The names are claimed first: another exchange may run, and retire more, in between.
        """
        names, self._pool.stale = self._pool.stale, []
        deadline = time.monotonic() + wait_s
        while names:
            unregister = self._client.unregister_system_shared_memory
            try:
                yield partial(unregister, names[-1], **self._timeout)
            except self._refused as error:
                if not is_in_use(error):
                    raise
                if time.monotonic() >= deadline:
                    break
                yield partial(self._pause, IN_USE_PAUSE_S)
            else:
                names.pop()
        self._pool.stale += names

    def _closing(self) -> Exchange[None]:
        if self._closed:
            return
        self._closed = True
        self._pool.retire_all()
        try:
            with translated(self.url, *self._errors):
                yield from self._unregister(wait_s=CLOSE_WAIT_S)
        except ServingError as error:
            warn_registered(str(error))
        finally:
            yield self._client.close
        if self._pool.stale:
            warn_registered("a request still uses it")
