"""A session on 512×512×400 voxels: bytes and CPU time of everything but the model itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.bright import FreeEncoder
from support.peak_memory import peak_bytes

from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.session import VolumePredictor
from dbsam_deploy.volumes.stop_rules import ChainRule

MOST_BYTES = 1_200_000_000
SHAPE = (400, 512, 512)
OBJECTS = (  # centre and radii along z, y, x; its middle slice; a box there
    ((200, 250, 180), (150, 100, 90), 200, [80, 140, 280, 360]),
    ((220, 300, 380), (60, 50, 45), 220, [330, 245, 430, 355]),
    ((120, 380, 300), (80, 40, 60), 120, [235, 335, 365, 425]),
)


def drawn() -> tuple[Volume, np.ndarray]:
    """A volume, and its objects as a label map."""
    pixels = np.random.default_rng(1).integers(0, 100, SHAPE, np.uint8)
    truth = np.zeros(SHAPE, np.uint8)
    y, x = np.ogrid[: SHAPE[1], : SHAPE[2]]
    for index, plane in enumerate(truth):  # whole arrays of float would be the peak
        for label, ((cz, cy, cx), (rz, ry, rx), _, _) in enumerate(OBJECTS, 1):
            off = ((index - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
            plane[off < 1] = label
        pixels[index][plane > 0] = 200
    return Volume(Path("ct"), "npz", pixels, STORED, spacing_mm=(1.5, 0.8, 0.8)), truth


def work() -> dict[str, float]:
    """What the steps of a session take; the result is compared with the truth."""
    volume, truth = drawn()
    model = FreeEncoder()
    rule = ChainRule(min_overlap=0.3, min_likeness=0.05)  # tips of five voxels look less like it
    taken: dict[str, float] = {}

    def timed(name: str, step: Callable[[], object]) -> None:
        start = time.process_time()
        step()
        taken[f"{name}, CPU s"] = round(time.process_time() - start, 2)

    with VolumePredictor(model, volume, rule=rule, encode_ahead=False) as session:
        for label, (_, _, index, box) in enumerate(OBJECTS, 1):
            session.prompt(label, box=box, index=index)
        timed("3 objects carried", session.propagate)
        for found, expected in zip(session.segmentation().labels, truth, strict=True):
            np.testing.assert_array_equal(found, expected)
        taken["slices encoded"] = model.encoded
        for index in range(SHAPE[0]):
            session.prompt(4, box=[10, 10, 60, 60], index=index)
        assert model.encoded == SHAPE[0]
        timed("3 objects again", lambda: session.propagate([1, 2, 3]))
        assert model.encoded == SHAPE[0]  # no slice was encoded twice
        timed("segmentation", session.segmentation)
        in_memory, in_file = session.shared.store.used
    taken["embeddings in memory, MiB"] = in_memory >> 20
    taken["embeddings in the file, MiB"] = in_file >> 20
    taken["peak, bytes"] = peak_bytes()
    return taken


@pytest.mark.bound
def test_bytes_and_time_of_a_session() -> None:
    # In a process of its own: the peak is this one's whole life.
    code = "import json, bench_volume_session as b; print(json.dumps(b.work()))"
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "tests"), *sys.path]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    taken = json.loads(found.stdout)
    print("\n".join(f"{name}: {value}" for name, value in taken.items()))
    assert taken["peak, bytes"] < MOST_BYTES
