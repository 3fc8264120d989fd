"""CPU time of a server on this machine: what a request costs, however busy the machine is."""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import InputError

_PROC = Path("/proc")


def cpu_seconds(pid: int, proc: Path = _PROC) -> float:
    """CPU time so far of a process and of all below it, in seconds.

    That of processes below it that have ended counts where their parent waited for them.

    Args:
        pid: of the server, or of `serve` above it.
        proc: where Linux shows its processes.

    Raises:
        InputError: there is no such process, or no Linux.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # it has just ended
        fields = text.rpartition(")")[2].split()  # a name may hold blanks and brackets
        number = int(stat.parent.name)
        parents[number] = int(fields[1])
        ticks[number] = sum(int(field) for field in fields[11:15])
    if pid not in ticks:
        raise InputError(f"--server-pid {pid}: no such process on this machine")
    below, found = {pid}, -1
    while found != len(below):
        found = len(below)
        below |= {number for number, parent in parents.items() if parent in below}
    return sum(ticks[number] for number in below) / os.sysconf("SC_CLK_TCK")
