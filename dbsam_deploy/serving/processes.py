"""The processes of a Triton server: tied to this one, seen through /proc, ended as one group.

Triton runs each Python model in a process of its own, its stub. It never restarts one that died,
and its ready flag does not show it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.atomic import is_file_at, locked

STUB = "triton_python_backend_stub"
STOPPED, DEAD = frozenset("Tt"), frozenset("ZX")
"""States of a process, as /proc has them."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
LITTLE_MIB = 512
"""Less shared memory than this is said in a server's log."""

_PREFIX, _LOCK = "dbsam_", "lock"
_PROC = Path("/proc")
_KILLED_S = 5.0
_CLAIM_S = 0.01
# Becomes the server's process. The kernel ends it when this process's thread ends in any way, also
# by SIGKILL. Its stubs see that too late, or never while they are stopped: so a shell of the same
# group ends them all when the pipe from this process breaks. Between fork and exec, in a process
# with threads, little is safe: hence a program.
_TIED = """
import ctypes, os, signal, sys
parent, leash, count, *words = sys.argv[1:]
changes, command = words[:int(count)], words[int(count):]
if ctypes.CDLL(None).prctl(1, signal.SIGKILL):
    sys.exit("error: this system cannot end a server together with its parent")
if os.getppid() != int(parent):
    sys.exit("error: the process that starts the server has ended")
if os.fork() == 0:
    os.dup2(int(leash), 0)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    os.execv("/bin/sh", ["sh", "-c", "trap '' HUP INT TERM; read line; kill -KILL 0"])
os.close(int(leash))
variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DBSAM_"))}
os.execve(command[0], command, variables | dict(word.split("=", 1) for word in changes))
"""


@dataclass(frozen=True)
class Stub:
    """The process of a Python model.

    Attributes:
        pid: its number.
        model: the Triton model that it runs.
        state: its letter in /proc/PID/stat.
        cpu_s: seconds that it has computed.
    """

    pid: int
    model: str
    state: str
    cpu_s: float


def start_tied(
    command: Sequence[str], variables: Mapping[str, str], lock: int
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program in a session of its own; it is killed when the calling thread ends.

    Args:
        command: absolute path of the program, and its arguments.
        variables: changes of this environment, from which Python's and our own are left out.
        lock: handle that the program and its children keep open, see `claim_shared_memory`.

    Returns:
        The process, whose standard output and error come through one pipe; and a handle: when it is
        closed, or this process ends, all that the program started ends too.
    """
    ours, leash = os.pipe()[::-1]
    changes = [f"{name}={value}" for name, value in variables.items()]
    words = [str(os.getpid()), str(leash), str(len(changes)), *changes, *command]
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TIED, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(lock, leash),
            start_new_session=True,  # Ctrl-C reaches us alone; we stop the server
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(leash)
    return process, ours


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process ended, without reaping it: `end_group` does that."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def how_ended(process: subprocess.Popen[bytes]) -> str:
    """The signal that ended a process, which is not reaped, or its exit status."""
    if process.returncode is not None:
        signalled, number = process.returncode < 0, abs(process.returncode)
    else:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None  # noqa: S101 - waits
        signalled, number = found.si_code != os.CLD_EXITED, found.si_status
    return f"by {signal.Signals(number).name}" if signalled else f"with status {number}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its group, and wait briefly for them to go.

    It is not reaped before this, so its number cannot have become another process's.
    """
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _KILLED_S
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Process ids of the children of all threads of a process."""
    found: list[int] = []
    for listed in _PROC.glob(f"{pid}/task/*/children"):
        try:
            found += map(int, listed.read_text().split())
        except OSError:
            continue  # the thread has ended
    return found


def stubs(server: int) -> list[Stub]:
    """The living stubs of a server; one that has ended has lost its command line."""
    found = []
    for pid in children(server):
        try:
            words = (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
            state, *numbers = _stat(pid)
        except OSError:
            continue
        if len(words) > 1 and Path(words[0]).name == STUB and state not in DEAD:
            ticks = int(numbers[10]) + int(numbers[11])  # utime, stime
            model = Path(words[1]).parent.parent.name
            found.append(Stub(pid, model, state, ticks / os.sysconf("SC_CLK_TCK")))
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third, its state, on."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()


def ended_children(server: int) -> int:
    """How many children of a server have ended and wait to be reaped."""
    count = 0
    for pid in children(server):
        try:
            count += _stat(pid)[0] in DEAD
        except OSError:
            continue
    return count


def hide_word(pid: int, secret: str) -> bool:
    """Overwrite a word in a child's command line, which every user of the machine may read.

    Args:
        pid: a child that has read its command line.
        secret: the word; the child's own copies of it stay.

    Returns:
        Whether it is hidden; a system may forbid it.
    """
    try:
        fields = _stat(pid)
        first, last = int(fields[45]), int(fields[46])  # arg_start, arg_end
        memory = os.open(_PROC / str(pid) / "mem", os.O_RDWR)
    except OSError:
        return False
    try:
        words, word = os.pread(memory, last - first, first), secret.encode()
        while (place := words.find(word)) >= 0:
            words = words.replace(word, b"*" * len(word), 1)
            os.pwrite(memory, b"*" * len(word), first + place)
    except OSError:
        return False
    finally:
        os.close(memory)
    return True


def little_memory_warning() -> str:
    """What an operator has to know of the shared memory that is left, or ""."""
    free = shutil.disk_usage(SHARED_MEMORY).free >> 20
    if free >= LITTLE_MIB:
        return ""
    return (
        f"WARNING: only {free} MiB are free in /dev/shm, through which images, masks and "
        "kept embeddings go: larger requests will fail (in a container: --shm-size=2g)"
    )


def claim_shared_memory(prefix: str) -> int:
    """A lock that says that shared memory of this prefix is in use; for `start_tied`.

    The system frees it when the last process that has it open has ended, so what a killed server
    left can be told from what a living one uses, in other containers too.
    """
    path = SHARED_MEMORY / f"{prefix}{_LOCK}"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if locked(handle) and is_file_at(handle, path):
            return handle
        os.close(handle)  # another server began meanwhile and takes it for one that was left
        time.sleep(_CLAIM_S)


def free_shared_memory(prefix: str) -> None:
    """Remove all shared memory of this prefix, the lock last."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        if path.name != f"{prefix}{_LOCK}":
            path.unlink(missing_ok=True)
    (SHARED_MEMORY / f"{prefix}{_LOCK}").unlink(missing_ok=True)


def free_left_shared_memory() -> list[str]:
    """Remove the shared memory of servers that were killed together with what would have done it.

    Returns:
        The prefixes found.
    """
    found = []
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*_{_LOCK}"):
        prefix = path.name.removesuffix(_LOCK)
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # another user's
        try:
            if locked(handle) and is_file_at(handle, path):
                free_shared_memory(prefix)
                found.append(prefix)
        finally:
            os.close(handle)
    return found
