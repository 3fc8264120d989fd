"""Embeddings of slices within a budget of bytes, and a predictor that sessions share.

An embedding is kept under its image's content, so sessions on one study share it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..core.imaging import ByteArray, FloatArray
from ..core.masks import Prediction
from ..core.points import PointRules
from ..prediction.predictor import Encoding, Promptable
from ..prediction.turns import Turns
from .array_store import ArrayStore

RAM_BYTES = 512 * 1024 * 1024
"""Embeddings kept in memory: 256 slices at SAM's size."""
DISK_BYTES = 4 * 1024 * 1024 * 1024
"""Embeddings kept in the scratch file: 2048 slices at SAM's size."""

_LOG = logging.getLogger(__name__)


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


class EmbeddingStore(ArrayStore[ImageKey]):
    """Embeddings of one model by image; threads may share it.

    Args:
        ram_bytes: of embeddings in memory.
        disk_bytes: of embeddings in the scratch file; 0 for none.
        folder: where the file takes its room; by default the system's for temporary files.
        exact: keep float32, with which masks are those of a predictor without a store.
    """

    what, instead = "embeddings", "slices are encoded again"

    def __init__(
        self,
        ram_bytes: int = RAM_BYTES,
        disk_bytes: int = DISK_BYTES,
        folder: Path | None = None,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__(ram_bytes, disk_bytes, folder, exact=exact)


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
