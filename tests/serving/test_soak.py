"""Ten thousand requests, and a fault every few seconds; minutes, so only with `--slow`."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from support.serving import traffic

from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.processes import stubs
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.serving.supervisor import Pace

pytestmark = [pytest.mark.triton, pytest.mark.slow]
REQUESTS, WARM_UP = 10_000, 2_000


def memory_mib(server: TritonServer) -> float:
    """Proportional set size of the server and all its stubs."""
    total = 0
    for pid in [server.pid, *(stub.pid for stub in stubs(server.pid))]:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if "Pss:" in line)
    return total / 1024


def test_memory_does_not_grow_over_ten_thousand_requests(
    tiny_artefact, server_environment, tmp_path
):
    """New images all the time; the budget for embeddings is full after the warm-up."""
    repository = build_repository(tiny_artefact, tmp_path / "r").folder
    config = repository / "dbsam_interactive" / "config.pbtxt"
    text = config.read_text()
    budget = 'key: "cache_mib" value { string_value: "512" }'
    assert budget in text
    config.write_text(text.replace(budget, budget.replace("512", "8")))
    server = TritonServer(repository, server_environment, log=tmp_path / "l", ports=Ports(0, 0, 0))
    with server, traffic(server.grpc_url, fresh=True, timeout_s=60) as seen:
        sizes = []
        for count in (WARM_UP, REQUESTS // 2, REQUESTS):
            while len(seen.right) < count:
                assert not seen.failed
                time.sleep(0.2)
            sizes.append(memory_mib(server))
    growth = sizes[-1] / sizes[0] - 1
    print(f"{seen.sent} requests, MiB {sizes}, growth {growth:.1%}, p99 {seen.p99_s():.3f} s")
    assert not seen.wrong
    assert growth < 0.05


def test_a_fault_every_few_seconds_loses_no_service(watched):
    server, supervisor = watched.server, watched.supervisor
    supervisor.pace = Pace(patience=2.0, probe_least=1.0)

    def tell(text: str) -> None:
        watched.events.append(text)
        if "answers nothing" in text:
            watched.hang.unlink(missing_ok=True)

    def kill(model: str, number: int) -> None:
        os.kill(watched.pid_of(model), number)

    faults = {
        "front killed": lambda: kill("dbsam_interactive", signal.SIGKILL),
        "encoder stopped": lambda: kill("dbsam_encoder", signal.SIGSTOP),
        "decoder killed": lambda: kill("dbsam_decoder", signal.SIGKILL),
        "encoder hangs": lambda: watched.hang.write_text("encoder"),
        "server killed": lambda: os.kill(server.pid, signal.SIGKILL),
    }
    supervisor.say = tell
    took: dict[str, list[float]] = {name: [] for name in faults}
    try:
        with traffic(server.grpc_url, fresh=True, timeout_s=10) as seen:
            for _ in range(3):
                for name, fault in faults.items():
                    time.sleep(1.0)
                    before = supervisor.revived + supervisor.restarted
                    began = time.monotonic()
                    fault()
                    watched.until(
                        lambda before=before: supervisor.revived + supervisor.restarted > before, 60
                    )
                    right = len(seen.right)
                    watched.until(lambda right=right: len(seen.right) > right + 4, 30)
                    took[name].append(time.monotonic() - began)
    finally:
        watched.hang.unlink(missing_ok=True)
        supervisor.pace, supervisor.say = Pace(), watched.events.append
    failed = Counter(text.split("]")[0].strip("[") for _, _, text in seen.failed)
    print(f"{seen.sent} requests, {len(seen.right)} right, {len(seen.wrong)} wrong, {dict(failed)}")
    print(f"p99 {seen.p99_s():.2f} s, longest time without an answer {seen.longest_gap_s():.1f} s")
    print({name: [round(seconds, 1) for seconds in times] for name, times in took.items()})
    assert not seen.wrong
    assert max(max(took[name]) for name in faults if name != "server killed") < 10
