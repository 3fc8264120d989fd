"""Triton's HTTP protocol for any number of threads, on a pool of connections.

`tritonclient`'s own blocking HTTP client runs on gevent and hangs in any thread but the one that
made it. Here it builds the requests and reads the answers; urllib3 sends them.
"""

from __future__ import annotations

import json
import os
from types import ModuleType
from typing import Any
from urllib.parse import quote

from ..serving.control import error_text
from .access import Access
from .calls import load_library

_KEPT_CONNECTIONS = 32
_LENGTH = "Inference-Header-Content-Length"


class HttpConnection:
    """The methods of `tritonclient.grpc.InferenceServerClient` that a client uses, over HTTP.

    Threads may share it. A process forked from the one that made it gets connections of its own.

    Args:
        url: host:port.
        library: `tritonclient.http`.
        access: TLS and a login; None for neither.
    """

    def __init__(self, url: str, library: ModuleType, access: Access | None = None) -> None:
        self._urllib3 = load_library("urllib3")
        self._protocol = library.InferenceServerClient
        self._refused = load_library("tritonclient.utils").InferenceServerException
        self._host, _, port = url.rpartition(":")
        self._port = int(port)
        self._access = access
        self._pool, self._process = self._new_pool(), os.getpid()

    def _new_pool(self) -> Any:
        place, kept = (self._host.strip("[]"), self._port), _KEPT_CONNECTIONS
        if self._access is None:
            return self._urllib3.HTTPConnectionPool(*place, maxsize=kept, retries=False)
        return self._urllib3.HTTPSConnectionPool(
            *place, maxsize=kept, retries=False, ssl_context=self._access.context()
        )

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: dict[str, str] | None = None,
        client_timeout: float,
    ) -> Any:
        if self._process != os.getpid():  # two processes must not share a socket
            self._pool, self._process = self._new_pool(), os.getpid()
        limit = self._urllib3.Timeout(total=client_timeout)
        try:
            answer = self._pool.urlopen(method, path, body=body, headers=headers, timeout=limit)
        except self._urllib3.exceptions.NewConnectionError as error:
            raise ConnectionError(str(error)) from error  # it is a TimeoutError of urllib3's
        except self._urllib3.exceptions.TimeoutError as error:
            raise TimeoutError(str(error)) from error
        except self._urllib3.exceptions.HTTPError as error:
            # While a body is sent, a time limit comes as a broken connection.
            late = any(isinstance(argument, TimeoutError) for argument in error.args)
            raise (TimeoutError if late else ConnectionError)(str(error)) from error
        if answer.status != 200:
            raise self._refused(error_text(answer.data), status=str(answer.status))
        return answer

    def get_model_metadata(self, model: str, **options: Any) -> dict[str, Any]:
        """Triton's description of a model."""
        found: dict[str, Any] = json.loads(
            self._send("GET", f"/v2/models/{quote(model)}", **options).data
        )
        return found

    def get_model_config(self, model: str, **options: Any) -> dict[str, Any]:
        """A model's configuration."""
        found: dict[str, Any] = json.loads(
            self._send("GET", f"/v2/models/{quote(model)}/config", **options).data
        )
        return found

    def infer(
        self,
        model: str,
        inputs: list[Any],
        *,
        outputs: list[Any],
        request_id: str,
        timeout: int,
        client_timeout: float,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """A model's answer; see `tritonclient.http.InferResult`."""
        body, length = self._protocol.generate_request_body(
            inputs, outputs=outputs, request_id=request_id, timeout=timeout
        )
        headers = {**(headers or {}), **({} if length is None else {_LENGTH: str(length)})}
        path = f"/v2/models/{quote(model)}/infer"
        answer = self._send("POST", path, body, headers=headers, client_timeout=client_timeout)
        found = answer.headers.get(_LENGTH)
        return self._protocol.parse_response_body(
            answer.data, header_length=None if found is None else int(found)
        )

    def register_system_shared_memory(
        self, name: str, key: str, byte_size: int, **options: Any
    ) -> None:
        """Let the server map a region."""
        body = json.dumps({"key": key, "offset": 0, "byte_size": byte_size}).encode()
        path = f"/v2/systemsharedmemory/region/{quote(name)}/register"
        self._send("POST", path, body, **options)

    def unregister_system_shared_memory(self, name: str, **options: Any) -> None:
        """Let the server forget a region."""
        path = f"/v2/systemsharedmemory/region/{quote(name)}/unregister"
        self._send("POST", path, b"", **options)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()
