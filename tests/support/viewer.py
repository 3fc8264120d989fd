"""A viewer server on a loopback port, with a stand-in for box-trained weights."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession
from nnInteractive.inference.remote.serialization import pack_array
from scipy import ndimage

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.viewer.application import ViewerServer
from dbsam_deploy.viewer.audit import AuditLog
from dbsam_deploy.viewer.leases import LeaseRules, Leases
from dbsam_deploy.viewer.page import Page, PageRules
from dbsam_deploy.viewer.workspace import WorkRules, Workspace
from dbsam_deploy.volumes.embeddings import EmbeddingStore, SharedPredictor

from .bright import BrightPredictor
from .wedge import SHAPE, WIDE, wedge

BOX = [[5, 6], [8, 25], [12, 40]]
"""Flat, around the wedge on slice 5."""
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Reading the authorities' certificates is what takes a client longest."""
IMAGE = np.where(wedge(), 200, 20).astype(np.uint8)[None]


class BoxTrained(BrightPredictor):
    """Finds what is bright in a box, nothing for a point, and cuts away around points outside.

    Attributes:
        failing: raised by the second question from now.
    """

    failing: BaseException | None = None
    _is_second = False

    def predict_boxes(self, boxes: np.ndarray) -> Prediction:
        """The estimate is the part of the touched pieces that the mask has."""
        if self.failing is not None:
            self._is_second = not self._is_second
            if not self._is_second:
                error, self.failing = self.failing, None
                raise error
        found = super().predict_boxes(boxes)
        pieces, _ = ndimage.label(self._bright)
        ious = np.zeros(found.ious.shape, np.float32)
        for number, mask in enumerate(found.masks[:, 0] != 0):
            touched = np.isin(pieces, np.unique(pieces[mask])) & self._bright
            ious[number] = mask.sum() / max(1, touched.sum()) if mask.any() else 0
        return Prediction(found.masks, ious, found.logits)

    def predict_prompts(self, *, multimask: bool = False, **prompts: Any) -> Prediction:
        """Boxes with points outside."""
        found = self.predict_boxes(prompts["boxes"])
        height, width = found.masks.shape[-2:]
        rows, columns = np.ogrid[:height, :width]
        for mask, points, marks in zip(
            found.masks[:, 0], prompts["point_coords"], prompts["point_labels"], strict=True
        ):
            for x, y in points[marks == 0]:
                mask[(rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < 9] = 0
        return found


class RawViewer:
    """A client without manners, and cheap: no thread, no TLS."""

    def __init__(self, url: str, *, ready: bool = True, image: np.ndarray | None = None) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, verify=_NO_TLS, timeout=60)
        self.http.headers["X-Lease-Token"] = self.post("claim").json()["lease_token"]
        if ready:
            assert self.send("set_image", IMAGE if image is None else image, {}).status_code == 200
            buffer = {"shape": SHAPE, "dtype": "uint8"}
            assert self.post("set_target_buffer", json=buffer).status_code == 200

    def post(self, path: str, **what) -> httpx.Response:
        return self.http.post(f"/{path}", **what)

    def send(self, path: str, body, meta) -> httpx.Response:
        body = pack_array(body) if isinstance(body, np.ndarray) else body
        meta = meta if isinstance(meta, str) else json.dumps(meta)
        return self.post(path, content=body, headers={"X-Meta": meta})


class RunningServer:
    """A server in a thread of this process.

    Attributes:
        url: where it is.
        model: what it asks.
        leases: its slots.
    """

    def __init__(self, url: str, model: BoxTrained, leases: Leases) -> None:
        self.url, self.model, self.leases = url, model, leases

    def client(self, **options: Any) -> nnInteractiveRemoteInferenceSession:
        return nnInteractiveRemoteInferenceSession(server_url=self.url, **options)


@contextlib.contextmanager
def running(
    *,
    key: str | dict[str, str] | None = None,
    audit: AuditLog | None = None,
    prefix: str = "",
    reach: int = 20,
    max_voxels: int = 2**22,
    deadline_s: float = 45.0,
    model: Any = None,
    exact: bool = False,
    **lease_rules: Any,
) -> Iterator[RunningServer]:
    model = BoxTrained() if model is None else model
    shared = SharedPredictor(model, store=EmbeddingStore(exact=exact))
    rules = WorkRules(reach=reach, rule=WIDE, deadline_s=deadline_s)
    leases = Leases(LeaseRules(**lease_rules), lambda: Workspace(shared, rules))
    viewers = ViewerServer(leases, "bright", key=key, max_voxels=max_voxels, audit=audit)
    Page(viewers, shared, rules, PageRules("bright", only_local=key is None))
    app: Any = viewers.app
    if prefix:
        inner, app = app, FastAPI(redirect_slashes=False)
        app.mount(prefix, inner)
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", proxy_headers=False)
    sockets = [config.bind_socket()]
    sockets[0].listen(256)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        port = sockets[0].getsockname()[1]
        yield RunningServer(f"http://127.0.0.1:{port}{prefix}", model, leases)
    finally:
        server.should_exit = True
        thread.join()
        sockets[0].close()
        shared.close()
