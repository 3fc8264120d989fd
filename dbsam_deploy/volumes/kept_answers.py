"""What a model answered, on the disk slice by slice, so that the next run need not ask it again.

Answers are kept by the question, so a run that goes on takes the very same way through a volume.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ..core.contract import ADAPT_POINTS, BOXES
from ..core.errors import InputError
from ..core.imaging import Preprocessing
from ..core.masks import MaskPacker, Prediction, unpack_masks
from ..core.points import PointRules
from ..core.prompts import PromptArrays
from ..files.inputs import digest
from ..prediction.predictor import Promptable
from .embeddings import SharedPredictor, image_key

COMMIT_S = 0.5
"""Seconds of work that a crash may cost: a commit takes as long as a disk does, some 20 ms."""
_TABLES = (
    "CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS answer (question TEXT PRIMARY KEY, shape TEXT NOT NULL, "
    "masks BLOB NOT NULL, ious BLOB NOT NULL, logits BLOB, seal TEXT NOT NULL)",
)


class KeptAnswers:
    """Answers of one model to the prompts of one study, in one file.

    Args:
        path: the file; made if it is not there.
        made_from: what a run is about (`volume`, `model`, …) → a hash or text.

    Raises:
        InputError: it is of another run, or no such file, or cannot be written.
    """

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        self.path = path
        self._committed = time.monotonic()
        self._key = json.dumps(dict(made_from), sort_keys=True)
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, check_same_thread=False)
        try:
            with self._usable(), self._base:
                for table in _TABLES:
                    self._base.execute(table)
                found = dict(self._base.execute("SELECT name, value FROM run"))
                if not found:
                    rows = list(made_from.items())
                    self._base.executemany("INSERT INTO run VALUES (?, ?)", rows)
            others = [name for name, value in made_from.items() if found.get(name, value) != value]
            if found and others:
                raise InputError(
                    f"{path} keeps slices of a run with another {others[0]}: repeat that run, or "
                    "begin anew without --resume"
                )
        except BaseException:
            self._base.close()
            raise

    def __len__(self) -> int:
        """How many answers there are."""
        with self._usable():
            return int(self._base.execute("SELECT count(*) FROM answer").fetchone()[0])

    def get(self, question: str) -> Prediction | None:
        """The answer to a question, if it is kept; one that was damaged is not."""
        with self._usable():
            row = self._base.execute(
                "SELECT shape, masks, ious, logits, seal FROM answer WHERE question = ?",
                (question,),
            ).fetchone()
        if row is None or row[4] != self._seal(question, *row[:4]):
            return None
        shape = tuple(json.loads(row[0]))
        ious = np.frombuffer(row[2], np.float32).reshape(shape[:2])
        return Prediction(unpack_masks(row[1], shape), ious, _unpacked(row[3], shape))

    def put(self, question: str, answer: Prediction) -> None:
        """Keep an answer; it is on the disk within `COMMIT_S` of work, and when this is closed."""
        masks = MaskPacker()
        masks.add(answer.masks)
        ious = answer.ious.astype(np.float32).tobytes()
        logits = None if answer.logits is None else zlib.compress(answer.logits.tobytes(), 1)
        row = (json.dumps(answer.masks.shape), masks.finish(), ious, logits)
        with self._usable():
            self._base.execute(
                "INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?, ?, ?)",
                (question, *row, self._seal(question, *row)),
            )
            if time.monotonic() - self._committed >= COMMIT_S:
                self._commit()

    def _commit(self) -> None:
        self._base.commit()
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the file, and remove it if nothing is in it."""
        try:
            is_empty = len(self) == 0
            with self._usable():
                self._commit()
        finally:
            self._base.close()
        if is_empty:
            remove_answers(self.path)

    def _seal(self, *parts: str | bytes | None) -> str:
        return digest(self._key, *(part or b"" for part in parts))

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{self.path}, which keeps finished slices, cannot be used: {error}; free some "
                "space there, move what is in the way, or write elsewhere"
            ) from error


def remove_answers(path: Path) -> None:
    """Remove a file of `KeptAnswers`, and what a killed run left beside it."""
    for file in (path, path.with_name(f"{path.name}-journal")):
        file.unlink(missing_ok=True)


def _unpacked(packed: bytes | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    if packed is None:
        return None
    values = np.frombuffer(zlib.decompress(packed), np.float32)
    side = round((values.size / (shape[0] * shape[1])) ** 0.5)
    return values.reshape(*shape[:2], side, side)


class ResumedPredictor:
    """A `Promptable` that asks another one what is not kept yet.

    A slice of which all is known is not encoded.

    Args:
        shared: asked.
        kept: where its answers are kept, if they are.
        logits: keep and give the logits, too.
    """

    def __init__(
        self, shared: SharedPredictor, kept: KeptAnswers | None, *, logits: bool = False
    ) -> None:
        self._shared, self._kept, self._logits = shared, kept, logits
        self._image: npt.NDArray[Any] = np.zeros((0, 0, 3), np.uint8)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images enter the model, where it is in this process."""
        return getattr(self._shared.predictor, "preprocessing", None)

    @property
    def points(self) -> PointRules | None:
        """See `SharedPredictor.points`."""
        return self._shared.points

    def forget(self) -> None:
        """Ask for everything from now on: what was kept is closed."""
        self._kept = None

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Take an image for the following calls."""
        self._image = image

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """See `Promptable`."""
        return self._ask({BOXES: boxes}, lambda one: one.predict_boxes(boxes))

    def predict_prompts(
        self,
        *,
        multimask: bool = False,
        adapt_points: bool = True,
        **prompts: Unpack[PromptArrays],
    ) -> Prediction:
        """See `Promptable`."""
        how = {"multimask": multimask, ADAPT_POINTS.name: adapt_points}

        def ask(predictor: Promptable) -> Prediction:
            return predictor.predict_prompts(
                multimask=multimask, adapt_points=adapt_points, **prompts
            )

        return self._ask({**{name: np.array(flag) for name, flag in how.items()}, **prompts}, ask)

    def _ask(
        self, arrays: Mapping[str, Any], question: Callable[[Promptable], Prediction]
    ) -> Prediction:
        key = image_key(self._image)
        whole = hashlib.sha256(key.digest)
        for part, array in arrays.items():
            if array is not None:
                whole.update(f"{part} {array.dtype} {array.shape}".encode() + array.tobytes())
        name = whole.hexdigest()
        known = None if self._kept is None else self._kept.get(name)
        if known is not None:
            return known
        answer = self._shared.ask(key, lambda: self._image, question)
        if not self._logits:
            answer = Prediction(answer.masks, answer.ious)
        if self._kept is not None:
            self._kept.put(name, answer)
        return answer
