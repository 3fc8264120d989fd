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
_WITH_PEAK = (
    "import atexit, runpy, sys; from support.peak_memory import peak_bytes; "
    "atexit.register(lambda: print(peak_bytes())); "
)
"""Before a program: its peak in its own words at its end. What the system says of an ended process
begins with the peak of this one, which has PyTorch."""


@dataclass(frozen=True)
class Taken:
    """What one process took: wall-clock seconds, seconds of all cores, most memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(start_it: str, *words: str) -> Taken:
    """Run a Python program to its end, by a function of `runpy` with its arguments.

    The sum of all cores' time is judged: other programs of the machine do not lengthen it.
    """
    start = time.perf_counter()
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "tests"), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_WITH_PEAK} runpy.{start_it}", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    cpu = used.ru_utime + used.ru_stime
    return Taken(time.perf_counter() - start, cpu, int(said.split()[-1]) / 2**20)


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
    words = [str(picture), "--box", *box, "--artefact", str(folder)]
    bare_words = [str(bare), str(picture), str(tmp_path / "bare.png"), str(side), *box]
    predict = "run_module('dbsam_deploy.predict', run_name='__main__', alter_sys=True)"
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(run(f"run_path({str(BARE)!r}, run_name='__main__')", *bare_words))
        ours.append(run(predict, *words, "--output", str(tmp_path / "out")))
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
