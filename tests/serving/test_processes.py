"""Shared memory of servers that begin at the same moment."""

from __future__ import annotations

import os
import threading

import pytest

from dbsam_deploy.serving import processes
from dbsam_deploy.serving.processes import (
    claim_shared_memory,
    free_left_shared_memory,
    free_shared_memory,
)

PREFIX = "dbsam_7_"


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def first(monkeypatch):
    """Something that happens between the opening of a lock and the taking of it."""
    waiting, locked = [], processes.locked

    def after_something(handle: int) -> bool:
        while waiting:
            waiting.pop()()
        return locked(handle)

    monkeypatch.setattr(processes, "locked", after_something)
    return waiting


def test_what_a_killed_server_left_is_freed_and_nothing_else(memory):
    os.close(claim_shared_memory(PREFIX))
    living = claim_shared_memory("dbsam_8_")
    for name in ("dbsam_7_a", "dbsam_8_a", "dbsam_9_a", "other"):
        (memory / name).touch()
    assert free_left_shared_memory() == [PREFIX]
    assert {one.name for one in memory.iterdir()} == {
        *("dbsam_8_lock", "dbsam_8_a", "dbsam_9_a", "other")
    }
    os.close(living)


def test_a_server_that_begins_waits_for_one_that_takes_it_for_dead(memory, first):
    lock, handles = memory / f"{PREFIX}lock", []

    def other_server() -> None:
        handles.append(os.open(lock, os.O_RDWR))
        assert processes.locked(handles[0])

    def end() -> None:
        free_shared_memory(PREFIX)
        os.close(handles[0])

    first.append(other_server)
    timer = threading.Timer(0.05, end)
    timer.start()
    handle = claim_shared_memory(PREFIX)
    (memory / f"{PREFIX}a").touch()
    timer.join()
    assert (memory / f"{PREFIX}a").exists()
    assert free_left_shared_memory() == []
    os.close(handle)


def test_memory_that_was_claimed_again_meanwhile_is_not_freed(memory, first):
    os.close(claim_shared_memory(PREFIX))
    handles = []

    def again() -> None:
        (memory / f"{PREFIX}lock").unlink()
        handles.append(claim_shared_memory(PREFIX))
        (memory / f"{PREFIX}a").touch()

    first.append(again)
    assert free_left_shared_memory() == []
    assert (memory / f"{PREFIX}a").exists()
    os.close(handles[0])
