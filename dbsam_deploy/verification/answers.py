"""PyTorch's masks of the bundled images, kept in an export that passed its gate.

Whoever has the export can so hold any runtime, on any machine, against PyTorch, without PyTorch and
without the weights. They are kept for the images that come with this library alone: a mask of
somebody's own image would travel with the export.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artefact import ANSWERS_NAME, Artefact, GraphFile, graph_file, take_answers
from ..core.errors import InputError
from ..core.masks import Prediction
from ..files.atomic import write_atomically
from ..files.inputs import digest
from ..recipe import load_recipe
from .cases import Case, bundled_examples, load_cases
from .parity import GateMasks

_DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


class AnswersFile:
    """Collects PyTorch's masks while an export is compared with it.

    Args:
        wanted: False where they are of somebody's own images, and none are kept.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._wanted = wanted
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def add(self, case: Case, masks: GateMasks) -> None:
        """Keep an image's masks as bits, its sample, and the logits that went into its prompts."""
        if not self._wanted:
            return
        name = _name(case)
        self._arrays[f"{name}.sample"] = masks.sample
        self._arrays[f"{name}.logits"] = masks.boxes.known_logits().astype(np.float16)
        for number, found in enumerate([masks.boxes.masks, *masks.prompted]):
            self._arrays[f"{name}.{number}"] = np.packbits(found.astype(bool), axis=-1)

    def write(self, folder: Path) -> GraphFile | None:
        """Write what was collected beside the manifest and describe the file; None for nothing."""
        if not self._arrays:
            return None
        path = folder / ANSWERS_NAME
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **self._arrays)
        with write_atomically(path) as file:
            file.write(stream.getvalue())
        return graph_file(path, folder)


def read_answers(artefact: Artefact) -> list[tuple[Case, GateMasks]]:
    """The gate's images and PyTorch's masks of them.

    Raises:
        InputError: the export keeps none, its file has changed, or the images are others by now.
    """
    content = take_answers(artefact)
    if content is None:
        raise InputError(
            f"{artefact.folder} keeps no masks of PyTorch: its gate had images of your own, or an "
            "earlier version made it; export it again without --data"
        )
    parity = replace(load_recipe(artefact.precision).parity, images=artefact.figures["images"])
    cases = load_cases(bundled_examples(), parity)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return [(case, _masks(case, file)) for case in cases]
    except _DAMAGED as error:
        raise InputError(
            f"{artefact.folder} keeps PyTorch's masks of other images than come with this version "
            f"({error}); export it again"
        ) from error


def _masks(case: Case, file: Any) -> GateMasks:
    name, width = _name(case), case.image.shape[1]

    def unpacked(number: int) -> npt.NDArray[np.uint8]:
        return np.unpackbits(file[f"{name}.{number}"], axis=-1, count=width)

    logits = file[f"{name}.logits"].astype(np.float32)
    empty = np.zeros(logits.shape[:2], np.float32)
    boxes = Prediction(unpacked(0), empty, logits)
    return GateMasks(boxes, [unpacked(i) for i in range(1, 5)], file[f"{name}.sample"])


def _name(case: Case) -> str:
    return digest(case.name, case.image.tobytes(), case.boxes.tobytes())
