"""Studies that raise, hang or kill their process, on a real small export; in worker processes."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from dbsam_deploy.api.loading import open_model
from dbsam_deploy.api.model import Model
from dbsam_deploy.cohort.manifest import Study
from dbsam_deploy.cohort.work import Orders
from dbsam_deploy.sessions.backends import ModelOptions
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

RAISE, HANG, KILL, KILL_ONCE, SLOW = 201, 202, 203, 204, 205
"""First pixel of an image that does so; others are segmented."""
BOX = StudyPrompts((ObjectPrompts("kidney", (SlicePrompt((4.0, 4.0, 30.0, 28.0), index=0),)),))


class Faulty:
    """A predictor that does what an image's first pixel says."""

    def __init__(self, inner: Any, marks: Path) -> None:
        self._inner, self._marks = inner, marks
        self.predict_boxes, self.predict_prompts = inner.predict_boxes, inner.predict_prompts

    def set_image(self, image: np.ndarray) -> None:
        what = int(image[0, 0, 0])
        if what == RAISE:
            raise ZeroDivisionError("a bug")
        if what == HANG:
            time.sleep(600)
        if what == SLOW:
            time.sleep(1)
        mark = self._marks / f"killed_{int(image[0, 1, 0])}"
        if what == KILL or (what == KILL_ONCE and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (self._marks / f"begun_{int(image[0, 1, 0])}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        self._inner.set_image(image)


def open_faulty(artefact: Path, marks: Path) -> Model:
    model = open_model(ModelOptions(artefact=artefact))
    model.predictor = Faulty(model.predictor, marks)
    return model


def orders(artefact: Path, folder: Path, **more: Any) -> Orders:
    """Orders whose results and marks go below `folder`."""
    marks, output = folder / "marks", folder / "out"
    for one in (marks, output):
        one.mkdir(parents=True, exist_ok=True)
    opener = functools.partial(open_faulty, artefact, marks)
    return Orders(output, opener, str(marks), ("png", "npz"), **more)


def study(folder: Path, name: str, what: int = 0, number: int = 0) -> Study:
    """A drawn picture whose first pixels say what happens, and which study it is."""
    pixels = np.random.default_rng(number).integers(0, 200, (32, 40), dtype=np.uint8)
    pixels[0, :2] = what, number
    path = folder / "studies" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, imgs=pixels)
    return Study(name, path, BOX)
