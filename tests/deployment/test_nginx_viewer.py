"""deployment/nginx/viewer.conf in the real nginx, and viewers by their real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)
from support.nginx import LOGIN, PASSWORD, USER, VIEWER_CONFIG, Proxy
from support.nginx import running as proxy_running
from support.viewer import BOX, IMAGE, RunningServer
from support.viewer import running as server_running
from support.wedge import SHAPE, wedge

from dbsam_deploy.viewer.audit import AuditLog, AuditRules


@contextmanager
def both(nginx: str, folder: Path, **rules) -> Iterator[tuple[Proxy, RunningServer]]:
    """The server, which believes nginx, and nginx before it."""
    audit = AuditLog(AuditRules(folder / "audit.jsonl", proxies=(ip_network("127.0.0.1"),)))
    with server_running(audit=audit, **rules) as server:
        changes = {"viewer:1527": server.url.removeprefix("http://")}
        with proxy_running(nginx, folder, changes, VIEWER_CONFIG) as proxy:
            yield proxy, server


@pytest.fixture
def trusted(monkeypatch):
    """Where the client looks for authorities: what a hospital's machines have installed."""

    def trust(proxy: Proxy) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(proxy.certificate))

    return trust


def client(proxy: Proxy, password: str = PASSWORD) -> nnInteractiveRemoteInferenceSession:
    login = f"{USER}:{password.replace(' ', '%20')}"
    return nnInteractiveRemoteInferenceSession(server_url=f"https://{login}@localhost:{proxy.port}")


def test_a_viewer_works_through_tls_and_login(deployment_tool, tmp_path, trusted):
    with both(deployment_tool("nginx"), tmp_path, slots=1) as (proxy, server):
        trusted(proxy)
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            client(proxy, "wrong")
        with client(proxy) as viewer:
            token = str(viewer._lease_token)
            with pytest.raises(ServerAtCapacityError):
                client(proxy)
            viewer.set_image(IMAGE, {"spacing": [1, 1, 1]})
            viewer.set_target_buffer(np.zeros(SHAPE, np.uint8))
            assert viewer.add_bbox_interaction(BOX, True) == [[3, 9], [10, 22], [15, 38]]
            np.testing.assert_array_equal(viewer.target_buffer, wedge())
            assert viewer.undo()
            assert viewer.heartbeat() > 599
            server.leases.release(token)
            with pytest.raises(SessionExpiredError):
                viewer.add_bbox_interaction(BOX, True)
        log = (tmp_path / "access.log").read_text() + (tmp_path / "error.log").read_text()
    assert f"127.0.0.1 {USER} " in log
    for secret in (PASSWORD, "correct%20horse", LOGIN, token):
        assert secret not in log
    acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()][1:]
    assert {act["who"] for act in acts} == {USER}
    assert [act["what"] for act in acts[:5]] == ["claim", "claim", "set_image", "box", "undo"]


def test_nobody_names_himself_to_the_audit_log(deployment_tool, tmp_path):
    with both(deployment_tool("nginx"), tmp_path) as (proxy, _):
        named = {"X-Forwarded-User": "somebody", "X-Forwarded-For": "192.0.2.1"}
        assert proxy.ask("POST", "/claim", b"", Authorization=LOGIN, **named) == 200
        assert proxy.ask("POST", "/claim", b"", **named) == 401
    (act,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines()[1:])
    assert (act["who"], act["from"]) == (USER, "127.0.0.1")


def test_an_image_is_on_no_disk_and_one_that_is_too_large_is_refused(deployment_tool, tmp_path):
    """Longer than what nginx keeps in memory; its folder for bodies stays empty."""
    text = VIEWER_CONFIG.read_text()
    assert "proxy_request_buffering off" in text
    assert "proxy_max_temp_file_size 0" in text
    with both(deployment_tool("nginx"), tmp_path, max_voxels=2**20) as (proxy, _):
        body = bytes(2**20 * 8 + 2 * 2**20)
        assert proxy.ask("POST", "/set_image", body, Authorization=LOGIN) == 410
        assert list((tmp_path / "client_body").rglob("*.*")) == []
