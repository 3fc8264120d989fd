"""What a repository's models have to answer to the health question, computed when it is filled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefact import Artefact
from ..core.contract import IOU_SCORES, MASK_BITS, MASKS, encoder_spec
from ..core.embedding_cache import EmbeddingCache
from ..core.errors import ServingError
from ..core.imaging import Arrays, ByteArray, FloatArray, Preprocessing
from ..core.interactive import Interactive
from ..machine.onnxruntime_memory import share_memory
from ..machine.privacy import silence
from .probe import BOXES_MODEL, PROBE_SIZE, PROMPTS_MODEL, probe_image, question

MAX_OTHER_PIXELS, MAX_SCORE_ERROR = 0.05, 0.1
"""How near an answer must be: share of a mask's pixels, and its score. The question has some noise,
and an engine in fp16 or int8 differs from ONNX Runtime on a CPU; another model, or a broken one,
differs by far more."""


def known_answers(artefact: Artefact, say: Callable[[str], None]) -> dict[str, Any]:
    """Answers of an export's ONNX graphs on ONNX Runtime, for `repository.json`.

    One image is encoded for it. Without onnxruntime, and for graphs with operators that only
    TensorRT has, there are none; `say` is told so.

    Args:
        artefact: the export.
        say: gets one line where there are none.

    Returns:
        Model → `masks`, packed bits in hexadecimal digits, and `scores`.
    """
    paths = {name: artefact.path(name) for name in artefact.graphs}
    if importlib.util.find_spec("onnxruntime") is None:
        say("no known answer for `serve --check`: onnxruntime is not installed here")
        return {}
    if any(path.suffix != ".onnx" for path in paths.values()):
        return {}
    how = artefact.preprocessing
    graphs = _OnnxGraphs({name: str(path) for name, path in paths.items()}, how)
    models = [BOXES_MODEL, *([PROMPTS_MODEL] if "prompt_decoder" in paths else [])]
    answers = {}
    interactive = Interactive(how, graphs, EmbeddingCache(1 << 30), chunk=16)
    for model in models:
        asked = question(model, probe_image(bytes(3)), how.mask_side)
        try:
            answer = interactive.answer(asked, (MASKS.name, IOU_SCORES.name), lambda: None)
        except Exception as error:  # onnxruntime's have no common base
            say(f"no known answer for `serve --check`: {' '.join(str(error).split())[:200]}")
            return {}
        answers[model] = {
            MASKS.name: np.packbits(answer[MASKS.name]).tobytes().hex(),
            "scores": [round(float(score), 4) for score in answer[IOU_SCORES.name].ravel()],
        }
    return answers


def compare(model: str, answer: Arrays, known: dict[str, Any]) -> None:
    """Refuse an answer that is not the known one.

    Args:
        model: one of `probe.SERVED`.
        answer: its masks and iou_scores for `probe.question`.
        known: what `known_answers` returned; a model that it does not have passes.

    Raises:
        ServingError: another mask or score.
    """
    expected = known.get(model if model == PROMPTS_MODEL else BOXES_MODEL)
    if expected is None:
        return
    packed = np.frombuffer(bytes.fromhex(expected[MASKS.name]), np.uint8)
    scores = np.asarray(expected["scores"], np.float32)
    masks = np.unpackbits(packed).reshape(len(scores), *PROBE_SIZE).astype(bool)
    found = answer[MASKS.name].reshape(masks.shape).astype(bool)
    others = float((masks != found).mean((1, 2)).max())
    error = float(np.abs(answer[IOU_SCORES.name].ravel() - scores).max())
    if others > MAX_OTHER_PIXELS or error > MAX_SCORE_ERROR:
        raise ServingError(
            f"{model} answers, but not what its repository says: {others:.1%} of the pixels are "
            f"others (at most {MAX_OTHER_PIXELS:.0%}), the score is off by {error:.3f} (at most "
            f"{MAX_SCORE_ERROR})"
        )


@dataclass(frozen=True)
class _OnnxGraphs:
    """`interactive.Graphs` on ONNX Runtime; each graph is opened for one call."""

    paths: dict[str, str]
    how: Preprocessing

    def encode(self, feed: Arrays) -> tuple[Any, int]:
        """See `interactive.Graphs`."""
        names = encoder_spec(self.how).output_names
        found = dict(zip(names, self._run("encoder", feed, names), strict=True))
        return found, sum(array.nbytes for array in found.values())

    def decode(self, graph: str, embedding: Any, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """See `interactive.Graphs`."""
        batched = {name: array[None] for name, array in feed.items()}
        low, iou = self._run(graph, {**embedding, **batched})
        return low[0], iou[0]

    def mask_bits(self, feed: Arrays) -> ByteArray:
        """See `interactive.Graphs`."""
        found: ByteArray = self._run(MASK_BITS, feed)[0]
        return found

    def _run(self, graph: str, feed: Arrays, names: list[str] | None = None) -> list[Any]:
        runtime = silence(importlib.import_module("onnxruntime"))
        settings = runtime.SessionOptions()
        share_memory(runtime, settings)  # an export has just compared its graphs in it
        chain = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(self.paths[graph], settings, providers=chain)
        outputs: list[Any] = session.run(names, feed)
        return outputs
