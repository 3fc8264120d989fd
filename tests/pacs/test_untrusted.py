"""What answers is not trusted: nonsense, floods and lies end in one line, and nothing is kept."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dbsam_deploy.clients.access import Access
from dbsam_deploy.core.errors import DbsamError, PacsError
from dbsam_deploy.pacs import connection, patience
from dbsam_deploy.pacs import fetch as fetching
from dbsam_deploy.pacs.address import PacsAddress
from dbsam_deploy.pacs.fetch import fetch
from dbsam_deploy.pacs.store import store

from .conftest import MakeSeries, Series

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and the body or an iterator of its parts."""


def no_wait(seconds: float) -> None:
    """In the place of `time.sleep`."""


def as_json(body: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/dicom+json"}, json.dumps(body).encode()


def item(**elements: Any) -> dict[str, Any]:
    tags = {"series": "0020000E", "instance": "00080018", "count": "00201209", "kind": "00080060"}
    return {tags[name]: {"vr": "UI", "Value": [value]} for name, value in elements.items()}


def multipart(*parts: bytes) -> Answer:
    head = b"--b\r\nContent-Type: application/dicom\r\n\r\n"
    body = b"\r\n".join(head + part for part in parts) + b"\r\n--b--\r\n"
    return 200, {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}, body


class Liar:
    """A server whose answers a test sets: `series`, `instances`, `instance`, `stow`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, Callable[[], Answer]] = {}
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                liar.asked.append(("GET", self.path))
                liar.headers.append(dict(self.headers))
                words = self.path.partition("?")[0].split("/")
                kind = words[-1] if words[-1] in ("series", "instances") else "instance"
                again = "offset=" in self.path and not self.path.endswith("offset=0")
                self.reply(as_json([]) if again else liar.answers[kind]())

            def do_POST(self) -> None:
                liar.asked.append(("POST", self.path))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.reply(liar.answers["stow"]())

            def reply(self, answer: Answer) -> None:
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if isinstance(body, bytes):
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                    return
                self.end_headers()
                self.close_connection = True
                try:
                    for part in body:
                        self.wfile.write(part)
                except OSError:
                    pass  # the client has had enough

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def address(self, study: str) -> PacsAddress:
        port = self.server.server_address[1]
        return PacsAddress.parse(f"dicomweb://127.0.0.1:{port}/dicom-web?study={study}")

    def serve(self, series: Series) -> None:
        """Be honest about a series of one instance."""
        (file,) = series.files
        self.answers = {
            "series": lambda: as_json([item(series=series.uid, count=1, kind="CT")]),
            "instances": lambda: as_json([item(instance=instance_of(series))]),
            "instance": lambda: multipart(file.read_bytes()),
            "stow": lambda: as_json({}),
        }


def instance_of(series: Series) -> str:
    return str(dcmread(series.files[0]).SOPInstanceUID)


@pytest.fixture
def liar() -> Iterator[Liar]:
    server = Liar()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "fetched"
    folder.mkdir()
    return folder


@pytest.fixture
def one(liar: Liar, make_series: MakeSeries) -> Series:
    """A series of one instance, which the server has."""
    series = make_series(1)
    liar.serve(series)
    return series


def refused(liar: Liar, one: Series, target: Path) -> str:
    """The line that `fetch` ends with; nothing is left of it."""
    with pytest.raises(DbsamError) as caught:
        fetch(liar.address(one.study), target, sleep=no_wait)
    assert list(target.iterdir()) == []
    assert "\n" not in caught.value.message
    assert isinstance(caught.value, PacsError)
    return caught.value.message


def test_an_honest_answer_is_taken(liar, one, target):
    folder = fetch(liar.address(one.study), target, sleep=no_wait)
    (file,) = folder.iterdir()
    assert file.read_bytes() == one.files[0].read_bytes()


def test_one_part_without_an_envelope_is_taken(liar, one, target):
    content = one.files[0].read_bytes()
    liar.answers["instance"] = lambda: (200, {"Content-Type": "application/dicom"}, content)
    (file,) = fetch(liar.address(one.study), target, sleep=no_wait).iterdir()
    assert file.read_bytes() == content


HTML: Answer = (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>")
DEEP: Answer = (200, {"Content-Type": "application/json"}, b"[" * 100_000)


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        ("series", HTML, "QIDO: the answer is no JSON: is the prefix right"),
        ("series", DEEP, "QIDO: the answer is no"),
        ("series", as_json({"error": 1}), "QIDO: the answer is no DICOMweb"),
        ("series", as_json([17]), "QIDO: the answer is no DICOMweb"),
        ("series", as_json("text"), "QIDO: the answer is no DICOMweb"),
        ("series", as_json([{"0020000E": {"Value": 3}}]), "QIDO: the answer is no DICOMweb"),
        ("series", as_json([{}]), "QIDO: the answer is no DICOMweb .*in the place of a UID"),
        ("series", as_json([item(series="../../etc")]), "in the place of a UID"),
        ("series", as_json([item(series="1.2/../3")]), "in the place of a UID"),
        ("series", as_json([item(series="1." * 40 + "2")]), "in the place of a UID"),
        ("series", (500, {}, b""), "QIDO: status 500"),
        ("series", (404, {}, b""), "QIDO: status 404: not there"),
        ("series", (503, {}, b""), "QIDO: status 503"),
        ("instances", as_json([item(instance="1.2.3\r\nX: y")]), "in the place of a UID"),
        ("instances", as_json([item(instance="..")]), "in the place of a UID"),
        ("instances", as_json([]), "announced with 1 instances and 0 are listed"),
        ("instances", as_json([item(instance=f"1.{k}") for k in range(3)]), "1 instances and 3"),
        ("instance", HTML, "instance .*: the answer is no DICOMweb"),
        ("instance", (200, {}, b"DICM"), "instance .*: the answer is no DICOMweb"),
        ("instance", multipart(), "instance .*: the answer is no DICOMweb"),
        ("instance", multipart(b"one", b"two"), "instance .*: the answer is no DICOMweb"),
        ("instance", multipart(b"no DICOM at all"), "instance .* is not DICOM"),
        ("instance", (404, {}, b""), "instance .*: status 404"),
    ],
)
def test_nonsense_is_one_line(liar, one, target, kind, answer, reason):
    liar.answers[kind] = lambda: answer
    assert re.search(reason, refused(liar, one, target))


def test_an_instance_that_was_not_asked_for(liar, one, make_series: MakeSeries, target):
    other = make_series(1, study=one.study)
    liar.answers["instance"] = lambda: multipart(other.files[0].read_bytes())
    assert f"came with SeriesInstanceUID '{other.uid}'" in refused(liar, one, target)
    other = make_series(1, SeriesInstanceUID=one.uid)
    liar.answers["instance"] = lambda: multipart(other.files[0].read_bytes())
    assert f"came with StudyInstanceUID '{other.study}'" in refused(liar, one, target)
    other = make_series(1, study=one.study, SeriesInstanceUID=one.uid)
    liar.answers["instance"] = lambda: multipart(other.files[0].read_bytes())
    assert "came with SOPInstanceUID" in refused(liar, one, target)


def test_a_cut_instance_is_asked_for_again_and_refused(liar, one, target):
    status, headers, body = multipart(one.files[0].read_bytes())
    longer = {**headers, "Content-Length": str(len(body) + 1)}
    liar.answers["instance"] = lambda: (status, longer, iter([body]))
    assert "no whole answer in 4 attempts" in refused(liar, one, target)
    assert len([path for _, path in liar.asked if path.endswith(instance_of(one))]) == 4


@pytest.mark.parametrize("kind", ["series", "instances", "instance"])
def test_a_body_without_end_is_cut(liar, one, target, monkeypatch, kind):
    for name in ("MAX_LIST_BYTES", "MAX_INSTANCE_BYTES"):
        monkeypatch.setattr(connection, name, 100_000)
    sent = [0]

    def endless() -> Iterator[bytes]:
        while True:
            sent[0] += 1 << 16
            yield bytes(1 << 16)

    head = multipart()[1] if kind == "instance" else {"Content-Type": "application/json"}
    liar.answers[kind] = lambda: (200, head, endless())
    assert "sends more than 100000 bytes: refused" in refused(liar, one, target)
    assert sent[0] < 64 << 20


def drips() -> Iterator[bytes]:
    """A byte now and then, for longer than anybody may wait."""
    for _ in range(60):
        time.sleep(0.05)
        yield b" "


@pytest.mark.parametrize("kind", ["series", "instances", "instance"])
def test_a_server_that_drips_is_given_up(liar, one, target, monkeypatch, kind):
    monkeypatch.setattr(patience, "GRACE_S", 0.3)
    head = multipart()[1] if kind == "instance" else {"Content-Type": "application/json"}
    liar.answers[kind] = lambda: (200, head, drips())
    said = refused(liar, one, target)
    assert re.search(r": \d+ bytes in \d+ s, slower than 32 KiB a second: given up", said)


def test_headers_that_drip_are_given_up(target, monkeypatch, make_series):
    monkeypatch.setattr(patience, "GRACE_S", 0.3)
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connected, _ = listening.accept()
        with connected, contextlib.suppress(OSError):
            connected.recv(4096)
            connected.sendall(b"HTTP/1.1 200 OK\r\nX-Name:")
            for byte in drips():
                connected.sendall(byte)

    thread = threading.Thread(target=answer)
    thread.start()
    address = f"dicomweb://127.0.0.1:{listening.getsockname()[1]}/x?study=1.2.3"
    with pytest.raises(PacsError, match="slower than 32 KiB a second: given up"):
        fetch(PacsAddress.parse(address), target, sleep=no_wait)
    thread.join()
    listening.close()


def test_a_series_has_a_longest_time(liar, one, target):
    liar.answers["instance"] = lambda: (*multipart()[:2], drips())
    with pytest.raises(PacsError, match=r"not done within 0\.4 s in all: given up"):
        fetch(liar.address(one.study), target, sleep=no_wait, total_s=0.4)
    assert list(target.iterdir()) == []


def test_a_slow_line_that_goes_on_is_waited_for(liar, one, target, monkeypatch):
    monkeypatch.setattr(patience, "GRACE_S", 1.0)
    status, head, content = multipart(one.files[0].read_bytes() + bytes(40_000))
    monkeypatch.setattr(patience, "SLOWEST", len(content) // 8)  # a second more a part

    def parts() -> Iterator[bytes]:
        for start in range(0, len(content), len(content) // 8 + 1):
            time.sleep(0.15)
            yield content[start : start + len(content) // 8 + 1]

    liar.answers["instance"] = lambda: (status, head, parts())
    assert fetch(liar.address(one.study), target, sleep=no_wait).is_dir()


def test_what_inflates_without_end_is_cut(liar, one, target, monkeypatch):
    monkeypatch.setattr(connection, "MAX_LIST_BYTES", 1_000_000)
    bomb = gzip.compress(bytes(20_000_000), 9)
    head = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    liar.answers["series"] = lambda: (200, head, bomb)
    assert "sends more than 1000000 bytes: refused" in refused(liar, one, target)


def test_a_list_without_end_is_cut(liar, one, target, monkeypatch):
    monkeypatch.setattr(connection, "MAX_INSTANCES", 10)
    many = [item(instance=f"1.2.{k}") for k in range(11)]
    liar.answers["instances"] = lambda: as_json(many)
    assert "more than 10 found: refused" in refused(liar, one, target)


def test_a_series_has_a_largest(liar, one, target, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_BYTES", 1000)
    assert "has more than 1000 bytes" in refused(liar, one, target)


def test_a_disk_that_is_full_is_one_line(liar, one, target, monkeypatch):
    def write(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert "cannot be kept: No space left on device" in refused(liar, one, target)


@pytest.mark.parametrize("kind", ["series", "instance"])
def test_no_redirect_is_followed_and_no_login_goes_elsewhere(liar, one, target, kind):
    other = Liar()
    place = f"http://127.0.0.1:{other.server.server_address[1]}/here"
    liar.answers[kind] = lambda: (302, {"Location": place}, b"")
    with pytest.raises(PacsError, match=f"sends on to '{place}', which is not followed"):
        fetch(liar.address(one.study), target, access=Access(login="a:b"), sleep=no_wait)
    assert other.asked == []
    other.server.shutdown()
    other.server.server_close()


def test_neither_netrc_nor_a_proxy_of_the_environment_is_used(
    liar, one, target, monkeypatch, tmp_path
):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login another password person\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetch(liar.address(one.study), target, sleep=no_wait)
    assert all("Authorization" not in sent for sent in liar.headers)
    port = liar.server.server_address[1]
    assert {sent["Host"] for sent in liar.headers} == {f"127.0.0.1:{port}"}


def refusal(code: int) -> dict[str, Any]:
    return {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [code]}}]}}


@pytest.mark.parametrize("status", [200, 202, 409])
def test_a_refusal_is_said_with_its_reason(liar, one, status):
    liar.answers["instances"] = lambda: as_json([])
    liar.answers["stow"] = lambda: as_json(refusal(0xA700), status)
    with pytest.raises(PacsError, match=r"refuses .*\.dcm .*A700"):
        store(liar.address(one.study), one.files, sleep=no_wait)


def test_a_duplicate_that_the_pacs_names_is_one(liar, one):
    stored = iter([as_json([]), as_json([item(instance=instance_of(one))])])
    liar.answers["instances"] = lambda: next(stored)
    liar.answers["stow"] = lambda: as_json(refusal(0x0111), 409)
    (found,) = store(liar.address(one.study), one.files, sleep=no_wait)
    assert found.was_there


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((403, {}, b""), "STOW: status 403: not for this login"),
        ((500, {}, b"<html>"), "STOW: status 500"),
        ((409, {}, b"<html>"), "STOW: the answer is no JSON"),
        (as_json({"00081198": 3}), "STOW: the answer is no DICOMweb"),
        (as_json([1]), "STOW: the answer is no DICOMweb"),
        (HTML, "without a complaint, but does not list it"),
    ],
)
def test_no_other_answer_counts_as_stored(liar, one, answer, reason):
    liar.answers["instances"] = lambda: as_json([])
    liar.answers["stow"] = lambda: answer
    with pytest.raises(PacsError, match=reason):
        store(liar.address(one.study), one.files, sleep=no_wait)


def test_a_server_that_ignores_the_question_claims_nothing(liar, one, make_series: MakeSeries):
    other = make_series(1, study=one.study)  # while `one` is listed, whatever is asked
    with pytest.raises(PacsError, match="does not list it"):
        store(liar.address(one.study), other.files, sleep=no_wait)
