"""The command that serves viewers: one model, one port, until it is told to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession
from support.tiny_artefact import make_tiny_artefact

from dbsam_deploy import viewer_server
from dbsam_deploy.artefact import write_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import InputError


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """The command sets a level for its whole process, which here is that of other tests, too."""
    log = logging.getLogger("dbsam_deploy.viewer")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "70000"],
        ["--reach", "0"],
        ["--answer-within", "nan"],
        ["--window", "40", "0"],
        ["--prefix", "x"],
        ["--api-key", "a", "--key-file", "b"],
        ["--api-key", ""],
        ["--key-file", "no_such_file"],
        ["--key-file", __file__],
        ["--audit-lenient"],
        ["--trust-proxy", "10.0.0.1"],
        ["--port", "0", "no_such_model"],
    ],
)
def test_mistakes_are_one_line(words, capsys):
    assert run(viewer_server.main, words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_taken_port_is_a_mistake_found_before_the_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(viewer_server.main, ["no_such_model", "--port", port]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot listen at 127.0.0.1, port {port} (Address already in")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("sesame\n", {"": "sesame"}),
        ("desk sesame\nnight open\n", {"desk": "sesame", "night": "open"}),
        ("desk sesame\nopen\n", None),
        ("desk sesame\nnight sesame\n", None),
        ("desk sesame\ndesk open\n", None),
        ("desk sesame please\n", None),
        ("", None),
    ],
)
def test_one_key_or_several_with_names(tmp_path, text, keys):
    file = tmp_path / "keys"
    file.write_text(text)
    args = viewer_server.build_parser().parse_args(["--key-file", str(file)])
    if keys is None:
        with pytest.raises(InputError, match="expected"):
            viewer_server.read_keys(args)
    else:
        assert viewer_server.read_keys(args) == keys


def test_what_is_served_is_known_to_be_an_export_or_not(tmp_path):
    made = make_tiny_artefact(tmp_path / "model")
    (tmp_path / "hugging_face").mkdir()
    for named in (made.folder, made.folder / "manifest.json"):
        found = viewer_server._export_of(SimpleNamespace(model=str(named)))
        assert found.folder == made.folder
    for named in (tmp_path / "hugging_face", "weights.pth", "triton://localhost:8001"):
        assert viewer_server._export_of(SimpleNamespace(model=str(named))) is None


def send_malformed_chunk_after_the_answer(url: str) -> None:
    """The route answers without reading the body; what follows breaks HTTP's rules."""
    place = httpx.URL(url)
    with socket.create_connection((place.host, place.port), timeout=10) as connection:
        head = f"GET {place.path} HTTP/1.1\r\nHost: {place.host}:{place.port}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b'{"ok":true}'):
            more = connection.recv(65536)
            assert more, answer
            answer += more
        connection.sendall(b"no length\r\n")
        with suppress(ConnectionResetError):
            assert connection.recv(65536) == b"", "the connection is ended"


def test_a_model_is_served_under_a_prefix_with_a_key_of_the_environment(tmp_path):
    write_artefact(replace(make_tiny_artefact(tmp_path / "model"), key="ab12"))
    words = [str(tmp_path / "model"), "--port", "0", "--prefix", "/sam", "--reach", "2"]
    words += ["--audit-log", str(tmp_path / "audit.jsonl")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dbsam_deploy.viewer_server", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, viewer_server.KEY_VARIABLE: "sesame"},
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("ready: "):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        url = lines[-1].removeprefix("ready: ").strip()
        assert url.endswith("/sam")
        assert "tiny_test" in lines[0]
        assert httpx.post(url + "/claim").status_code == 401
        send_malformed_chunk_after_the_answer(url + "/healthz")
        with nnInteractiveRemoteInferenceSession(server_url=url, api_key="sesame") as client:
            assert "licence: that which came" in client.license
            rng = np.random.default_rng(0)
            client.set_image(rng.integers(0, 255, (1, 5, 40, 50), np.uint8))
            client.set_target_buffer(np.zeros((5, 40, 50), np.uint8))
            client.add_bbox_interaction([[2, 3], [8, 30], [10, 40]], True)
            client.add_point_interaction([2, 20, 20], False)
            client.add_point_interaction([3, 20, 20], True)
            assert (client.target_buffer[2, 20, 20], client.target_buffer[3, 20, 20]) == (0, 1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert "Traceback" not in err
        acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [act["what"] for act in acts] == [
            *("start", "claim", "set_image", "box", "point", "point", "release", "stop"),
        ]
        assert acts[1]["model"].startswith("tiny_test")
        assert acts[1]["export"] == "ab12"
    finally:
        process.kill()
        process.wait()
