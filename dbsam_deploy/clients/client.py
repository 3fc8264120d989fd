"""The blocking client of a Triton server's ensembles; `async_client` has the asyncio one."""

from __future__ import annotations

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


class DbsamClient:
    """A blocking client; a context manager that closes its connection.

    One client belongs to one thread (the HTTP transport is not thread-safe). Nothing is retried.

    Args:
        url: host:port, by default 8001 for gRPC and 8000 for HTTP.
        protocol: `grpc` or `http`.
        shared_memory: move images and masks through shared memory; the server must be on this
            machine (and in a container share its /dev/shm).
        timeout_s: how long one request may take.

    Raises:
        EngineError: `tritonclient` is not installed.
        InputError: an unusable option.
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
        self._side: int | None = None
        if protocol == "grpc":
            self._timeout = {"client_timeout": timeout_s}
            self._client = self._library.InferenceServerClient(url)
        else:
            self._client = self._library.InferenceServerClient(
                url, connection_timeout=timeout_s, network_timeout=timeout_s
            )

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
        side = self._mask_side() if logits else None
        call = box_call(image, boxes, side=side, check=check)
        return box_result(self._run(call), call.spec)

    def segment_prompts(
        self,
        image: npt.NDArray[Any],
        *,
        boxes: npt.NDArray[Any] | None = None,
        point_coords: npt.NDArray[Any] | None = None,
        point_labels: npt.NDArray[Any] | None = None,
        mask_input: npt.NDArray[Any] | None = None,
        multimask: bool = False,
    ) -> Prediction:
        """Masks for N prompt sets: box, points and an earlier mask, combined.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (N, 4) in the image frame.
            point_coords: (N, P, 2) x, y in the image frame.
            point_labels: (N, P) 1 foreground, 0 background, -1 no point.
            mask_input: (N, 4G, 4G) float logits, from an earlier answer's `logits[:, m]`.
            multimask: return the three alternatives instead of the single mask.

        Returns:
            masks (N, M, H, W), ious (N, M) and logits (N, M, 4G, 4G).

        Raises:
            InputError: an unusable image or prompt, found here or by the server.
            ServingError: no server, a timeout, or an error inside the server.
        """
        call = prompt_call(
            image,
            self._mask_side(),
            boxes=boxes,
            point_coords=point_coords,
            point_labels=point_labels,
            mask_input=mask_input,
        )
        return prompt_result(self._run(call), call.spec, multimask=multimask)

    def _mask_side(self) -> int:
        if self._side is None:
            with translated(self.url):
                metadata = self._client.get_model_metadata(BOX_MODEL, **self._timeout)
            self._side = mask_side(metadata)
        return self._side

    def _run(self, call: Call) -> Arrays:
        with translated(self.url):
            if not self._shared:
                return self._infer(call, None)
            region = self._region(region_size(call.regions()[1]))
            try:
                arrays = self._infer(call, region)
            except BaseException:
                self._pool.retire(region)
                raise
            self._pool.idle.append(region)
            return arrays

    def _region(self, size: int) -> SharedRegion:
        region = self._pool.take(size)
        if region is None:
            self._unregister(wait_s=0)
            region = SharedRegion(size)
            try:
                self._client.register_system_shared_memory(
                    region.name, region.key, region.size, **self._timeout
                )
            except (self._refused, OSError):
                region.unlink()
                raise
            except BaseException:  # interrupted: the server may have registered it
                self._pool.retire(region)
                raise
        return region

    def _unregister(self, *, wait_s: float) -> None:
        """Let the server forget retired regions; it refuses while a request still uses one."""
        names, self._pool.stale = self._pool.stale, []
        deadline = time.monotonic() + wait_s
        while names:
            try:
                self._client.unregister_system_shared_memory(names[-1], **self._timeout)
            except self._refused as error:
                if not is_in_use(error):
                    raise
                if time.monotonic() >= deadline:
                    break
                time.sleep(IN_USE_PAUSE_S)
            else:
                names.pop()
        self._pool.stale += names

    def _infer(self, call: Call, region: SharedRegion | None) -> Arrays:
        inputs, outputs = tensors(self._library, call, region)
        result = self._client.infer(call.spec.name, inputs, outputs=outputs, **self._timeout)
        return read_result(call, result, region)

    def close(self) -> None:
        """Free shared memory and close the connection; stop the server after this, not before."""
        self._pool.retire_all()
        try:
            with translated(self.url):
                self._unregister(wait_s=CLOSE_WAIT_S)
        except ServingError as error:
            warn_registered(str(error))
        finally:
            self._client.close()
        if self._pool.stale:
            warn_registered("a request still uses it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
