"""A page of our own: its files, and the routes that it asks with, beside those of other viewers.

The page's slot is that of any viewer (`/claim`, `/heartbeat`, `/release`); what it does there is
below `/study`. A browser cannot send a slot's token to another origin's server without that one's
leave, which nobody gets here; nor may another name of this machine stand in the address, which a
page elsewhere could have made it (DNS rebinding), unless there is a key, which such a page lacks.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from ..core.errors import InputError, MissingError
from ..outputs.files import ENDINGS
from ..volumes.embeddings import SharedPredictor
from .application import SLACK_BYTES, Fields, ViewerServer
from .leases import Lease
from .marks import flag, read_box, read_point
from .refusal import NotServedError
from .study import COLOURS, PageStudy, inflated, read_named, shown_nifti
from .uploads import Upload, read_upload, read_uploaded
from .workspace import Redrawn, WorkRules

CARD = "MODEL_CARD.md"
"""Named in the note of the weights that it describes."""
FOLDER = Path(__file__).with_name("page_files")
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_SIDE = 16_384
"""Pixels of a slice's side, which most graphics hardware shows."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageRules:
    """What a page is told, and from where it may come.

    Attributes:
        model: name of the model, in words.
        note: what the user must know of it.
        weights: what is known of them, see `Artefact.weights`.
        figures: of the gate, see `Artefact.figures`.
        card: the model card's text, where there is one.
        licence: of the weights, in words.
        only_local: answer to names of this machine alone.
    """

    model: str
    note: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    licence: str = "that which came with the weights"
    only_local: bool = False


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


class Page:
    """Adds the page and its routes to a server.

    Args:
        server: of viewers.
        shared: the model.
        work: how it answers.
        rules: see `PageRules`.
    """

    def __init__(
        self, server: ViewerServer, shared: SharedPredictor, work: WorkRules, rules: PageRules
    ) -> None:
        self._server, self._shared, self._work, self._rules = server, shared, work, rules
        self._reading = asyncio.Lock()
        routes: dict[str, Callable[[Request], Any]] = {
            "open": self._open,
            "pixels": self._pixels,
            "mark": self._changing(_mark),
            "undo": self._changing(lambda study, fields: study.undo(_label(fields))),
            "clear": self._changing(lambda study, fields: study.clear(_label(fields))),
            "masks": self._masks,
            "save": self._save,
        }
        for name, answer in routes.items():
            server.add_route("POST", f"/study/{name}", self._own(answer))
        server.add_route("GET", "/study/about", self._own(self._about))
        server.add_route("GET", "/", self._own(self._index), needs_key=False)
        server.app.mount("/page", _Files(directory=FOLDER))

    def _own(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Answer only what this server's own page asks."""

        async def checked(request: Request) -> Response:
            self._check_origin(request)
            try:
                response: Response = await answer(request)
            except MissingError as error:
                raise NotServedError(501, error.message) from error
            response.headers.update(_HEADERS)
            return response

        return checked

    def _check_origin(self, request: Request) -> None:
        site = request.headers.get("sec-fetch-site", "same-origin")
        is_visit = request.headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not is_visit:
            raise NotServedError(403, "another site's page may not ask here")
        if not self._rules.only_local:
            return
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        names = [f"//{host}", *([] if origin is None else [origin])]
        if any(_host_name(name) not in LOCAL_NAMES for name in names):
            raise NotServedError(
                403, f"this server answers to {', '.join(LOCAL_NAMES)} alone: a key opens it"
            )

    async def _index(self, request: Request) -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html; charset=utf-8")

    async def _about(self, request: Request) -> Response:
        rules = self._rules
        source = str(rules.weights.get("source") or "")
        weights = {**rules.weights, "source": source.replace("\\", "/").rpartition("/")[2]}
        return JSONResponse(
            {
                **vars(rules),
                "weights": weights,
                "answer_within_s": self._work.deadline_s,
                "window": self._work.window,
                "max_voxels": self._server.max_voxels,
                "colours": COLOURS,
            }
        )

    async def _open(self, request: Request) -> Response:
        server, lease = self._server, self._server.find_lease(request)
        async with server.leases.acting(lease):
            with server.leases.room(lease) as take:
                limit = server.max_voxels * 8 + SLACK_BYTES
                body = await server.read_body(request, limit, take)
                start = time.perf_counter()
                async with self._reading:  # one at a time: only the reader knows how large it is
                    study = await run_in_threadpool(lambda: self._study(body))
                take(study.nbytes)
                if lease.study is not None:
                    lease.study.close()
                lease.study = study
                seen = server.reception.seen
                lease.image = await run_in_threadpool(seen, study.image.pixels)
            lease.held_bytes = study.nbytes
        image = study.image
        return JSONResponse(
            {
                "shape": image.shape,
                "kind": image.kind,
                "spacing_mm": image.spacing_mm,
                "values": str(image.intensity),
                "notes": image.notes,
                "formats": {name: ENDINGS[name] for name in study.formats},
                "seconds": time.perf_counter() - start,
            }
        )

    def _study(self, body: bytearray) -> PageStudy:
        upload = read_upload(body)
        if upload.window is None and self._work.window is not None:
            upload = Upload(upload.files, self._work.window, upload.series)
        try:
            image = read_uploaded(upload)
        except NotServedError:
            raise
        except InputError as error:
            raise InputError("\n".join((error.message, *error.details))) from error
        depth, height, width = image.shape
        if depth * height * width > self._server.max_voxels or max(image.shape) > MAX_SIDE:
            raise NotServedError(
                413,
                f"an image of {depth}×{height}×{width} voxels: this server's page takes "
                f"{self._server.max_voxels}, and {MAX_SIDE} along a side",
            )
        return PageStudy(self._shared, self._work, image, upload if image.kind == "dicom" else None)

    async def _pixels(self, request: Request) -> Response:
        lease = self._server.find_lease(request)
        async with self._server.leases.acting(lease):
            study = _study_of(lease)
            content = await run_in_threadpool(lambda: shown_nifti(study.image))
        return Response(content, media_type="application/octet-stream")

    def _changing(
        self, work: Callable[[PageStudy, Fields], Redrawn | None]
    ) -> Callable[[Request], Any]:
        async def route(request: Request) -> Response:
            lease = self._server.find_lease(request)
            async with self._server.leases.acting(lease):
                study = _study_of(lease)
                fields = await self._server.read_fields(request)
                return await run_in_threadpool(lambda: _timed(lambda: work(study, fields)))

        return route

    async def _masks(self, request: Request) -> Response:
        server, lease = self._server, self._server.find_lease(request)
        async with server.leases.acting(lease):
            with server.leases.room(lease) as take:
                study = _study_of(lease)
                voxels = int(np.prod(study.image.shape))
                body = await server.read_body(request, voxels + SLACK_BYTES, take)
                take(voxels)

                def work() -> None:
                    labels = np.frombuffer(inflated(body, voxels), np.uint8)
                    study.seed(labels.reshape(study.image.shape))

                await run_in_threadpool(work)
        return JSONResponse({"ok": True})

    async def _save(self, request: Request) -> Response:
        lease = self._server.find_lease(request)
        async with self._server.leases.acting(lease):
            study = _study_of(lease)
            fields = await self._server.read_fields(request)
            name, named = str(fields.get("format")), read_named(fields)
            rules = self._rules
            content = await run_in_threadpool(
                lambda: study.saved(name, named, rules.model, rules.note)
            )
        return Response(content, media_type="application/octet-stream")


def _study_of(lease: Lease) -> PageStudy:
    if not isinstance(lease.study, PageStudy):
        raise InputError("no image: open one first")
    return lease.study


def _mark(study: PageStudy, fields: Fields) -> Redrawn:
    shape = study.image.shape
    mark = read_box(fields, shape) if "bbox_coords" in fields else read_point(fields, shape)
    return study.mark(_label(fields), mark, through=flag(fields, "through"))


def _label(fields: Fields) -> int:
    label = fields.get("label")
    if type(label) is not int or not 1 <= label <= len(COLOURS):
        raise InputError(f"label {label!r:.40}: expected 1 to {len(COLOURS)}")
    return label


def _timed(work: Callable[[], Redrawn | None]) -> Response:
    """What a page draws: the changed box, whole, and how long that took."""
    start = time.perf_counter()
    found = work()
    meta: dict[str, Any] = {"seconds": time.perf_counter() - start, "box": None}
    meta["has_run"] = found is not None and found.has_run
    meta["is_late"] = found is not None and found.is_late
    content = b""
    if found is not None and found.extent is not None and found.mask is not None:
        meta["box"] = [[int(first), int(end)] for first, end in found.extent]
        content = found.mask.astype(np.uint8).tobytes()
    return Response(
        gzip.compress(content, 1),
        media_type="application/octet-stream",
        headers={"X-Meta": json.dumps(meta), "Content-Encoding": "gzip"},
    )


def _host_name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
