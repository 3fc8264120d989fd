"""How many cores this process may use: those that it may run on, within a container's share."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_VERSION_1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores for this process, at least one.

    Args:
        cgroups: where Linux tells a container's share.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    share = _share(cgroups)
    return cores if share is None else max(1, min(cores, math.ceil(share)))


def fewer_cores(cgroups: Path = CGROUPS) -> int:
    """`usable_cores` where the machine has more, else 0: a runtime then chooses for itself."""
    cores = usable_cores(cgroups)
    return cores if cores < (os.cpu_count() or 1) else 0


def _share(cgroups: Path) -> float | None:
    """Cores that a quota amounts to, None without one."""
    with suppress(OSError, ValueError):  # version 2
        quota, period = (cgroups / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        found = [int((cgroups / "cpu" / name).read_text()) for name in _VERSION_1]
        return found[0] / found[1] if found[0] > 0 else None
    return None
