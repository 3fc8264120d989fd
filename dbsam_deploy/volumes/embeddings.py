"""Embeddings of slices within a budget of bytes: in memory, then in a scratch file.

An embedding is kept under its image's content, so sessions on one study share it, and by default as
float16, in half the bytes. It is rounded before it is first used: a mask does not depend on what
was kept.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..core.masks import Prediction
from ..core.points import PointRules
from ..prediction.predictor import Encoding, Promptable
from ..prediction.turns import Turns

RAM_BYTES = 512 * 1024 * 1024
"""Embeddings kept in memory: 256 slices at SAM's size."""
DISK_BYTES = 4 * 1024 * 1024 * 1024
"""Embeddings kept in the scratch file: 2048 slices at SAM's size."""

_LOG = logging.getLogger(__name__)
_Kept = npt.NDArray[np.floating]


class ImageKey(NamedTuple):
    """What an image's embedding is kept under.

    Attributes:
        digest: of the pixels.
        size: height and width.
    """

    digest: bytes
    size: tuple[int, int]


def image_key(image: ByteArray) -> ImageKey:
    """The key of an (H, W, 3) uint8 image."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=32).digest()
    return ImageKey(digest, (image.shape[0], image.shape[1]))


class EmbeddingStore:
    """Embeddings of one model by image; threads may share it.

    The least recently used go from memory to the scratch file, and from there for good. The file
    has no name in its folder (on Windows the system deletes it with the process), so nothing is
    left behind, not even by a crash. It is written as a file and mapped for reading: a disk that is
    full is an error then, where a mapping would end the process.

    Args:
        ram_bytes: of embeddings in memory.
        disk_bytes: of embeddings in the scratch file; 0 for none.
        folder: where the file takes its room; by default the system's for temporary files.
        exact: keep float32, with which masks are those of a predictor without a store.
    """

    def __init__(
        self,
        ram_bytes: int = RAM_BYTES,
        disk_bytes: int = DISK_BYTES,
        folder: Path | None = None,
        *,
        exact: bool = False,
    ) -> None:
        if ram_bytes < 0 or disk_bytes < 0:
            raise InputError(
                f"{ram_bytes} and {disk_bytes} bytes of embeddings: expected 0 or more"
            )
        self.ram_bytes, self.disk_bytes, self._folder = ram_bytes, disk_bytes, folder
        self._dtype = np.dtype(np.float32 if exact else np.float16)
        self._lock = threading.Lock()
        self._ram: OrderedDict[ImageKey, _Kept] = OrderedDict()
        self._slots: OrderedDict[ImageKey, int] = OrderedDict()
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._disk_limit: int | None = None  # slots, once the disk turned out to be full

    def __contains__(self, key: ImageKey) -> bool:
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

    def get(self, key: ImageKey) -> FloatArray | None:
        """The embedding as float32, or None where it is not kept."""
        with self._lock:
            if key in self._ram:
                self._ram.move_to_end(key)
                return self._ram[key].astype(np.float32)
            if self._file is None or key not in self._slots:
                return None
            self._slots.move_to_end(key)  # it stays there: reading costs less than moving others
            place = self._slots[key] * self._each
            mapped = np.memmap(self._file, self._dtype, "r", place, self._shape)
            return np.array(mapped, np.float32)  # a copy: another embedding may get this place

    def put(self, key: ImageKey, embedding: FloatArray) -> FloatArray:
        """Keep an embedding, and return what `get` will.

        Raises:
            InputError: another shape than the first one's.
        """
        kept = embedding.astype(self._dtype)
        with self._lock:
            if self._shape not in ((), kept.shape):
                raise InputError(
                    f"an embedding {kept.shape}, {self._shape} before: a store is of one model"
                )
            self._shape = kept.shape
            self._remember(key, kept)
        return kept.astype(np.float32)

    def close(self) -> None:
        """Drop all embeddings and the scratch file; the store can be used again."""
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

    def _remember(self, key: ImageKey, kept: _Kept) -> None:
        self._ram[key] = kept
        self._ram.move_to_end(key)
        while len(self._ram) > self._most_in_ram:
            self._write(*self._ram.popitem(last=False))

    def _write(self, key: ImageKey, content: _Kept) -> None:
        """Into a free slot, or that of the least recently used."""
        slot = len(self._slots)
        if slot >= self._most_on_disk:
            if not self._slots:
                return
            _, slot = self._slots.popitem(last=False)
        try:
            if self._file is None:  # unbuffered: what a full disk refused is not tried again
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
            self._file.seek(slot * self._each)
            if self._file.write(content.tobytes()) < self._each:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._disk_limit = len(self._slots)
            _LOG.warning(
                "no more embeddings in the scratch file (%s): slices are encoded again instead",
                error.strerror,
            )
            return
        self._slots[key] = slot


class SharedPredictor:
    """A predictor that sessions share: its turns, its slices' embeddings, and work done ahead.

    A predictor without an encoder of its own (a server) is asked by image, and nothing is kept.

    Args:
        predictor: asked by one thread at a time.
        turns: whose those threads are; its own by default.
        store: of this predictor's embeddings; its own by default.
    """

    def __init__(
        self,
        predictor: Promptable,
        *,
        turns: Turns | None = None,
        store: EmbeddingStore | None = None,
    ) -> None:
        self.predictor = predictor
        self.turns = turns or Turns()
        self.store = store or EmbeddingStore()
        self._ahead: OrderedDict[int, Iterator[Ahead]] = OrderedDict()
        self._guard = threading.Lock()
        self._worker: threading.Thread | None = None

    @property
    def points(self) -> PointRules | None:
        """How the predictor answers prompts with points; None where it does not say so."""
        found: PointRules | None = getattr(self.predictor, "points", None)
        return found

    def ask(
        self,
        key: ImageKey,
        image: Callable[[], ByteArray],
        question: Callable[[Promptable], Prediction],
    ) -> Prediction:
        """What the predictor answers about an image.

        Args:
            key: of the image.
            image: makes it; called where it is not encoded yet.
            question: asked once the predictor has the image.
        """
        with self.turns:
            if isinstance(self.predictor, Encoding):
                found = self._embedding(self.predictor, key, image)
                self.predictor.set_embeddings(found, key.size)
            else:
                self.predictor.set_image(image())
            return question(self.predictor)

    def _embedding(
        self, encoder: Encoding, key: ImageKey, image: Callable[[], ByteArray]
    ) -> FloatArray:
        found = self.store.get(key)
        return self.store.put(key, encoder.encode(image())) if found is None else found

    def encode_ahead(self, owner: object, images: Iterable[Ahead]) -> None:
        """Encode images in a thread, while no prompt waits and the store has room.

        Args:
            owner: whose images these are; they replace its earlier ones and go before others'.
            images: each makes an image with its key, or None where there is nothing to encode.
        """
        encoder = self.predictor
        if not isinstance(encoder, Encoding):
            return
        with self._guard:
            self._ahead[id(owner)] = iter(images)
            self._ahead.move_to_end(id(owner))
            if self._worker is None:
                # No daemon: a runtime that still computes while Python ends may crash.
                self._worker = threading.Thread(
                    target=self._work, args=(encoder,), name="dbsam-encode-ahead"
                )
                self._worker.start()

    def stop_ahead(self, owner: object) -> None:
        """Encode nothing more for this owner; returns at once."""
        with self._guard:
            self._ahead.pop(id(owner), None)

    def close(self) -> None:
        """Stop the work ahead and drop the embeddings; not to be called in a turn."""
        with self._guard:
            self._ahead.clear()
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        self.store.close()

    def _work(self, encoder: Encoding) -> None:
        while (owner := self._next_owner()) is not None:
            with self._guard:
                images = self._ahead.get(owner)
            try:
                more = images is not None and self._encode_one(encoder, images)
            except Exception as error:  # a prompt that needs this slice raises it again
                _LOG.warning("encoding ahead ended: %s", error)
                more = False
            with self._guard:
                if not more and self._ahead.get(owner) is images:  # not others that came meanwhile
                    self._ahead.pop(owner, None)

    def _next_owner(self) -> int | None:
        """Who prompted last; None, and no worker any more, where nothing is left to do."""
        with self._guard:
            if not self._ahead or not threading.main_thread().is_alive():
                self._ahead.clear()
                self._worker = None
                return None
            return next(reversed(self._ahead))

    def _encode_one(self, encoder: Encoding, images: Iterator[Ahead]) -> bool:
        """Whether there may be more."""
        found = next(images, None)
        if found is None or self.store.room == 0:
            return False
        made = found()
        if made is not None and made[0] not in self.store:
            key, image = made
            with self.turns.spare():
                self._embedding(encoder, key, lambda: image)
        return True


Ahead = Callable[[], tuple[ImageKey, ByteArray] | None]
"""Makes an image that may be encoded ahead, with its key."""
