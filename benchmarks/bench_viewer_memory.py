"""Three viewers with a CT of 512×512×800 each leave a server under 3.5 GB, but for its model."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.tiny_artefact import make_tiny_artefact
from timing.viewer import served, work_on_large_ct

MOST_BYTES = 3_500_000_000
DEPTH, VIEWERS = 800, 3


@pytest.mark.bound
def test_memory_of_three_large_cts(tmp_path: Path) -> None:
    artefact = make_tiny_artefact(tmp_path / "graphs")
    words = (str(artefact.folder), "--reach", "10")
    with served(*words) as server, ThreadPoolExecutor(VIEWERS) as pool:
        start = server.peak_bytes
        list(pool.map(lambda number: work_on_large_ct(server, number, DEPTH), range(VIEWERS)))
        print(f"peak {server.peak_bytes / 1e9:.2f} GB, {start / 1e9:.2f} GB at the start")
        assert server.peak_bytes < MOST_BYTES
