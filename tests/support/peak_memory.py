"""The memory that a process takes, and has taken at most."""

from __future__ import annotations

from pathlib import Path


def peak_bytes(pid: int | None = None) -> int:
    """The largest resident memory of a process, by default this one, so far.

    `ru_maxrss` is not that: Linux begins it with the peak of the process that started this one.
    """
    return _status("VmHWM", pid)


def forget_peak() -> int:
    """Begin the peak of this process anew; the resident memory that it begins with."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes()


def resident_bytes() -> int:
    """The resident memory of this process now."""
    return _status("VmRSS", None)


def _status(name: str, pid: int | None) -> int:
    status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
