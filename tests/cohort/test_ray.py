"""The same on a Ray cluster of two nodes: a worker and a whole node die, nothing is lost or double.

Two nodes of one machine, with addresses of its loopback; nothing is reachable from elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import time
from collections import Counter

import pytest
from support.faulty_studies import HANG, KILL_ONCE, SLOW, orders, study

from dbsam_deploy.cohort.crews import RayCrew
from dbsam_deploy.cohort.records import find_record
from dbsam_deploy.cohort.run import run_batch
from dbsam_deploy.core.errors import EngineError

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def node(address: str) -> dict[str, object]:
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    return {**small, "node_ip_address": address}


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # on a machine with much to do
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # as if it were installed there
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args=node("127.0.0.2"))
    found.second = found.add_node(**node("127.0.0.3"))
    yield found
    found.shutdown()


def test_a_worker_and_a_node_die_and_nothing_is_lost_or_double(tiny_artefact, tmp_path, cluster):
    given = orders(tiny_artefact.folder, tmp_path, timeout_s=20)
    studies = [study(tmp_path, f"s{number}", SLOW, number) for number in range(10)]
    studies += [study(tmp_path, "kill", KILL_ONCE, 20), study(tmp_path, "hang", HANG, 21)]
    attempts, done = {}, []
    marks = tmp_path / "marks"

    def lose_a_node() -> None:
        while len(list(given.output.glob("*/study.json"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)

    def report(outcome, count):
        done.append(outcome.study.name)
        attempts[outcome.study.name] = count, outcome

    killer = threading.Thread(target=lose_a_node, daemon=True)
    crew = RayCrew(cluster.address)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    killer.start()
    run_batch(studies, given, crew, report, retries=2)
    killer.join()

    assert Counter(done) == Counter(one.name for one in studies)  # each told of once
    hung = attempts.pop("hang")[1]
    assert "not done within 20 s" in hung.failure
    assert all(outcome.record is not None for _, outcome in attempts.values())
    for name, (_, outcome) in attempts.items():
        assert find_record(given.output / name) == outcome.record
    assert attempts["kill"][0] >= 2
    assert (marks / "killed_20").exists()
    lost = sum(count for count, _ in attempts.values()) - len(attempts)
    begun = sum(len((marks / f"begun_{n}").read_text().splitlines()) for n in (*range(10), 20))
    assert len(attempts) <= begun <= len(attempts) + lost  # again only where an attempt was lost
    assert sorted(p.name for p in given.output.iterdir()) == sorted(attempts)


def test_a_bug_there_is_told_with_its_traceback(tmp_path, cluster):
    buggy = functools.partial(int, "no model")
    given = dataclasses.replace(orders(tmp_path, tmp_path), open_model=buggy)
    with pytest.raises(EngineError, match=r"on a study: ValueError: .*'no model'") as bug:
        run_batch([study(tmp_path, "one")], given, RayCrew(cluster.address), print)
    assert any("do_study" in line for line in bug.value.details)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray:7", "[::1]:99999"])
def test_where_no_cluster_is_one_line_says_so(address):
    with pytest.raises(EngineError, match="no Ray cluster at ") as refused:
        RayCrew(address)
    assert "\n" not in str(refused.value)
