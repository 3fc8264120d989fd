"""What only the server's owner may ask, with a key: load and unload models, statistics."""

from __future__ import annotations

import json
import os
import re
import secrets
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError, ServingError
from ..core.front_metrics import IN_FLIGHT
from ..files.atomic import writing_to

KEY_HEADER = "dbsam-key"
"""HTTP header of the key; in gRPC's metadata `triton-grpc-protocol-` stands before it."""
KEY_VARIABLE = "DBSAM_SERVER_KEY"
"""Environment variable that sets the key, for a server and its clients."""
RESTRICTED = ("shared-memory", "model-repository", "logging", "trace", "statistics")
"""Triton's APIs that need the key. Inference, metadata and health are open."""

_KEY = re.compile(r"[A-Za-z0-9_.~-]{16,200}")


def new_key(given: str | None = None) -> str:
    """The key that was given, or a random one.

    Raises:
        InputError: it is short, or has characters that a header or option would not carry.
    """
    if given is None:
        return secrets.token_urlsafe(24)
    if not _KEY.fullmatch(given):
        raise InputError(
            f"{KEY_VARIABLE} has {len(given)} characters, too few or of another kind: expected 16 "
            "to 200 letters, digits and -_.~"
        )
    return given


def write_key(key: str, path: Path) -> None:
    """Write the key into a file for this user alone, in place of an earlier one.

    Raises:
        InputError: it cannot be written.
    """
    with writing_to(path):
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"{key}\n")


def restriction(key: str) -> list[str]:
    """The server's options that close the restricted APIs without the key."""
    rule = f"{','.join(RESTRICTED)}:{KEY_HEADER}={key}"
    return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]


@dataclass(frozen=True)
class Control:
    """The owner's calls to a running server, over HTTP.

    Attributes:
        url: host:port of its HTTP endpoint.
        key: its key.
        timeout_s: how long a call may take; loading a model takes its own.
    """

    url: str
    key: str
    timeout_s: float = 5.0

    def models(self) -> dict[str, str]:
        """Model → its state in Triton's words, `READY` if it serves.

        Raises:
            ServingError: no answer.
        """
        index = self._call("/v2/repository/index", {})
        return {item["name"]: item.get("state", "UNAVAILABLE") for item in index}

    def reload(self, model: str, timeout_s: float) -> None:
        """Take a model out and load it anew, with new processes; loading alone would keep them.

        Raises:
            ServingError: no answer, or it does not load.
        """
        self._call(f"/v2/repository/models/{model}/unload", {})
        self._call(f"/v2/repository/models/{model}/load", {}, timeout_s)

    def answered(self) -> dict[str, int]:
        """Model → requests that it has answered since it was loaded, failures included.

        Raises:
            ServingError: no answer.
        """
        listed = self._call("/v2/models/stats", None)["model_stats"]
        return {
            item["name"]: sum(
                int(item["inference_stats"][kind].get("count", 0)) for kind in ("success", "fail")
            )
            for item in listed
        }

    def _call(self, path: str, body: Any, timeout_s: float | None = None) -> Any:
        request = urllib.request.Request(
            f"http://{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={KEY_HEADER: self.key, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s or self.timeout_s) as answer:  # noqa: S310
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error_text(error.read(2000))
            raise ServingError(f"Triton on {self.url} refused {path}: {text}") from error
        except (OSError, ValueError) as error:
            raise ServingError(f"Triton on {self.url} did not answer {path} ({error})") from error


def error_text(body: bytes) -> str:
    """Triton's error in an HTTP answer, or the answer's beginning where somebody else wrote it."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "an empty answer"


def metrics(url: str) -> str:
    """A server's metrics in Prometheus' text format.

    Args:
        url: host:port of the metrics.

    Raises:
        ServingError: no answer.
    """
    try:
        with urllib.request.urlopen(f"http://{url}/metrics", timeout=5) as page:
            return str(page.read().decode())
    except (OSError, ValueError) as error:
        raise ServingError(f"no metrics on {url} ({error})") from error


def requests_in_flight(metrics_url: str) -> int:
    """How many requests the front has accepted and not answered, from the server's metrics.

    Args:
        metrics_url: host:port of the metrics.

    Raises:
        ServingError: no answer.
    """
    found = re.findall(rf"^{IN_FLIGHT}{{.*}} (\S+)$", metrics(metrics_url), re.MULTILINE)
    return int(sum(map(float, found)))
