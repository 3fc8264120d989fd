"""One writer of a folder: who waits learns for whom, and a lock ends with its process."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files import locks
from dbsam_deploy.files.locks import LOCK_NAME, one_writer

HOLD = """
import os, sys, time
from pathlib import Path
from dbsam_deploy.files.locks import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_waits_or_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    folder, said, order = tmp_path / "a" / "b", [], []
    me = f"process {os.getpid()} on {socket.gethostname()}"

    def second() -> None:
        with one_writer(folder, say=said.append):
            order.append("second")

    with one_writer(folder):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            assert thread.is_alive()
        with pytest.raises(InputError, match=f"b is being written by {me}; wait until it has"):
            one_writer(folder, wait=False).__enter__()
        with one_writer(folder, name=".another.lock", wait=False):
            order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert said == [f"waiting for {me}, which writes {folder}"]
    assert list(folder.iterdir()) == []


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"by process {it.pid} on"):
            one_writer(tmp_path, wait=False).__enter__()
        it.kill()
    assert (tmp_path / LOCK_NAME).exists()
    with one_writer(tmp_path, wait=False):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} ")
    assert list(tmp_path.iterdir()) == []


def test_many_writers_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock's file goes when its owner ends, while others have it open."""
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.0001)
    inside: list[int] = []
    met: list[int] = []

    def write() -> None:
        for _ in range(40):
            with one_writer(tmp_path):
                inside.append(1)
                met.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [1] * 160


def test_a_lock_that_its_owner_took_away_meanwhile_is_not_taken(tmp_path, monkeypatch) -> None:
    """Between opening and locking: who held the removed file would keep nobody out."""
    real, lock = locks.locked, tmp_path / LOCK_NAME

    def locked_too_late(handle: int) -> bool:
        monkeypatch.setattr(locks, "locked", real)
        lock.unlink()
        return real(handle)

    monkeypatch.setattr(locks, "locked", locked_too_late)
    with one_writer(tmp_path, wait=False):
        assert lock.exists()
        with pytest.raises(InputError, match="is being written by"):
            one_writer(tmp_path, wait=False).__enter__()


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch) -> None:
    def no_locks(handle: int) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "locked", no_locks)
    said: list[str] = []
    with one_writer(tmp_path, say=said.append):
        assert said == [
            f"{tmp_path} cannot be locked (Operation not supported): see to it that nothing else "
            "writes there"
        ]


def test_a_mistake_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError), one_writer(tmp_path / "new" / "inner"):
        raise InputError("a mistake that is found late")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError), one_writer(tmp_path / "there"):
        raise InputError("a mistake that is found late")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
