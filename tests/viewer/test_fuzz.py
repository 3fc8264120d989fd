"""Bytes that no client would send, and clients that die: the server and the others go on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from nnInteractive.inference.remote.serialization import pack_array
from support.peak_memory import peak_bytes
from support.serving import wait_until
from support.viewer import BOX, IMAGE, RawViewer, RunningServer, running
from support.viewer_fuzz import REFUSALS, address, exchange, request

from dbsam_deploy.viewer.leases import Lease

BOX_MARK = {"bbox_coords": BOX, "include_interaction": True}
WHERE = [[3, 9], [10, 22], [15, 38]]
# Slots are not what is tried: a claim that is hung up on holds one for a minute.
LIMITS = {"slots": 100_000, "upload_s": 0.2, "max_voxels": 30_000, "image_bytes": 50_000_000}
_SERVER = f"""
import sys
from support.viewer import running
with running(**{LIMITS}) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
_CLIENT = """
import socket, sys, time
content = sys.stdin.buffer.read()
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(content)
time.sleep(60)
"""


def attack(url: str, seed: int, until: float, most: int) -> Counter[int | None]:
    """Requests of one client, until a time or so many; how often each status came."""
    rng, seen = random.Random(seed), Counter[int | None]()
    viewer = RawViewer(url)
    while time.monotonic() < until and seen.total() < most:
        path, is_whole, content = request(rng, viewer.http.headers["X-Lease-Token"])
        status, answer = exchange(url, content, is_whole=is_whole)
        allowed = {503} if path == "claim" else set()
        assert status in REFUSALS | allowed | {200 if is_whole else None, 200}, (status, content)
        if status in REFUSALS and answer.startswith(b"{"):
            assert isinstance(json.loads(answer)["detail"], str)
        if path == "claim" and status == 200:
            other = json.loads(answer)["lease_token"]
            viewer.post("release", headers={"X-Lease-Token": other})
        if path == "release" and status == 200:
            viewer = RawViewer(url)
        seen[status] += 1
    viewer.post("release")
    return seen


def check(viewer: RawViewer) -> None:
    """It has its image still, and finds the object on it."""
    viewer.post("reset_interactions", json={}).raise_for_status()
    answer = viewer.post("add_bbox_interaction", json=BOX_MARK)
    assert json.loads(answer.headers["X-Meta"])["bbox"] == WHERE


def test_no_request_is_an_error_of_the_server():
    with running(**LIMITS) as server:
        own = RawViewer(server.url)
        seen = attack(server.url, 1, float("inf"), 250)
        assert set(seen) >= {200, 400, 404, 405, 410, 413}, seen
        check(own)


@pytest.mark.slow
def test_five_minutes_of_wrong_requests_by_eight_clients():
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{_SERVER}"]
    until, most = time.monotonic() + 300, 10**9
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout")} | {"stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process, ThreadPoolExecutor(8) as pool:
        url = process.stdout.readline().strip()
        own = RawViewer(url)
        check(own)
        before = peak_bytes(process.pid)
        attacks = [pool.submit(attack, url, seed, until, most) for seed in range(8)]
        beats = 0
        while time.monotonic() < until:
            own.post("heartbeat").raise_for_status()
            check(own)
            beats += 1
            time.sleep(5)
        seen = sum((attack.result() for attack in attacks), Counter())
        check(own)
        grown = peak_bytes(process.pid) - before
        process.stdin.close()
    print(f"\n{seen.total()} requests: {dict(seen)}; memory grew by {grown >> 20} MiB")
    assert process.returncode == 0
    assert grown < 200 * 2**20


def killed(server: RunningServer, content: bytes, lease: Lease) -> None:
    """Send a request from a process that is killed as soon as the server has begun with it."""
    where = map(str, address(server.url))
    command = [sys.executable, "-S", "-c", _CLIENT, *where]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.stdin.write(content)
        process.stdin.close()
        assert wait_until(lambda: lease.in_flight == 1)
        process.kill()


def test_clients_that_are_killed_cost_their_own_lease_alone():
    """One in the middle of an upload, one while the model works for it."""
    with running(slots=3) as server:
        other, uploading, prompting = (RawViewer(server.url) for _ in range(3))
        leases = [
            server.leases.find(v.http.headers["X-Lease-Token"]) for v in (uploading, prompting)
        ]
        image, mark = pack_array(IMAGE), json.dumps(BOX_MARK).encode()
        heads = [
            f"POST /{path} HTTP/1.1\r\nHost: x\r\nX-Lease-Token: {lease.token}\r\n"
            f"Content-Length: {length}\r\n\r\n".encode()
            for path, lease, length in (
                ("set_image", leases[0], len(image)),
                ("add_bbox_interaction", leases[1], len(mark)),
            )
        ]
        may_answer, ask = threading.Event(), server.model.predict_boxes
        server.model.predict_boxes = lambda boxes: (may_answer.wait(10), ask(boxes))[1]
        killed(server, heads[0] + image[:-1], leases[0])
        killed(server, heads[1] + mark, leases[1])
        other.post("heartbeat").raise_for_status()
        assert wait_until(lambda: leases[0].in_flight == 0)
        assert leases[1].in_flight == 1
        may_answer.set()
        assert wait_until(lambda: leases[1].in_flight == 0)
        check(other)
        for lease in leases:
            lease.seen -= server.leases.rules.liveness_s + 1
        other.post("claim").raise_for_status()  # the third slot is the only one that is held
        assert all(lease.is_over for lease in leases)
