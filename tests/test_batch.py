"""The command: a manifest in, a folder for each study and one page out, through any end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.faulty_studies import study

from dbsam_deploy import batch
from dbsam_deploy.cli import run
from dbsam_deploy.files.locks import one_writer
from dbsam_deploy.sessions.backends import ModelOptions

HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def studies(tmp_path):
    """Pictures `s0` to `s3`, a file that is none, and a list of them all and a missing one."""
    rows = ["path;name;object;box;slice"]
    for number in range(4):
        study(tmp_path, f"s{number}", number=number)
        name = "batch" if number == 3 else ""  # as the batch's own files begin
        rows.append(f"studies/s{number}.npz;{name};{HTML if number == 0 else 'kidney'};4 4 30 28;0")
    (tmp_path / "studies" / "bad.npz").write_bytes(b"no archive")
    rows += ["studies/bad.npz;;;4 4 30 28;0", "studies/gone.npz;;;4 4 30 28;0"]
    path = tmp_path / "studies.csv"
    path.write_text("\ufeff" + "\n".join(rows))
    return path


def words(studies, tiny_artefact, *more):
    output = studies.parent / "out"
    named = ["--artefact", tiny_artefact.folder, "--output", output, "--workers", 2, "--format=npz"]
    return [str(word) for word in (studies, *named, *more)]


def state(output: Path) -> dict[str, tuple[int, int]]:
    """Name of each result → its record's inode and time, which another writing would change."""
    found = [path.stat() for path in sorted(output.glob("*/study.json"))]
    names = [path.parent.name for path in sorted(output.glob("*/study.json"))]
    return {n: (s.st_ino, s.st_mtime_ns) for n, s in zip(names, found, strict=True)}


def test_good_and_bad_studies_and_the_same_again(studies, tiny_artefact, capsys):
    output = studies.parent / "out"
    assert run(batch.main, words(studies, tiny_artefact)) == 1
    out, err = capsys.readouterr()
    assert "studies: 6: 4 new, 0 there already, 2 failed, 0 not begun" in out
    assert re.search(r"^\[\d/6\] gone: failed: .*gone\.npz: no such file.*; \d+ s left$", err, re.M)
    first = state(output)
    assert list(first) == ["batch", "s0", "s1", "s2"]
    body = json.loads((output / "batch.json").read_text())
    found = {one["name"]: one for one in body["studies"]}
    assert {name: one["state"] for name, one in found.items()} == {
        **dict.fromkeys(first, "new"),
        **dict.fromkeys(("bad", "gone"), "failed"),
    }
    with np.load(output / "s1" / "s1_mask.npz") as saved:
        voxels = int((saved["segs"] == 1).sum())
    assert found["s1"]["result"]["objects"][0]["voxels"] == voxels > 0
    page = (output / "batch.html").read_text()
    assert HTML not in page
    assert "&lt;img src=x onerror" in page
    assert page.index("gone.npz") < page.index("kidney")  # failures first
    assert page.count("data:image/jpeg;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script", page)

    study(studies.parent, "gone", number=9)  # it has come
    assert "for review" not in out
    assert run(batch.main, words(studies, tiny_artefact, "--min-confidence", 1)) == 1
    out = capsys.readouterr().out
    assert "1 new, 4 there already, 1 failed" in out  # another threshold makes nothing anew
    assert "for review: 5 of 5 objects have a predicted IoU below 1, in 5 studies" in out
    ended = json.loads((output / "batch.json").read_text())["studies"]
    assert [one.get("for_review") for one in ended if one["result"]] == [[1]] * 5
    assert "in red: below 1.0, flagged for review" in (output / "batch.html").read_text()
    second = state(output)
    assert {name: second[name] for name in first} == first
    assert list(second) == ["batch", "gone", "s0", "s1", "s2"]


def test_two_at_once_on_one_folder_are_refused(studies, tiny_artefact, capsys):
    with one_writer(studies.parent / "out", name=".batch.lock"):
        assert run(batch.main, words(studies, tiny_artefact)) == 2
    assert "is being written by process" in capsys.readouterr().err


def test_a_killed_batch_leaves_no_process_and_goes_on(studies, tiny_artefact, capsys):
    rows = ["path,box,slice"]
    for number in range(30):
        study(studies.parent, f"k{number}", number=number)
        rows.append(f"studies/k{number}.npz,4 4 30 28,0")
    studies.write_text("\n".join(rows))
    output = studies.parent / "out"
    command = [sys.executable, "-m", "dbsam_deploy.batch", *words(studies, tiny_artefact)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(output.glob("*/study.json")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = state(output)
    assert 1 <= len(before) < 30
    assert run(batch.main, words(studies, tiny_artefact)) == 0
    counts = re.search(r"30: (\d+) new, (\d+) there already, 0 failed", capsys.readouterr().out)
    assert counts.groups() == (str(30 - len(before)), str(len(before)))
    after = state(output)
    assert len(after) == 30
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*after, "batch.html", "batch.json"]
    )


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in path.read_text().split()]
    return [one for one in found if "loky" in Path(f"/proc/{one}/cmdline").read_text()]


def test_a_folder_with_a_prompts_file_for_each(studies, tiny_artefact, capsys):
    prompts = studies.parent / "prompts"
    prompts.mkdir()
    body = {"objects": [{"name": "kidney", "prompts": [{"box": [4, 4, 30, 28], "slice": 0}]}]}
    (prompts / "s0.json").write_text(json.dumps(body))
    folder = studies.parent / "studies"
    (folder / "bad.npz").unlink()
    (folder / "s3.npz").rename(folder / "notes.txt")
    line = [str(folder), *words(studies, tiny_artefact, "--prompts", prompts)[1:]]
    assert run(batch.main, line) == 1
    out, err = capsys.readouterr()
    assert "3: 1 new, 0 there already, 2 failed" in out
    assert "NOTE: passed over, as no image: notes.txt" in err
    assert "s1.json: no such file" in err
    (prompts / "all.json").write_text(json.dumps(body))
    line[line.index(str(prompts))] = str(prompts / "all.json")
    assert run(batch.main, line) == 0
    # The same prompts, once of its own file and once of the common one
    assert "3: 3 new" in capsys.readouterr().out


MISTAKES = [
    (("--study-timeout", "0"), "--study-timeout 0: expected seconds"),
    (("--retries", "-1"), "--retries -1: expected 0 to 100"),
    (("--workers", "0"), "expected 1 to 4096"),
    (("--ray-gpus", "1"), "--ray-gpus 1: expected 0 to 64, with --ray"),
    (("--prompts", "none.json"), "none.json: no such file"),
    (("--artefact", "none"), "none"),
]


@pytest.mark.parametrize(("more", "expected"), MISTAKES, ids=lambda case: str(case)[:20])
def test_mistakes(more, expected, studies, tiny_artefact, capsys):
    assert run(batch.main, words(studies, tiny_artefact, *more)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert expected in err
    assert not (studies.parent / "out").exists()


def test_auto_is_one_runtime_for_all_studies(studies, tiny_artefact, monkeypatch):
    """Else each worker would try them, while the others compute."""
    chosen = ModelOptions("openvino", runtime_precision="bfloat16-decoders", threads=1)
    monkeypatch.setattr(batch, "chosen_runtime", lambda options: chosen)
    args = batch.build_parser().parse_args(words(studies, tiny_artefact, "--backend", "auto"))
    opened = batch._orders(args, ()).open_model.args[0]
    assert (opened.backend, opened.runtime_precision) == ("openvino", "bfloat16-decoders")
    assert opened.engine_cache is None


def test_several_workers_share_the_weights_of_a_large_graph(studies, tiny_artefact):
    def shared(*more: str) -> bool | None:
        args = batch.build_parser().parse_args(words(studies, tiny_artefact, *more))
        return batch._orders(args, ()).open_model.args[0].shared_weights

    assert shared("--workers", "2")
    assert shared("--ray", "somewhere")
    assert not shared("--workers", "1")
    assert not shared("--workers", "2", "--backend", "openvino")


def test_results_among_the_studies_are_refused(studies, tiny_artefact, capsys):
    line = words(studies, tiny_artefact)
    line[0] = str(studies.parent)
    assert run(batch.main, line) == 2
    assert "lies in the folder of the studies" in capsys.readouterr().err


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(studies, tiny_artefact):
    command = [sys.executable, "-m", "dbsam_deploy.batch", *words(studies, tiny_artefact)]
    rows = [f"studies/c{number}.npz,4 4 30 28,0" for number in range(200)]
    for number in range(200):
        study(studies.parent, f"c{number}", number=number % 7)
    studies.write_text("\n".join(["path,box,slice", *rows]))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job, as this test may run in, ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    output = studies.parent / "out"
    while len(list(output.glob("*/study.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"studies: 200: \d+ new, 0 there already, 0 failed, [1-9]\d* not begun", out)
    told = len(json.loads((output / "batch.json").read_text())["studies"])
    assert 0 < told <= len(state(output)) <= told + 2  # two workers may have ended unheard
    leftover = {path.name for path in output.iterdir()} - set(state(output))
    assert leftover == {"batch.html", "batch.json"}
