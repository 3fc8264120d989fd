"""TensorRT's timing caches: measured kernels of one GPU model and one TensorRT, kept for this user.

They make the next build shorter and change nothing else, so where they cannot be kept a build says
so and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import EngineError
from ..files.private import cache_folder, find_kept, keep, private_folder
from .manifest import EngineRecord

_SUFFIX = ".timing"


def put_timings(record: EngineRecord, path: Path, say: Callable[[str], None]) -> None:
    """Write what was measured before for a builder like the record's to `path`, if anything was.

    Args:
        record: what is built.
        path: the builder's file, which it updates.
        say: told that nothing can be kept.
    """
    with _told(say):
        if found := find_kept(_folder(), _stem(record), _SUFFIX):
            path.write_bytes(found[1])


def keep_timings(record: EngineRecord, path: Path, say: Callable[[str], None]) -> None:
    """Keep the builder's file in place of the earlier one; see `put_timings`."""
    with _told(say):
        if path.is_file():
            folder, stem = _folder(), _stem(record)
            kept = keep(folder, stem, _SUFFIX, path.read_bytes())
            for earlier in folder.glob(f"{stem}-*{_SUFFIX}"):
                if earlier != kept:
                    earlier.unlink(missing_ok=True)


@contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (EngineError, OSError) as error:
        say(f"kernel timings are not kept: {error}")


def _folder() -> Path:
    return private_folder(cache_folder("tensorrt-timings"), "kernel timings")


def _stem(record: EngineRecord) -> str:
    """Timings belong to one GPU model and one TensorRT."""
    gpu = "" if record.built_on is None else record.built_on.name
    name = f"{gpu} {record.targets[0]} {record.version}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
