"""What a reference answers to a gate's questions: asked once, kept in files, and there next time.

PyTorch is the slowest part of an export, and answers the same for every precision of a model. A
file's name has all that its answer depends on, so a kept answer is the one that would be computed.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.contract import GraphSpec, graph_specs
from ..core.errors import EngineError
from ..core.imaging import FloatArray, Preprocessing
from ..files.inputs import code_digest, digest, key_of
from ..files.private import cache_folder, find_kept, keep, private_folder, trim
from ..machine.hardware import cpuinfo, installed_versions, processor
from ..sessions.session import Feed, Session

if TYPE_CHECKING:
    from ..model import DbSam

KEPT_BYTES = 1 << 30
"""Most that is left in a folder of answers when a comparison ends; an image's take about 16 MiB."""
_SUFFIX, _SECONDS = ".npz", "seconds"
_ARITHMETIC = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
"""Environment variables with which PyTorch's libraries choose their kernels."""
_DAMAGED = (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile)


@dataclass
class Encodings:
    """What encoders that compute alike have answered.

    Attributes:
        answers: question → answer.
        seconds: how long each took.
    """

    answers: dict[str, dict[str, FloatArray]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


class AskedOnce:
    """A session that is asked each question about an image once, and timed.

    Args:
        session: what is asked.
        encodings: of encoders like this one, which are not asked again; None if there are none.

    Attributes:
        session: see above.
        seconds: graph → how long each question took.
    """

    def __init__(self, session: Session, encodings: Encodings | None = None) -> None:
        self.backend = session.backend
        self.session = session
        self._answers: dict[str, dict[str, FloatArray]] = {}
        self._encodings = encodings or Encodings(self._answers)
        self.seconds: dict[str, list[float]] = {"encoder": self._encodings.seconds}

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        answers = self._encodings.answers if graph == "encoder" else self._answers
        key = question(graph, feed)
        if key not in answers:
            start = time.perf_counter()
            answers[key] = self.session.run(graph, feed)
            self.seconds.setdefault(graph, []).append(time.perf_counter() - start)
        return dict(answers[key])

    def forget(self) -> None:
        """Keep no answer but shared encodings: the next questions are about another image."""
        self._answers.clear()


class References:
    """A reference whose answers are kept in a folder.

    Args:
        open_session: opens the reference, when the first question comes that has no answer.
        how: preprocessing of its model.
        key: of all that its answers depend on besides the question.
        folder: of the answers, or None for `references_folder`.
        say: told about damaged answers, and about a folder where none can be kept.
        put_away: called when the reference is released, for what else keeps its model.

    Attributes:
        seconds: graph → how long each answer took when it was computed.
    """

    backend = "pytorch-cpu"

    def __init__(
        self,
        open_session: Callable[[], Session],
        how: Preprocessing,
        key: str,
        *,
        folder: Path | None = None,
        say: Callable[[str], None],
        put_away: Callable[[], None] = lambda: None,
    ) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._open, self._say, self._key = open_session, say, key
        self._put_away = put_away
        self._specs = graph_specs(how)
        self._session: Session | None = None
        self._asked: set[str] = set()
        self._folder: Path | None = None
        try:
            self._folder = folder or references_folder()
        except EngineError as error:
            self._give_up(error)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        key = digest(self._key, question(graph, feed))
        found = self._read(key, graph, feed)
        if found is None:
            if self._session is None:
                self._session = self._open()
            start = time.perf_counter()
            found = self._session.run(graph, feed), time.perf_counter() - start
            self._write(key, *found)
        answer, seconds = found
        if key not in self._asked:
            self._asked.add(key)
            self.seconds.setdefault(graph, []).append(seconds)
        return answer

    @property
    def keeps(self) -> bool:
        """Whether a question that was answered has its answer in the folder."""
        return self._folder is not None

    def forget(self) -> None:
        """See `AskedOnce.forget`; here nothing is held in memory."""

    def release(self) -> None:
        """Drop the session, and with it what only it holds; a question may open it again."""
        self._session = None
        self._put_away()

    def trim(self, most: int = KEPT_BYTES) -> None:
        """Remove the answers that were used longest ago, until the folder has `most` bytes."""
        if self._folder is not None:
            trim(self._folder, _SUFFIX, most)

    def _read(self, key: str, graph: str, feed: Feed) -> tuple[dict[str, FloatArray], float] | None:
        """A kept answer and how long it took; None where there is none that is whole."""
        if self._folder is None:
            return None
        try:
            kept = find_kept(self._folder, key, _SUFFIX, damaged=self._tell)
        except OSError as error:
            self._give_up(error)
            return None
        if kept is None:
            return None
        path, content = kept
        try:
            answer = self._parse(content, self._specs[graph], feed)
        except _DAMAGED:
            self._tell(path)
            with suppress(OSError):
                path.unlink()
            return None
        return answer

    def _parse(
        self, content: bytes, spec: GraphSpec, feed: Feed
    ) -> tuple[dict[str, FloatArray], float]:
        """Arrays of a file, if they are the graph's outputs for this feed, and the seconds."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            answer = {name: arrays[name] for name in spec.output_names}
            seconds = float(arrays[_SECONDS])
        sizes = {
            axis: size
            for tensor in spec.inputs
            for axis, size in zip(tensor.axes, feed[tensor.name].shape, strict=True)
        }
        for tensor in spec.outputs:
            wanted = tuple(sizes[a] if isinstance(a, str) else a for a in tensor.axes)
            found = answer[tensor.name]
            if found.shape != wanted or found.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: {found.dtype} {found.shape}, not {wanted}")
        return answer, seconds

    def _write(self, key: str, answer: dict[str, FloatArray], seconds: float) -> None:
        if self._folder is None:
            return
        stream = io.BytesIO()
        arrays: dict[str, Any] = {**answer, _SECONDS: np.float64(seconds)}
        np.savez(stream, **arrays)
        try:
            keep(self._folder, key, _SUFFIX, stream.getvalue())
        except OSError as error:
            self._give_up(error)

    def _tell(self, path: Path) -> None:
        self._say(f"{path} is damaged; this answer of PyTorch is computed anew")

    def _give_up(self, error: Exception) -> None:
        self._folder = None
        self._say(f"PyTorch's answers are not kept for the next export: {error}")


def question(graph: str, feed: Feed) -> str:
    """Hash of a graph's name and its inputs, their names, dtypes, shapes and values."""
    parts: list[str | memoryview] = [graph]
    for name in sorted(feed):
        array = feed[name]
        values = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        parts += [name, str(array.dtype), repr(array.shape), values]
    return digest(*parts)


def references_key(model: DbSam, weights: str) -> str:
    """All that PyTorch's answers depend on besides the question.

    Processor and threads are among it, since both decide in which order a sum is added up.

    Args:
        model: the reference.
        weights: hash of its tensors.
    """
    import torch

    told = {name: value for name, value in os.environ.items() if name.startswith(_ARITHMETIC)}
    return key_of(
        {
            "weights": weights,
            "model": repr(model.config),
            "code": code_digest(("model", "sessions.pytorch_session")),
            **installed_versions(("torch", "segment-anything", "numpy")),
            "build of torch": torch.__config__.show(),
            "processor": processor(cpuinfo()),
            "threads": repr((torch.get_num_threads(), torch.__config__.parallel_info())),
            "arithmetic": repr(
                (
                    sorted(told.items()),
                    torch.get_float32_matmul_precision(),
                    torch.are_deterministic_algorithms_enabled(),
                    torch.backends.mkldnn.enabled,
                    torch.is_autocast_enabled("cpu"),
                    torch.get_default_dtype(),
                )
            ),
        }
    )


def references_folder() -> Path:
    """Where this user's answers are kept.

    Raises:
        EngineError: it cannot be made, or others may write there.
    """
    return private_folder(cache_folder("references"), "PyTorch's answers")
