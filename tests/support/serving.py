"""Looks at the processes of a server, and asks it questions all the time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

from dbsam_deploy.core.contract import BOXES, TRITON_TYPES
from dbsam_deploy.serving.probe import probe_image, question

QUICK = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1)]


RESTARTED_WITHIN_S = 60.0
"""A server loads all models, on a machine that does other things as well."""


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(group: int) -> list[str]:
    """Command lines of the living processes in a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = stat.read_text().rpartition(")")[2].split()[:3]
            line = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(member) == group and state != "Z":
            found.append(line.replace("\0", " "))
    return found


def ask_grpc(
    client: grpc.InferenceServerClient, image: np.ndarray, timeout_s: float, *, times: int = 1
) -> np.ndarray:
    """Masks of the probe's box, asked for so many times at once; nothing is sent again."""
    inputs = inputs_of(grpc, image, times)
    return client.infer("dbsam", inputs, client_timeout=timeout_s).as_numpy("masks")


def inputs_of(way: Any, image: np.ndarray, times: int) -> list[Any]:
    """The probe's box on an image, so many times, as inputs of `tritonclient.grpc` or `.http`."""
    asked, inputs = question("dbsam", image, 0), []
    asked[BOXES] = np.repeat(asked[BOXES], times, axis=0)
    for name, array in asked.items():
        tensor = way.InferInput(name, list(array.shape), TRITON_TYPES[str(array.dtype)])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


@dataclass
class Traffic:
    """What clients saw: when each request ended, how long it took, and what came of it."""

    right: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[tuple[float, float]] = field(default_factory=list)
    failed: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Requests in all."""
        return len(self.right) + len(self.wrong) + len(self.failed)

    def longest_gap_s(self) -> float:
        """Longest time in which no request was answered."""
        ends = sorted(end for end, _ in self.right)
        return max((b - a for a, b in itertools.pairwise(ends)), default=float("inf"))

    def p99_s(self) -> float:
        """Time within which 99 of 100 answers came."""
        return float(np.percentile([took for _, took in self.right], 99))


@contextmanager
def traffic(
    url: str, clients: int = 4, *, timeout_s: float = 10.0, fresh: bool = False
) -> Iterator[Traffic]:
    """Ask a server over gRPC from several threads while the block runs; nothing is retried.

    Args:
        url: host:port of its gRPC endpoint.
        clients: threads.
        timeout_s: for each request.
        fresh: let each image differ in one pixel, so that each has to be encoded; its mask may
            differ in that corner.
    """
    seen, end = Traffic(), threading.Event()
    image = probe_image(b"\0\0\0")
    first = grpc.InferenceServerClient(url, channel_args=QUICK)
    expected = ask_grpc(first, image, timeout_s)
    first.close()

    def ask_on() -> None:
        client = grpc.InferenceServerClient(url, channel_args=QUICK)
        while not end.is_set():
            began = time.monotonic()
            try:
                masks = ask_grpc(client, probe_image() if fresh else image, timeout_s)
            except grpc.InferenceServerException as error:
                now = time.monotonic()
                seen.failed.append((now, now - began, str(error)))
                end.wait(0.02)
                continue
            now = time.monotonic()
            others = (masks != expected).mean() if masks.shape == expected.shape else 1.0
            answers = seen.right if others <= 0.01 * fresh else seen.wrong
            answers.append((now, now - began))
        client.close()

    threads = [threading.Thread(target=ask_on) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        end.set()
        for thread in threads:
            thread.join()
