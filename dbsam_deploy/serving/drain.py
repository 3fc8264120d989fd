"""Waiting until a server has answered: its models work on nothing, its clients have everything.

A model has done its part once Triton has the masks. Triton then still writes them, up to 256 MiB
for each client, as quickly as that client reads; ended by then, it cuts the answer off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

_PROC = Path("/proc/net")
_OPEN = frozenset({"01", "08"})
"""Connections that the client can still read from: established, or closed by it one way."""
_LOOK_S = 0.05
_QUIET_LOOKS = 6
"""An answer between two places, or a request on its way to the models, is seen a moment later."""


def unsent_bytes(ports: Collection[int]) -> int:
    """What the kernel holds of answers that clients of these TCP ports have not taken.

    Args:
        ports: of servers on this machine, at any of its addresses.
    """
    held = 0
    for table in ("tcp", "tcp6"):
        file = _PROC / table
        if not file.exists():  # a kernel without IPv6
            continue
        for line in file.read_text().splitlines()[1:]:
            _, local, _, state, queues, *_ = line.split()
            if state in _OPEN and int(local.rpartition(":")[2], 16) in ports:
                held += int(queues.partition(":")[0], 16)
    return held


def wait_until_answered(
    busy: Callable[[], bool], has_ended: Callable[[], bool], grace_s: float
) -> bool:
    """Wait until nothing is to do for a while.

    Args:
        busy: whether there is anything that was accepted and has not reached its client.
        has_ended: whether nobody is there who could answer.
        grace_s: how long it may take.

    Returns:
        Whether all was answered within that time, or nobody is there any more.
    """
    deadline, quiet = time.monotonic() + grace_s, 0
    while quiet < _QUIET_LOOKS and not has_ended():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
        quiet = 0 if busy() else quiet + 1
    return True
