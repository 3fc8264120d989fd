"""What a Triton client does apart from waiting: requests, retries, shared memory, answers, errors.

An exchange is a generator. It yields a call of the transport, is sent what the call gave (or thrown
what it raised), and returns the result. `client.DbsamClient` runs one by calling, in the thread;
`async_client.AsyncDbsamClient` by awaiting, in the event loop. Nothing else differs between them.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import partial
from typing import Any, TypeVar, Unpack

import numpy.typing as npt

from ..core.contract import CACHED
from ..core.errors import InputError, NoServerError, NotKeptError, ServingError, StoppingError
from ..core.imaging import Arrays
from ..core.masks import Prediction
from ..core.points import PointRules
from ..core.prompts import DecoderPrompts, PromptArrays, boxes_alone
from ..serving.control import KEY_HEADER, KEY_VARIABLE
from .access import Access
from .calls import (
    BOX_MODEL,
    IMAGE_HEADER,
    Call,
    box_call,
    box_result,
    check_options,
    load_library,
    mask_side,
    parameters_of,
    points_rules,
    prompt_call,
    prompt_result,
    read_result,
    tensors,
    weights_note,
)
from .failures import translated
from .known_images import (
    KNOWN_MODEL,
    KnownImage,
    Wanted,
    check_opened,
    has_earlier_mask,
    known_boxes_call,
    known_prompts_call,
    known_result,
    open_call,
    with_pixels,
)
from .retries import DEFAULT_RETRIES, Retries, ServerRequest, Transport
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

_KEY_HEADERS = {"grpc": f"triton-grpc-protocol-{KEY_HEADER}", "http": KEY_HEADER}
_LOG = logging.getLogger(__name__)

_grpc_process: int | None = None
"""The process in which gRPC was first used; one forked from it cannot use gRPC."""


def _claim_grpc() -> None:
    """Remember that this process uses gRPC.

    Raises:
        InputError: it was forked from one that did.
    """
    global _grpc_process
    if _grpc_process is None:
        _grpc_process = os.getpid()
    elif _grpc_process != os.getpid():
        raise InputError(
            "this process was forked from one that had made a gRPC client, and gRPC does not "
            "survive that: start processes by `spawn`, make the first client after the fork, or "
            "use transport http"
        )


async def carry_out(
    exchange: Exchange[Returned], answer: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> Returned:
    """Run an exchange to its end; `answer` gives or raises what a call of the transport does."""
    try:
        call = next(exchange)
        while True:
            try:
                answered = await answer(call)
            except BaseException as error:
                call = exchange.throw(error)
            else:
                call = exchange.send(answered)
    except StopIteration as end:
        result: Returned = end.value
        return result


class Exchanges(ABC):
    """One client's connection and its exchanges; other exchanges may run while one waits.

    Args:
        url: host:port.
        transport: `grpc` or `http`.
        shared_memory: move images and masks through shared memory.
        timeout_s: how long one request may take, all attempts together; the server is told, too.
        retries: when a refused request is sent again.
        key: of the server's restricted interfaces, which shared memory needs; by default that of
            the environment's DBSAM_SERVER_KEY, if there is one.
        packed: masks of opened images come as compressed bits, unless through shared memory.
        access: TLS and a login, for a proxy before the server.

    Raises:
        EngineError: `tritonclient` is not installed.
        InputError: an unusable option, or gRPC in a process forked from one that used it.
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
        retries: Retries = DEFAULT_RETRIES,
        key: str | None = None,
        packed: bool = True,
        access: Access | None = None,
    ) -> None:
        check_options(url, transport, timeout_s)
        self.url, self.transport = url, transport
        self._timeout_s, self._retries = timeout_s, retries
        self._shared = shared_memory
        self._pool = RegionPool()
        self._packed = packed and not shared_memory
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        self._headers = {"headers": {_KEY_HEADERS[transport]: key}} if key else {}
        self._access = access
        self._library = load_library(f"tritonclient.{transport}")
        self._refused = load_library("tritonclient.utils").InferenceServerException
        self._side: int | None = None
        self._config: Mapping[str, str] | None = None
        self._closed = False
        if transport == "grpc":
            _claim_grpc()
        self._client = self._connect(timeout_s)

    @abstractmethod
    def _connect(self, timeout_s: float) -> Any:
        """`tritonclient`'s client of the transport; its methods are what exchanges yield."""

    @abstractmethod
    def _pause(self, seconds: float) -> Any:
        """Wait while the server is busy."""

    def _ask(
        self, request: ServerRequest, method: Callable[..., Any], *args: Any, **options: Any
    ) -> Callable[[], Any]:
        """A call of the transport that ends when the request's time does."""
        options = self._with_login(options)
        return partial(method, *args, **options, client_timeout=request.left_s())

    def _with_login(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a call, with the headers of the client's login."""
        if self._access is None or not self._access.headers:
            return options
        return {**options, "headers": {**options.get("headers", {}), **self._access.headers}}

    def _begin(self) -> ServerRequest:
        """A new request of the caller.

        Raises:
            InputError: this client was closed, or cannot be used in this process.
        """
        if self._closed:
            raise InputError(f"this client of {self.url} is closed: make another one")
        if self.transport == "grpc":
            _claim_grpc()
        return ServerRequest(self.url, self.transport, self._timeout_s)

    def _boxes(
        self,
        image: npt.NDArray[Any],
        boxes: npt.NDArray[Any],
        *,
        logits: bool = False,
        check: bool = True,
    ) -> Exchange[Prediction]:
        request = self._begin()
        side = (yield from self._mask_side(request)) if logits else None
        call = box_call(image, boxes, side=side, check=check)
        arrays = yield from self._run(call, request)
        return box_result(arrays, call.spec)

    def _prompts(
        self, image: npt.NDArray[Any], *, multimask: bool, **prompts: Unpack[PromptArrays]
    ) -> Exchange[Prediction]:
        request = self._begin()
        side = yield from self._mask_side(request)
        call = prompt_call(image, side, **prompts)
        arrays = yield from self._run(call, request)
        return prompt_result(arrays, call.spec, multimask=multimask)

    def _open(self, image: npt.NDArray[Any]) -> Exchange[KnownImage]:
        request, known = self._begin(), KnownImage.of(image)
        arrays = yield from self._ask_known(open_call(known), known, request)
        check_opened(arrays, known)
        known.cached = bool(arrays[CACHED.name][0])
        return known

    def _known_boxes(
        self, image: KnownImage, boxes: npt.NDArray[Any], *, logits: bool
    ) -> Exchange[Prediction]:
        request = self._begin()
        side = (yield from self._mask_side(request)) if logits else 1
        call = known_boxes_call(image, boxes, Wanted(side, logits, self._packed))
        arrays = yield from self._ask_known(call, image, request)
        return known_result(arrays, image)

    def _known_prompts(
        self,
        image: KnownImage,
        *,
        logits: bool = False,
        boxes_apart: bool = True,
        **asked: Unpack[DecoderPrompts],
    ) -> Exchange[Prediction]:
        """Masks of a kept image; of boxes alone by the box decoder, if they go `boxes_apart`."""
        boxes = boxes_alone(**asked) if boxes_apart else None
        if boxes is not None:
            return (yield from self._known_boxes(image, boxes, logits=logits))
        request = self._begin()
        sized = logits or has_earlier_mask(**asked)
        side = (yield from self._mask_side(request)) if sized else 1
        wanted = Wanted(side, logits, self._packed)
        call = known_prompts_call(image, wanted, **asked)
        arrays = yield from self._ask_known(call, image, request)
        return known_result(arrays, image)

    def _ask_known(self, call: Call, image: KnownImage, request: ServerRequest) -> Exchange[Arrays]:
        """Ask by the image's id, and with the image itself where the server lacks it."""
        try:
            return (yield from self._run(call, request))
        except NotKeptError:
            _LOG.debug("request %s: the image itself is sent", request.id)
        return (yield from self._run(with_pixels(call, image), request))

    def _mask_side(self, request: ServerRequest) -> Exchange[int]:
        if self._side is None:

            def attempt() -> Exchange[Any]:
                return (yield self._ask(request, self._client.get_model_metadata, BOX_MODEL))

            self._side = mask_side((yield from self._attempts(request, attempt)))
        return self._side

    def _note(self) -> Exchange[str]:
        return weights_note((yield from self._parameters()))

    def _points(self) -> Exchange[PointRules | None]:
        return points_rules((yield from self._parameters()))

    def _parameters(self) -> Exchange[Mapping[str, str]]:
        """What the front model's configuration says; asked once."""
        if self._config is None:
            request = self._begin()

            def attempt() -> Exchange[Any]:
                return (yield self._ask(request, self._client.get_model_config, KNOWN_MODEL))

            self._config = parameters_of((yield from self._attempts(request, attempt)))
        return self._config

    def _run(self, call: Call, request: ServerRequest) -> Exchange[Arrays]:
        return (yield from self._attempts(request, partial(self._attempt, call, request)))

    def _attempts(
        self, request: ServerRequest, attempt: Callable[[], Exchange[Returned]]
    ) -> Exchange[Returned]:
        """Send a request until it is answered, as often and as long as it may be."""
        sent, stopping = 0, None
        while True:
            sent += 1
            _LOG.debug("request %s to %s, attempt %d", request.id, request.url, sent)
            try:
                with translated(request, *self._errors):
                    return (yield from attempt())
            except ServingError as error:
                pause_s = self._retries.pause_s(sent, error)
                if pause_s is None or pause_s >= request.ends - time.monotonic():
                    if stopping is not None and isinstance(error, NoServerError):
                        raise stopping from error  # it said so before it went
                    raise
                stopping = error if isinstance(error, StoppingError) else stopping
                _LOG.warning("%s; attempt %d in %.3f s", error, sent + 1, pause_s)
            yield partial(self._pause, pause_s)

    def _attempt(self, call: Call, request: ServerRequest) -> Exchange[Arrays]:
        if not self._shared:
            return (yield from self._infer(call, None, request))
        region = yield from self._region(region_size(call.regions()[1]), request)
        try:
            arrays = yield from self._infer(call, region, request)
        except BaseException:
            self._pool.retire(region)
            raise
        self._pool.give_back(region)
        return arrays

    def _infer(
        self, call: Call, region: SharedRegion | None, request: ServerRequest
    ) -> Exchange[Arrays]:
        inputs, outputs = tensors(self._library, call, region)
        result = yield self._ask(
            request,
            self._client.infer,
            call.spec.name,
            inputs,
            outputs=outputs,
            request_id=request.id,
            timeout=int(request.left_s() * 1e6),
            **({"headers": {IMAGE_HEADER: call.image}} if call.image else {}),
        )
        return read_result(call, result, region)

    def _region(self, size: int, request: ServerRequest) -> Exchange[SharedRegion]:
        region = self._pool.take(size)
        if region is None:
            yield from self._unregister(request, wait_s=0)
            region = SharedRegion(size)
            register = self._client.register_system_shared_memory
            try:
                place = (region.name, region.key, region.size)
                yield self._ask(request, register, *place, **self._headers)
            except (self._refused, OSError):
                region.unlink()
                raise
            except BaseException:  # interrupted or cancelled: the server may have registered it
                self._pool.retire(region)
                raise
        return region

    def _unregister(self, request: ServerRequest, *, wait_s: float) -> Exchange[None]:
        """Let the server forget retired regions; it refuses while a request still uses one.

        The names are claimed first: another exchange may run, and retire more, in between.
        """
        names = self._pool.claim_stale()
        deadline = time.monotonic() + wait_s
        try:
            while names:
                unregister = self._client.unregister_system_shared_memory
                try:
                    yield self._ask(request, unregister, names[-1], **self._headers)
                except self._refused as error:
                    if not is_in_use(error):
                        raise
                    if time.monotonic() >= deadline:
                        break
                    yield partial(self._pause, IN_USE_PAUSE_S)
                else:
                    names.pop()
        finally:
            self._pool.leave_stale(names)

    def _closing(self) -> Exchange[None]:
        if self._closed:
            return
        self._closed = True
        self._pool.retire_all()
        request = ServerRequest(self.url, self.transport, self._timeout_s)
        try:
            with translated(request, *self._errors):
                yield from self._unregister(request, wait_s=CLOSE_WAIT_S)
        except (ServingError, InputError) as error:
            warn_registered(str(error))
        finally:
            yield self._client.close
        if self._pool.claim_stale():
            warn_registered("a request still uses it")
