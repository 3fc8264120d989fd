"""Weights mapped from a file: the same masks, the same file for all, and what befalls a file."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from support.references import prompt_feed

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.contract import Geometry
from dbsam_deploy.sessions import mapped_weights, onnxruntime_session
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_session, "LARGE_BYTES", 0)


def feeds(artefact: Artefact) -> dict[str, dict[str, np.ndarray]]:
    size, rng = artefact.preprocessing.image_size, np.random.default_rng()
    found = prompt_feed(rng, box=True, points=2, size=Geometry(size))
    embeddings = rng.standard_normal((1, 256, size // 16, size // 16)).astype(np.float32)
    boxes = (rng.random((1, 5, 4)) * size).astype(np.float32)
    return {
        "encoder": {"image": rng.standard_normal((1, 3, size, size)).astype(np.float32)},
        "decoder": {"image_embeddings": embeddings, "boxes": boxes},
        "prompt_decoder": {name: value[:1] for name, value in found.items()},
    }


def answers(session: OnnxRuntimeSession, asked: dict[str, dict[str, np.ndarray]]) -> list[bytes]:
    found = [session.run(graph, feed) for graph, feed in asked.items()]
    return [array.tobytes() for outputs in found for array in outputs.values()]


def kept(cache: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_ino for path in cache.glob("*.mapped/graph.bin")}


def test_the_same_bits_from_one_file_for_all(tiny_artefact: Artefact, tmp_path: Path) -> None:
    asked, cache = feeds(tiny_artefact), tmp_path / "cache"
    expected = answers(OnnxRuntimeSession(tiny_artefact), asked)
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=cache), asked) == expected
    written = kept(cache)
    assert len(written) == len(asked)
    second = OnnxRuntimeSession(tiny_artefact, cache=cache)
    assert answers(second, asked) == expected
    assert kept(cache) == written
    assert len(list(cache.iterdir())) == len(asked)  # nothing else is left
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert all(f"{cache / name}/graph.bin" in maps for name in written)


def test_weights_of_another_graph_are_not_taken(tiny_artefact: Artefact, tmp_path: Path) -> None:
    OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    assert len(kept(tmp_path)) == 2  # the prompt decoder is opened later


@pytest.mark.parametrize("name", ["graph.bin", "graph.onnx"])
@pytest.mark.parametrize("damage", ["short", "changed", "gone"])
def test_damaged_files_are_made_again(
    tiny_artefact: Artefact, tmp_path: Path, name: str, damage: str
) -> None:
    asked = feeds(tiny_artefact)
    expected = answers(OnnxRuntimeSession(tiny_artefact, cache=tmp_path), asked)
    for path in tmp_path.glob(f"*.mapped/{name}"):
        content = bytearray(path.read_bytes())
        path.unlink()  # a running session has the old one mapped
        content[len(content) // 2] ^= 1
        if damage != "gone":
            path.write_bytes(content if damage == "changed" else content[:100])
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=tmp_path), asked) == expected
    assert len(kept(tmp_path)) == len(asked)


def test_where_nothing_can_be_kept_weights_are_held_and_it_is_said(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch, capsys
) -> None:
    asked = feeds(tiny_artefact)
    expected = answers(OnnxRuntimeSession(tiny_artefact), asked)
    tmp_path.chmod(0o777)
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=tmp_path), asked) == expected
    assert "held in this process's memory: mapped weights cannot be" in capsys.readouterr().err

    def full(*words, **where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=tmp_path), asked) == expected
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_small_graphs_are_held(tiny_artefact: Artefact, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime_session, "LARGE_BYTES", mapped_weights.LARGE_BYTES)
    OnnxRuntimeSession(tiny_artefact, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_longest_unused_makes_room(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(mapped_weights, "KEPT_BYTES", 1)
    asked = feeds(tiny_artefact)
    session = OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    assert len(kept(tmp_path)) == 1
    assert answers(session, asked) == answers(OnnxRuntimeSession(tiny_artefact), asked)


def test_what_a_killed_process_left_goes(tiny_artefact: Artefact, tmp_path: Path, monkeypatch):
    def killed(self, to):
        left.append(Path(shutil.copytree(self, tmp_path / f"left-{self.name}")))
        os.utime(left[-1], (time.time() - 7200,) * 2)
        raise OSError(errno.EIO, "killed")

    left: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    assert left
    assert set(tmp_path.iterdir()) == set(left)
    OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    assert not any(path.exists() for path in left)


def test_damaged_files_behind_a_link_are_not_taken(tiny_artefact: Artefact, tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    OnnxRuntimeSession(tiny_artefact, cache=cache)
    elsewhere.mkdir()
    for path in list(cache.iterdir()):
        moved = path.rename(elsewhere / path.name)
        path.symlink_to(moved)
        weights = bytearray((moved / "graph.bin").read_bytes())
        weights[::1000] = bytes(len(weights[::1000]))
        (moved / "graph.bin").write_bytes(weights)
    asked = feeds(tiny_artefact)
    expected = answers(OnnxRuntimeSession(tiny_artefact), asked)
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=cache), asked) == expected
    assert len(kept(cache)) == len(asked)
    assert not any(path.is_symlink() for path in cache.iterdir())


def test_damaged_files_that_stay_are_not_taken(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch, capsys
) -> None:
    OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    for path in tmp_path.glob("*.mapped/graph.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(mapped_weights, "discard", lambda path: False)
    asked = feeds(tiny_artefact)
    expected = answers(OnnxRuntimeSession(tiny_artefact), asked)
    assert answers(OnnxRuntimeSession(tiny_artefact, cache=tmp_path), asked) == expected
    assert "held in this process's memory: mapped weights cannot be" in capsys.readouterr().err


def test_the_last_of_a_disk_is_not_taken(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch, capsys
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    OnnxRuntimeSession(tiny_artefact, cache=tmp_path)
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
