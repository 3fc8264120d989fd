"""TensorRT's kernel timings: kept for the next build, found again whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engines import put_engines

from dbsam_deploy.engines.kinds import TENSORRT
from dbsam_deploy.engines.manifest import EngineRecord, read_records
from dbsam_deploy.engines.timings import keep_timings, put_timings
from dbsam_deploy.files.private import cache_folder


@pytest.fixture
def record(make_artefact, tmp_path, monkeypatch) -> EngineRecord:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artefact = make_artefact(tmp_path / "a", 64)
    return read_records(put_engines(artefact, TENSORRT), TENSORRT)["encoder"]


def found(record: EngineRecord, path: Path) -> bytes | None:
    path.unlink(missing_ok=True)
    put_timings(record, path, pytest.fail)
    return path.read_bytes() if path.is_file() else None


def test_the_newest_are_found_again_and_damaged_ones_are_not(record, tmp_path):
    path = tmp_path / "kernels.timing"
    assert found(record, path) is None
    for content in (b"first", b"second", b"second"):
        path.write_bytes(content)
        keep_timings(record, path, pytest.fail)
        assert found(record, path) == content
    (kept,) = cache_folder("tensorrt-timings").iterdir()
    kept.write_bytes(b"damaged")
    assert found(record, path) is None


def test_where_they_cannot_be_kept_it_is_said(record, tmp_path):
    (tmp_path / "cache").write_bytes(b"in the way")
    said: list[str] = []
    put_timings(record, tmp_path / "kernels.timing", said.append)
    assert not (tmp_path / "kernels.timing").exists()
    (tmp_path / "kernels.timing").write_bytes(b"measured")
    keep_timings(record, tmp_path / "kernels.timing", said.append)
    assert [line.partition(":")[0] for line in said] == ["kernel timings are not kept"] * 2
