"""`dbsam predict`, from the command line to its files, beside a bare program that does the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.artefact import Artefact, graph_file, write_artefact
from dbsam_deploy.core.contract import graph_specs
from dbsam_deploy.core.widening import widened
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import load_recipe

ROUNDS = 3
MOST_TIME, MOST_MEMORY = 1.3, 1.15
"""Of the bare program's."""
SAME_PIXELS = 1e-4
"""Share of pixels that may differ: the bare program interpolates in another order, and a few pixels
lie at the threshold."""
BARE = Path(__file__).parent / "timing" / "bare_predict.py"


@dataclass(frozen=True)
class Taken:
    """What one process took: wall-clock seconds, seconds of all cores, most memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(*words: str) -> Taken:
    """Run a Python program to its end.

    The sum of all cores' time is judged: other programs of the machine do not lengthen it.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    cpu = used.ru_utime + used.ru_stime
    return Taken(time.perf_counter() - start, cpu, used.ru_maxrss / 1024)


@pytest.mark.bound
def test_cold_start(tmp_path: Path, case) -> None:
    """At 1024 px in fp16, which a CPU widens; the bare program reads what is widened already."""
    loaded, recipe = load_model(variant="db_sam_tiny"), load_recipe("fp16")
    folder, bare, side = tmp_path / "fp16", tmp_path / "wide", loaded.preprocessing.image_size
    folder.mkdir()
    bare.mkdir()
    names = list(graph_specs(loaded.preprocessing))
    for name in names:
        path = export_graph(loaded.model, name, recipe, folder).path
        (bare / path.name).write_bytes(widened(path.read_bytes()))
    graphs = {name: graph_file(folder / f"{name}.onnx", folder) for name in names}
    write_artefact(
        Artefact(folder, "db_sam_tiny", "fp16", loaded.preprocessing, graphs, loaded.weights)
    )
    picture = tmp_path / "picture.png"
    Image.fromarray(case.image).save(picture)
    box = [f"{number:g}" for number in case.boxes[0]]
    words = ["-m", "dbsam_deploy.predict", str(picture), "--box", *box, "--artefact", str(folder)]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(
            run(str(BARE), str(bare), str(picture), str(tmp_path / "bare.png"), str(side), *box)
        )
        ours.append(run(*words, "--output", str(tmp_path / "out")))
    mask = np.asarray(Image.open(tmp_path / "out" / "picture_mask.png"))
    expected = np.asarray(Image.open(tmp_path / "bare.png"))
    assert expected.any()
    assert np.mean((mask > 0) != (expected > 0)) <= SAME_PIXELS
    ratio = {
        name: min(getattr(one, name) for one in ours) / min(getattr(one, name) for one in theirs)
        for name in ("wall", "cpu", "peak")
    }
    best = min(ours, key=lambda one: one.wall)
    print(f"cold start {best} against {min(theirs, key=lambda one: one.wall)}: {ratio}")
    assert ratio["cpu"] <= MOST_TIME
    assert ratio["peak"] <= MOST_MEMORY
