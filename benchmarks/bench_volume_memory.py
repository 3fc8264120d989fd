"""A CT of 512×512×800 through `dbsam predict` stays under 4 GB, whatever the model's own needs."""

from pathlib import Path

import pytest
from support.tiny_artefact import make_tiny_artefact
from timing.volumes import run_predict

MOST_BYTES = 4_000_000_000
DEPTH = 800


@pytest.mark.bound
def test_memory_of_a_large_ct(tmp_path: Path) -> None:
    artefact = make_tiny_artefact(tmp_path / "graphs")
    taken = run_predict(tmp_path, DEPTH, "--artefact", str(artefact.folder))
    assert taken.labels.shape == (DEPTH, 512, 512)
    print(f"peak {taken.peak_bytes / 1e9:.2f} GB, {taken.seconds:.1f} s")
    assert taken.peak_bytes < MOST_BYTES
