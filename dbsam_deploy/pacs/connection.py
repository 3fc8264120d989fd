"""Requests to a PACS through dicomweb-client, within bounds: what answers is not trusted.

Nothing is read beyond a number of bytes or a time (`patience`), no redirect is followed, and
neither `~/.netrc` nor a proxy of the environment is used. A broken connection is tried again; every
other failure is one `PacsError`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..clients.access import Access
from ..core.errors import PacsError
from ..extras import check_installed, require
from .address import PacsAddress, is_uid
from .patience import SILENCE_S, Patience, patient_adapter

MAX_LIST_BYTES = 64 * 1024 * 1024
"""Longest answer that is no image: 20,000 instances have some 30 MB of JSON."""
MAX_INSTANCE_BYTES = 2 * 1024**3
"""Longest answer with one instance, as much as any volume may have."""
MAX_INSTANCES = 20_000
"""Most instances of a series, and series of a study."""
PAUSES_S = (0.5, 1.0, 2.0)
"""Before the second attempt and those after it."""
TOTAL_S = 4 * 3600.0
"""Longest that a series may take to fetch, or files to be stored."""
_BUSY = (408, 429, 502, 503, 504)
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
_NO_LOGIN = ": not for this login (DBSAM_PACS_LOGIN, --pacs-login-file)"
_HINTS = {401: _NO_LOGIN, 403: _NO_LOGIN, 404: ": not there; check host, prefix and UIDs"}
_ANY_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'

T = TypeVar("T")

for _name in ("dicomweb_client", "retrying"):  # what they log, an error here says
    logging.getLogger(_name).addHandler(logging.NullHandler())


def _bounded(stream: Callable[..., Iterator[bytes]], limit: int, place: str) -> Any:
    """urllib3's `stream`, which ends in an error where an answer is longer than allowed."""

    def blocks(*words: Any, **options: Any) -> Iterator[bytes]:
        seen = 0
        for block in stream(*words, **options):
            seen += len(block)
            if seen > limit:
                raise PacsError(f"{place} sends more than {limit} bytes: refused")
            yield block

    return blocks


def _open_session(session: Any, access: Access, patience: Patience) -> Any:
    """A session of requests, made to do what the module's head says."""
    for scheme in ("http://", "https://"):
        session.mount(scheme, patient_adapter(patience))
    session.trust_env = False
    session.headers.update({"Accept-Encoding": "identity", **access.headers})
    session.verify = True if access.ca is None else str(access.ca)
    if access.certificate is not None:
        session.cert = (str(access.certificate), str(access.private_key))
    plain = session.request

    def request(method: str, url: str, **options: Any) -> Any:
        (options.get("headers") or {}).pop("Host", None)  # dicomweb-client leaves out the port
        streamed, place = options.get("stream"), url.partition("?")[0]
        patience.begin(place)
        answer = plain(method, url, **{**options, "stream": True, "allow_redirects": False})
        if 300 <= answer.status_code < 400:
            target = str(answer.headers.get("Location", "nowhere"))[:200]
            raise PacsError(f"{place} sends on to {target!r}, which is not followed")
        limit = MAX_INSTANCE_BYTES if streamed else MAX_LIST_BYTES
        answer.raw.stream = _bounded(answer.raw.stream, limit, place)
        if not streamed:
            answer.content  # noqa: B018 - read here, where a broken connection is tried again
        return answer

    session.request = request
    return session


class Pacs:
    """A PACS, seen through DICOMweb.

    Args:
        address: where it is, and which study.
        access: TLS and a login.
        sleep: waits before another attempt.
        total_s: how long all requests may take together.

    Raises:
        InputError: the login would go over the network in the clear.
        MissingError: dicomweb-client is not installed.
    """

    def __init__(
        self,
        address: PacsAddress,
        access: Access,
        sleep: Callable[[float], None] = time.sleep,
        total_s: float = TOTAL_S,
    ) -> None:
        address.check(access)
        check_installed("pacs", what_for="a PACS")
        self._requests = require("requests", extra="pacs", what_for="a PACS")
        web = require("dicomweb_client.web", extra="pacs", what_for="a PACS")
        self._session = _open_session(self._requests.Session(), access, Patience(total_s))
        self.address, self.sleep = address, sleep
        self._client = web.DICOMwebClient(
            address.url, session=self._session, permissive_uid=True, timeout=SILENCE_S
        )
        self._client.set_http_retry_params(retry=False)
        # Private, so looked up here: in `ask` a release without it would pass for a wrong answer
        self._parts = self._client._decode_multipart_message

    def series(self) -> list[dict[str, Any]]:
        """What QIDO tells of each series of the study."""
        wanted = ("SeriesDescription", "SeriesNumber", "NumberOfSeriesRelatedInstances")
        search = self._client.search_for_series
        return self._listed(search, "0020000E", self.address.study, fields=wanted)

    def instances(self, series: str, instance: str | None = None) -> tuple[str, ...]:
        """SOPInstanceUIDs of a series, sorted; of `instance` alone, if it is there."""
        search, place = self._client.search_for_instances, (self.address.study, series)
        wanted = None if instance is None else {"SOPInstanceUID": instance}
        found = self._listed(search, "00080018", *place, search_filters=wanted)
        uids = (value(item, "00080018") for item in found)
        return tuple(sorted(uid for uid in uids if instance in (None, uid)))

    def retrieve(self, series: str, instance: str) -> bytes:
        """One instance as the PACS has it, in whatever transfer syntax, unchecked."""
        place = f"studies/{self.address.study}/series/{series}/instances/{instance}"
        url, accepted = f"{self.address.url}/{place}", {"Accept": _ANY_SYNTAX}

        def get() -> bytes:  # dicomweb-client's own call would parse it, before it is checked
            answer = self._session.get(url, headers=accepted, stream=True, timeout=SILENCE_S)
            answer.raise_for_status()
            if answer.headers["Content-Type"].lower().startswith("application/dicom"):
                return bytes(answer.content)  # some send one part without its envelope
            (content,) = self._parts(answer, stream=True)
            return bytes(content)

        return self.ask(f"instance {instance}", get)

    def send(self, dataset: Any) -> list[int]:
        """Store one instance; the reasons for which the PACS says it has not (PS3.18, I.2)."""

        def post() -> list[int]:
            try:
                told = self._client.store_instances([dataset], self.address.study).to_json_dict()
            except self._requests.HTTPError as error:
                if error.response.status_code != 409:  # it has stored none, and says why
                    raise
                told = error.response.json()
            failed = told.get("00081198", {}).get("Value") or []
            return [int(value(item, "00081197") or 0) for item in failed]

        return self.ask("STOW", post)

    def _listed(self, search: Callable[..., Any], key: str, *place: str, **words: Any) -> list[Any]:
        """All that a search finds, each thing once, page by page."""
        found: dict[str, Any] = {}

        def new_ones() -> dict[str, Any]:
            page = {value(item, key): item for item in search(*place, offset=len(found), **words)}
            for uid in page:
                if not is_uid(uid):
                    raise ValueError(f"{uid!r} in the place of a UID")
            return {uid: item for uid, item in page.items() if uid not in found}

        while new := self.ask("QIDO", new_ones):  # also ends where offsets are not understood
            found.update(new)
            if len(found) > MAX_INSTANCES:
                raise PacsError(f"{self.address}: more than {MAX_INSTANCES} found: refused")
        return list(found.values())

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """What `call` returns; it is called again where the connection breaks.

        Raises:
            PacsError: no connection, a refusal, or an answer that is none.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return call()
            except self._requests.exceptions.SSLError as error:
                reason = str(error).rpartition("certificate verify failed: ")[2][:200]
                why, again = f"TLS fails ({reason}): --pacs-ca names its authority", False
            except self._requests.HTTPError as error:
                status = error.response.status_code
                why, again = f"status {status}{_HINTS.get(status, '')}", status in _BUSY
            except self._requests.exceptions.InvalidJSONError:
                why, again = "the answer is no JSON: is the prefix right?", False
            except self._requests.RequestException as error:
                found = re.search(r"\[Errno -?\d+\] [\w ]+", str(error))
                reason = found.group() if found else type(error).__name__
                why, again = f"no whole answer in {len(PAUSES_S) + 1} attempts ({reason})", True
            except _NONSENSE as error:
                reason = f"{type(error).__name__}: {error}"[:200]
                why, again = f"the answer is no DICOMweb ({reason})", False
            if not again or pause_s is None:
                break
            self.sleep(pause_s)
        raise PacsError(f"{self.address}: {what}: {why}")


def value(item: Any, tag: str) -> str:
    """The first value of an element in DICOM's JSON as a short printable text, or ""."""
    values = item.get(tag, {}).get("Value") or [""]
    return "".join(char for char in str(values[0]) if char.isprintable())[:64]
