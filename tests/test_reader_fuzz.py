"""Damaged files of every kind in a process of its own: no traceback, no hang, bounded memory.

`DBSAM_FUZZ_SECONDS=540 pytest --slow tests/test_reader_fuzz.py` tries for nine minutes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.reader_corpus import write_corpus
from support.reader_fuzz import MEMORY_BYTES, Fuzz, damaged, read

from dbsam_deploy.machine.child_process import run_python

SECONDS = float(os.environ.get("DBSAM_FUZZ_SECONDS", "20"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(path)
    return path


def fuzzed(picture: Path, reader: Any, times: int = 30) -> Fuzz:
    fuzz = Fuzz([picture], picture.parents[1] / "current", 0, read)
    fuzz.reader = reader
    for _ in range(times):
        fuzz.step()
    return fuzz


def test_the_readers_withstand_some_damage(picture: Path) -> None:
    tally = fuzzed(picture, read).tally
    assert (tally.tried, tally.read + tally.refused) == (30, 30)
    assert (tally.wrong, tally.tracebacks, tally.hangs) == ([], [], [])


def test_a_fault_of_a_reader_is_found_and_its_file_kept(picture: Path) -> None:
    def breaks(path: Path) -> object:
        raise KeyError(path.name)

    tally = fuzzed(picture, breaks).tally
    assert len(tally.tracebacks) == 30
    assert "KeyError: 'a.png'" in tally.tracebacks[0]
    assert len(list((picture.parents[1] / "found").iterdir())) == 30
    good = read(picture)
    other = type(good)(**{**vars(good), "pixels": 255 - good.pixels})
    tally = fuzzed(picture, lambda path: other).tally
    assert any("other values than the undamaged file" in text for text in tally.wrong)


def test_every_kind_of_damage(rng: np.random.Generator, tmp_path: Path) -> None:
    """Also within what is packed, with a right checksum."""
    for path in write_corpus(tmp_path):
        if path.is_file() and not path.name.startswith("case_"):
            packed = path.name.endswith((".gz", ".npz", ".png", "a.pth", "deflated.dcm"))
            expected = {"cut", "bytes", *["packed"] * packed}
            kinds: set[str] = set()
            for draw in range(400):  # one in eight is a cut: none in 400 has a chance of 1e-22
                if draw >= 60 and kinds >= expected:
                    break
                kinds.add(damaged(path.read_bytes(), path.name, rng)[1])
            assert kinds == expected, path.name


@pytest.mark.slow
def test_no_traceback_no_hang_and_bounded_memory(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("limits the memory of a process as Linux does")
    command = ["-m", "support.reader_fuzz", str(tmp_path), str(SECONDS), str(os.getpid())]
    ended = run_python(command, variables={"PYTHONPATH": str(Path(__file__).resolve().parent)})
    assert (ended.status, ended.log) == (0, "")
    tally = json.loads(ended.output)
    print(tally)  # shown by -s and where it fails
    assert tally["tried"] > 10 * SECONDS
    assert tally["read"] > tally["tried"] / 10
    assert (tally["wrong"], tally["tracebacks"], tally["hangs"]) == ([], [], [])
    assert tally["peak_rss_mib"] < MEMORY_BYTES >> 21
