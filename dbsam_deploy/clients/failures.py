"""What `tritonclient` and the libraries below it raise → this library's errors."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import (
    BusyError,
    DbsamError,
    InputError,
    NoServerError,
    NotKeptError,
    ServingError,
    StoppingError,
)
from .calls import load_library
from .retries import ServerRequest

_OWN_ID = re.compile(r"\[request id: [^\]]*\] |\s*\[request [\w.:-]+\]$")
"""The id as Triton puts it before some of its texts, and the front model behind its own."""
_RETRY_AFTER = re.compile(r"retry after (\d+(?:\.\d+)?) ms")
_BUSY = re.compile(r"\bbusy: |the answer could not be sent")
_LOADING = re.compile(
    r"not at ready state|has no available versions|is not ready\b|is being restarted|"
    r"Stub process '.*' is not healthy"
)
"""Triton's and the front's texts, with several statuses, for a model that is being loaded again."""
_STOPPING = re.compile(r"\bstopping: |[Ss]erver is stopping")
_NOT_KEPT = re.compile(r"\bimage_id \S+: not kept")
_RESTRICTED = re.compile(r"This (?:API|protocol) is restricted")
_ALIEN = {
    "grpc": re.compile(r"failed to connect.*Socket closed|Failed parsing HTTP/2|http1\.x"),
    "http": re.compile(r"BadStatusLine|[Bb]ad status line|Expected HTTP/"),
}
"""Transport → what its library says of an answer in another protocol."""
_BROKE_OFF = re.compile(
    r"[Ss]ocket closed|[Cc]onnection reset|[Bb]roken pipe|Remote end closed|Stream removed|"
    r"Connection aborted|RST_STREAM"
)
"""Texts about a connection that was there and ended without an answer."""
_ADVICE = "start one with `python -m dbsam_deploy.serve`, or check host and port"
_WRONG_TRANSPORT = {
    "grpc": "what answers does not speak gRPC: is that its HTTP port (by default 8000)? Use "
    "transport http, or the gRPC port (8001)",
    "http": "what answers does not speak HTTP: is that its gRPC port (by default 8001)? Use "
    "transport grpc, or the HTTP port (8000)",
}


@contextmanager
def translated(request: ServerRequest, *others: type[BaseException]) -> Iterator[None]:
    """Turn what the transport raises into this library's errors, with the server's text.

    Args:
        request: what was asked, for messages.
        others: further exception types of the transport that mean "no server".

    Raises:
        InputError: the server refused the request as invalid, or wants a key.
        ServingError: no connection, a timeout, or an error inside the server; see its subclasses.
    """
    refused = load_library("tritonclient.utils").InferenceServerException
    unreachable: tuple[type[BaseException], ...] = (OSError, http.client.HTTPException, *others)
    try:
        yield
    except DbsamError:
        raise
    except refused as error:
        # gRPC and HTTP spell the status differently.
        status = str(error.status() or "").removeprefix("StatusCode.")
        text = " ".join(_OWN_ID.sub("", str(error.message())).split())
        refusal = None if _RESTRICTED.search(text) else _proxys_refusal(request, status)
        raise (refusal or _refusal(request, status, text)) from error
    except TimeoutError as error:
        raise request.late() from error
    except unreachable as error:
        raise _no_server(request, str(error) or type(error).__name__) from error


def _refusal(request: ServerRequest, status: str, text: str) -> DbsamError:
    """The error for a status and a text that came instead of an answer."""
    where, number = f"Triton on {request.url}", f"(request {request.id})"
    if status in ("INVALID_ARGUMENT", "400"):
        return InputError(f"the server refused the request: {text} {number}")
    if status in ("DEADLINE_EXCEEDED", "CANCELLED", "499", "504"):
        return request.late()
    if _RESTRICTED.search(text):
        return InputError(
            f"{where} keeps this for who has its key ({text}): give key, --key-file or "
            "DBSAM_SERVER_KEY the one that its `serve` wrote, or go without shared memory"
        )
    if status in ("NOT_FOUND", "404") and _NOT_KEPT.search(text):
        return NotKeptError(f"{where}: {text} {number}")
    if _LOADING.search(text):
        return BusyError(f"{where} loads the model: {text} {number}")
    if status in ("UNAVAILABLE", "503", "429"):
        # gRPC gives this status to its own failures, too: the text tells who speaks.
        if _STOPPING.search(text):
            return StoppingError(f"{where} is stopping: {text} {number}")
        if _BUSY.search(text) or status in ("503", "429"):
            after = _RETRY_AFTER.search(text)
            wait_s = float(after.group(1)) / 1e3 if after else None
            return BusyError(f"{where} has no time for this: {text} {number}", wait_s)
        return _no_server(request, text)
    return ServingError(f"{where}: {text} {number}")


def _proxys_refusal(request: ServerRequest, status: str) -> InputError | None:
    """The error of what stands before the server, if it is one."""
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED", "401", "403"):
        return InputError(
            f"what answers on {request.url} does not know this login or certificate: give "
            "access=Access(login=...), or --login-file"
        )
    if status in ("RESOURCE_EXHAUSTED", "413"):
        return InputError(f"{request.url}: the request is larger than the proxy before it allows")
    return None


def _no_server(request: ServerRequest, text: str) -> NoServerError:
    text = " ".join(text.split())
    if _ALIEN[request.transport].search(text):
        advice = _WRONG_TRANSPORT[request.transport]
        return NoServerError(
            f"no Triton server answers {request.transport} on {request.url}: {advice}"
        )
    if _BROKE_OFF.search(text):
        return NoServerError(
            f"Triton on {request.url} broke off before it answered ({text}; request {request.id}): "
            "it ended, or is being started anew; ask again, or let "
            "retries=Retries(lost_connection=True) do so"
        )
    return NoServerError(f"no Triton server answers on {request.url} ({text}): {_ADVICE}")
