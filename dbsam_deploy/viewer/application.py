"""The routes of nnInteractive's HTTP protocol, version 2.6."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..extras import require

for _name in ("fastapi", "starlette"):
    require(_name, extra="viewer", what_for="a server for viewers")

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from ..core.contract import MAX_IMAGE_PIXELS
from ..core.errors import DbsamError, InputError
from .audit import AuditLog
from .leases import Lease, Leases
from .marks import BrushMark, SeedMark, flag, mask_place, read_box, read_buffer, read_point
from .packed import pack, read_header, unpack
from .reception import Reception
from .refusal import NotServedError
from .workspace import Redrawn, Workspace

MAX_SIDE = 2**15
"""Of an image: what is kept of each slice adds up, however small it is."""
SWEEP_S = 15.0
VERSION = "2.6.0+dbsam"
JSON_BYTES = 64 * 1024
"""Of a body that is JSON."""
SLACK_BYTES = 1024 * 1024
"""That packing may add to an array that does not compress."""
_DRAINED_BYTES = 8 * 1024**3
"""Of a body that is refused."""
_LOG = logging.getLogger(__name__)
_CAPABILITIES = {
    "supported_interactions": dict.fromkeys(
        ("points", "bbox2d", "bbox3d", "scribble", "lasso"), True
    ),
    "channel_mapping": {
        "prev_seg": 0,
        "bbox2d": [1, 2],
        "bbox3d": [1, 2],
        "lasso": [1, 2],
        "points": [3, 4],
        "scribble": [5, 6],
    },
    "num_interaction_channels": 7,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": True,
    "preferred_scribble_thickness": [2, 2, 2],
    "interaction_decay": None,
    "inference_session_version": VERSION,
    "supports_undo": True,
    "do_autozoom": True,
    "patch_size": None,
}
Fields = Mapping[str, Any]
JsonWork = Callable[[Workspace, Fields], Redrawn | None]


class ViewerServer:
    """Answers viewers; `app` is the ASGI application, which can be mounted anywhere.

    Args:
        leases: the slots.
        about: the model and what is known of its weights, which viewers show as its licence.
        key: that every request but `/healthz` must name, if any; or the keys of several by name.
        max_voxels: of an image.
        audit: where requests are written down.
    """

    def __init__(
        self,
        leases: Leases,
        about: str,
        *,
        key: str | Mapping[str, str] | None = None,
        max_voxels: int,
        audit: AuditLog | None = None,
    ) -> None:
        self.leases, self.about, self.max_voxels = leases, about, max_voxels
        self.reception = Reception(key, audit)
        self._sweeper: asyncio.Task[None] | None = None
        self._converting = asyncio.Lock()  # what is large takes several times its bytes
        self.app = FastAPI(openapi_url=None, redirect_slashes=False)
        self.add_route("GET", "/healthz", self._healthz, needs_key=False)
        self.add_route("POST", "/claim", self._claim)
        self.add_route("GET", "/capabilities", self._capabilities)
        self.add_route("POST", "/release", self._release)
        self.add_route("POST", "/heartbeat", self._heartbeat)
        self.add_route("GET", "/lease_status", self._lease_status)
        for path, work in _JSON_WORK.items():
            self.add_route("POST", path, self._json_route(work))
        self.add_route("POST", "/set_image", self._set_image)
        for path in ("/add_scribble_interaction", "/add_lasso_interaction"):
            self.add_route("POST", path, self._mask_route)
        self.add_route("POST", "/add_initial_seg_interaction", self._mask_route)

    def add_route(
        self,
        method: str,
        path: str,
        answer: Callable[[Request], Awaitable[Response]],
        *,
        needs_key: bool = True,
    ) -> None:
        """Answer a path; whatever `answer` raises becomes a status and a text."""

        async def guarded(request: Request) -> Response:
            start = time.perf_counter()
            try:
                if needs_key:
                    self.reception.check_key(request)
                await self.reception.check_log(path)
                response = await answer(request)
            except Exception as error:
                status, text, headers = _refusal(error, path)
                response = await self._refuse(request, status, text, **headers)
            await self.reception.note(path, request, response, start)
            return response

        self.app.add_api_route(path, guarded, methods=[method], response_model=None)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def _claim(self, request: Request) -> Response:
        lease, rules = self.leases.claim(), self.leases.rules
        request.state.lease = lease
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())
        return JSONResponse(
            {
                "lease_token": lease.token,
                "idle_timeout_seconds": rules.idle_s,
                "liveness_timeout_seconds": rules.liveness_s,
                "max_sessions": rules.slots,
            }
        )

    async def _sweep(self) -> None:
        while len(self.leases):
            await asyncio.sleep(SWEEP_S)
            self.leases.sweep()

    async def _capabilities(self, request: Request) -> Response:
        return JSONResponse({**_CAPABILITIES, "license": self.about})

    async def _release(self, request: Request) -> Response:
        request.state.lease = self.leases.release(request.headers.get("x-lease-token"))
        return JSONResponse({"released": True})

    async def _heartbeat(self, request: Request) -> Response:
        lease = self.find_lease(request)
        self.leases.see(lease)
        return JSONResponse({"remaining_seconds": self.leases.remaining_s(lease)})

    async def _lease_status(self, request: Request) -> Response:
        left = self.leases.remaining_s(self.find_lease(request))
        idle = self.leases.rules.idle_s
        return JSONResponse({"remaining_seconds": left, "idle_timeout_seconds": idle})

    def find_lease(self, request: Request) -> Lease:
        """The slot that a request names; errors as `Leases.find`."""
        lease = self.leases.find(request.headers.get("x-lease-token"))
        request.state.lease = lease
        return lease

    def _json_route(self, work: JsonWork) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            lease = self.find_lease(request)
            async with self.leases.acting(lease) as own:
                fields = await self.read_fields(request)
                return await run_in_threadpool(lambda: _response(work(own, fields)))

        return route

    async def _set_image(self, request: Request) -> Response:
        lease = self.find_lease(request)
        async with self.leases.acting(lease) as own:
            with self.leases.room(lease) as take:
                fields = header_fields(request)
                limit = self.max_voxels * 8 + SLACK_BYTES
                body = await self.read_body(request, limit, take)
                header = read_header(body)
                voxels = self._checked(header.shape)
                take(header.nbytes + voxels)
                properties = fields.get("image_properties")
                spacing = properties.get("spacing") if isinstance(properties, dict) else None

                def work() -> None:
                    values = unpack(body, header)
                    body.clear()
                    own.set_image(values, spacing)
                    lease.image = self.reception.seen(values[0])

                async with self._converting:
                    await run_in_threadpool(work)
            lease.held_bytes = voxels
        return JSONResponse({"original_image_shape": list(header.shape)})

    def _checked(self, shape: tuple[int, ...]) -> int:
        """The number of an image's voxels.

        Raises:
            NotServedError: 413, it is too large, as a whole, along an axis, or in a slice.
        """
        voxels, sides = math.prod(shape), sorted(shape)
        if voxels > self.max_voxels:
            text = f"an image of {voxels} voxels: this server takes {self.max_voxels}"
            raise NotServedError(413, text)
        if max(shape, default=0) > MAX_SIDE or math.prod(sides[-2:]) > MAX_IMAGE_PIXELS:
            text = f"an image {shape}: at most {MAX_SIDE} slices, of {MAX_IMAGE_PIXELS} pixels"
            raise NotServedError(413, text)
        return voxels

    async def _mask_route(self, request: Request) -> Response:
        lease = self.find_lease(request)
        async with self.leases.acting(lease) as own:
            with self.leases.room(lease) as take:
                fields, shape = header_fields(request), own.shape
                is_seed = request.url.path.endswith("/add_initial_seg_interaction")
                body = await self.read_body(request, math.prod(shape) * 8 + SLACK_BYTES, take)
                header = read_header(body)
                sides = mask_place({} if is_seed else fields, header, shape)
                take(header.nbytes)
                runs = flag(fields, "run_prediction", not is_seed)

                def work() -> Response:
                    voxels = unpack(body, header) != 0
                    if is_seed:
                        return _response(own.seed(SeedMark(voxels), runs=runs))
                    is_inside = flag(fields, "include_interaction")
                    is_lasso = request.url.path.endswith("/add_lasso_interaction")
                    brush = BrushMark("lasso" if is_lasso else "scribble", voxels, sides, is_inside)
                    return _response(own.add(brush if voxels.any() else None, runs=runs))

                asks_model = runs or not is_seed  # which has turns of its own
                async with contextlib.nullcontext() if asks_model else self._converting:
                    return await run_in_threadpool(work)

    async def read_fields(self, request: Request) -> Fields:
        """A body that is a JSON object, or empty; errors as `read_body` and `InputError`."""
        return _json_fields(bytes(await self.read_body(request, JSON_BYTES)) or b"{}", "the body")

    async def read_body(
        self, request: Request, limit: int, take: Callable[[int], None] | None = None
    ) -> bytearray:
        """The request's body, of which no more than is allowed is ever in memory.

        Raises:
            NotServedError: 413, it is longer; 408, it stands still.
        """
        body = bytearray()
        while (chunk := await self._chunk(request)) is not None:
            if len(body) + len(chunk) > limit:
                raise NotServedError(413, f"a body of more than {limit} bytes")
            if take is not None:
                take(len(chunk))
            body += chunk
        return body

    async def _chunk(self, request: Request) -> bytes | None:
        """What came next of a body; None once all did."""
        if not getattr(request.state, "has_more", True):
            return None
        try:
            async with asyncio.timeout(self.leases.rules.upload_s):
                message = await request.receive()
        except TimeoutError as error:
            raise NotServedError(408, "the body stands still") from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        request.state.has_more = message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def _refuse(self, request: Request, status: int, text: str, **headers: str) -> Response:
        """An answer that a viewer sees: a body still on its way is taken in, and dropped."""
        left = _DRAINED_BYTES
        try:
            while left > 0 and (chunk := await self._chunk(request)) is not None:
                left -= len(chunk)
        except (NotServedError, ClientDisconnect):
            left = 0
        if left <= 0:
            headers["Connection"] = "close"
        return JSONResponse({"detail": text}, status, headers)


def _add_point(own: Workspace, fields: Fields) -> Redrawn:
    runs = flag(fields, "run_prediction", True)
    return own.add(read_point(fields, own.shape), runs=runs)


def _add_box(own: Workspace, fields: Fields) -> Redrawn:
    runs = flag(fields, "run_prediction", True)
    return own.add(read_box(fields, own.shape), runs=runs)


def _set_buffer(own: Workspace, fields: Fields) -> None:
    read_buffer(fields, own.shape)
    own.set_buffer()


def _set_autozoom(own: Workspace, fields: Fields) -> None:
    own.goes_through = flag(fields, "do_autozoom")


_JSON_WORK: dict[str, JsonWork] = {
    "/set_target_buffer": _set_buffer,
    "/set_do_autozoom": _set_autozoom,
    "/reset_interactions": lambda own, _: own.reset(),
    "/undo": lambda own, _: own.undo(),
    "/predict": lambda own, _: own.predict(),
    "/add_point_interaction": _add_point,
    "/add_bbox_interaction": _add_box,
}


def _response(answer: Redrawn | None) -> Response:
    """What a viewer reads: an array of the changed box, and where it lies."""
    if answer is None:
        return JSONResponse({"ok": True})
    meta: dict[str, Any] = {"ran_prediction": answer.has_run, "bbox": None}
    body = b""
    if answer.extent is not None and answer.mask is not None:
        meta["bbox"] = [[int(first), int(end)] for first, end in answer.extent]
        meta |= {"dtype": "uint8", "shape": list(answer.mask.shape)}
        body = pack(answer.mask.view(np.uint8))
    headers = {"X-Meta": json.dumps(meta, separators=(",", ":"))}
    return Response(body, media_type="application/octet-stream", headers=headers)


def _refusal(error: Exception, path: str) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers for what went wrong."""
    if isinstance(error, NotServedError):
        return error.status, error.message, {"Retry-After": "10"} if error.status == 503 else {}
    if isinstance(error, InputError):
        return 400, error.message, {}
    if isinstance(error, ClientDisconnect):
        return 400, "the request ended early", {}
    if isinstance(error, MemoryError):
        return 413, "not enough memory for this request", {}
    if isinstance(error, DbsamError):  # of a server that the model runs on
        _LOG.warning("%s", error.message)
        return 502, error.message, {}
    _LOG.error("a request to %s failed", path, exc_info=error)
    # An answer that is whole: else the connection breaks, and with it the viewer's next call.
    return 500, "the server failed, see its log", {"Connection": "close"}


def header_fields(request: Request) -> Fields:
    """The JSON object that goes with a binary body; errors as `_json_fields`."""
    return _json_fields(request.headers.get("x-meta", "{}").encode("latin-1", "replace"), "X-Meta")


def _json_fields(text: bytes, what: str) -> Fields:
    """A JSON object.

    Raises:
        InputError: it is none.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is no JSON") from error
    if not isinstance(fields, dict):
        raise InputError(f"{what} is no JSON object")
    return fields
