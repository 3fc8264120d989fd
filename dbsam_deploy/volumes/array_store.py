"""Arrays within a budget of bytes: in memory, then in a scratch file, then gone.

They are kept as float16 by default, in half the bytes, and rounded before they are first used: a
result does not depend on what was kept.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray

_LOG = logging.getLogger(__name__)
_Kept = npt.NDArray[np.floating]
K = TypeVar("K", bound=Hashable)


class ArrayStore(Generic[K]):
    """Arrays of one shape by key; threads may share it.

    The least recently used go from memory to the scratch file, and from there for good. The file
    has no name in its folder (on Windows the system deletes it with the process), so nothing is
    left behind, not even by a crash. It is written as a file and mapped for reading: a disk that is
    full is an error then, where a mapping would end the process.

    Args:
        ram_bytes: of arrays in memory.
        disk_bytes: of arrays in the scratch file; 0 for none.
        folder: where the file takes its room; by default the system's for temporary files.
        exact: keep float32.

    Attributes:
        what: the arrays, in words.
        instead: what happens where one was not kept.
    """

    what, instead = "arrays", "they are computed again"

    def __init__(
        self,
        ram_bytes: int,
        disk_bytes: int,
        folder: Path | None = None,
        *,
        exact: bool = False,
    ) -> None:
        if ram_bytes < 0 or disk_bytes < 0:
            raise InputError(
                f"{ram_bytes} and {disk_bytes} bytes of {self.what}: expected 0 or more"
            )
        self.ram_bytes, self.disk_bytes, self._folder = ram_bytes, disk_bytes, folder
        self._dtype = np.dtype(np.float32 if exact else np.float16)
        self._lock = threading.Lock()
        self._ram: OrderedDict[K, _Kept] = OrderedDict()
        self._slots: OrderedDict[K, int] = OrderedDict()
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._disk_limit: int | None = None  # slots, once the disk turned out to be full

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return key in self._ram or key in self._slots

    @property
    def used(self) -> tuple[int, int]:
        """Bytes in memory and in the scratch file."""
        with self._lock:
            return len(self._ram) * self._each, len(self._slots) * self._each

    @property
    def room(self) -> int | None:
        """How many more it keeps without dropping one; None before the first tells their size."""
        with self._lock:
            if not self._shape:
                return None
            kept = len(self._ram) + len(self._slots)
            return max(0, self._most_in_ram + self._most_on_disk - kept)

    def get(self, key: K) -> FloatArray | None:
        """The array as float32, or None where it is not kept."""
        with self._lock:
            if key in self._ram:
                self._ram.move_to_end(key)
                return self._ram[key].astype(np.float32)
            if self._file is None or key not in self._slots:
                return None
            self._slots.move_to_end(key)  # it stays there: reading costs less than moving others
            place = self._slots[key] * self._each
            mapped = np.memmap(self._file, self._dtype, "r", place, self._shape)
            return np.array(mapped, np.float32)  # a copy: another array may get this place

    def put(self, key: K, array: FloatArray) -> FloatArray:
        """Keep an array, and return what `get` will.

        Raises:
            InputError: another shape than the first one's.
        """
        kept = array.astype(self._dtype)
        with self._lock:
            if self._shape not in ((), kept.shape):
                raise InputError(
                    f"{self.what} {kept.shape}, {self._shape} before: a store is of one model"
                )
            self._shape = kept.shape
            if key not in self._ram and key not in self._slots:  # else it is the same again
                self._remember(key, kept)
        return kept.astype(np.float32)

    def close(self) -> None:
        """Drop all arrays and the scratch file; the store can be used again."""
        with self._lock:
            self._ram.clear()
            self._slots.clear()
            if self._file is not None:
                self._file.close()
            self._file = self._disk_limit = None

    @property
    def _each(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize if self._shape else 0

    @property
    def _most_in_ram(self) -> int:
        return self.ram_bytes // self._each

    @property
    def _most_on_disk(self) -> int:
        most = self.disk_bytes // self._each
        return most if self._disk_limit is None else min(most, self._disk_limit)

    def _remember(self, key: K, kept: _Kept) -> None:
        self._ram[key] = kept
        self._ram.move_to_end(key)
        while len(self._ram) > self._most_in_ram:
            self._write(*self._ram.popitem(last=False))

    def _write(self, key: K, content: _Kept) -> None:
        """Into a free slot, or that of the least recently used."""
        slot = len(self._slots)
        if slot >= self._most_on_disk:
            if not self._slots:
                return
            _, slot = self._slots.popitem(last=False)
        try:
            if self._file is None:  # unbuffered: what a full disk refused is not tried again
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)  # where nobody closes the store
            self._file.seek(slot * self._each)
            if self._file.write(content.tobytes()) < self._each:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._disk_limit = len(self._slots)
            _LOG.warning(
                "no more %s in the scratch file (%s): %s instead",
                self.what,
                error.strerror,
                self.instead,
            )
            return
        self._slots[key] = slot
