"""An export that is killed, refused by the disk or run twice at once: nothing half or left."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.faults import Faults, Killed, injected, no_waiting
from support.small_disk import leave
from support.toy_exports import Toy

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.export import export
from dbsam_deploy.files import publication
from dbsam_deploy.files.locks import LOCK_NAME
from dbsam_deploy.serving.repository import load_repository


def killed(toy: Toy, at: int, weights: str) -> None:
    with injected(Faults(at)), pytest.raises(Killed):
        toy.run(weights)


def rerun(toy: Toy, weights: str) -> None:
    with no_waiting():
        toy.run(weights)
    toy.is_complete(weights)


def test_a_first_export_that_is_killed_anywhere_is_made_by_the_next_run(toy: Toy) -> None:
    with injected(Faults()) as faults:
        toy.run()
    toy.is_complete("a")
    assert {"stream write", "sendfile", "fsync", "mkdir", "os.open"} <= set(faults.calls)
    for at in faults.points("replace_folder") + faults.points("_export_stage"):
        shutil.rmtree(toy.output)
        killed(toy, at, "a")
        toy.is_intact("a", missing=True)
        rerun(toy, "a")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_export_that_is_killed_anywhere_leaves_the_earlier_one_or_the_new_one(
    toy: Toy, monkeypatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(publication, "exchange", lambda *names: False)
    toy.run("a")
    with injected(Faults()) as faults:
        toy.run("b")
    assert faults.calls.count("exchange") == 2
    old, new = "b", "a"
    for at in faults.points("" if can_exchange else "replace_folder"):
        killed(toy, at, new)
        toy.is_intact(old, new, missing=not can_exchange)
        rerun(toy, new)
        old, new = new, old


@pytest.mark.parametrize(
    ("number", "lasting"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EIO, False)]
)
def test_what_a_disk_refuses_is_one_line_and_the_earlier_export_stays(
    toy: Toy, capsys, number: int, lasting: bool
) -> None:
    toy.run("a")
    with injected(Faults()) as faults:
        toy.run("b")
    old, new = "b", "a"
    refusals: list[str] = []
    for at in faults.points()[:: 6 if lasting else 9]:
        with injected(Faults(at, number, lasting=lasting)):
            try:
                toy.run(new)
            except InputError as error:
                refusals.append(error.message)
        toy.is_intact(old, new)
        rerun(toy, new)
        old, new = new, old
    assert len(refusals) > 5
    says = re.compile(rf" cannot be written: {os.strerror(number)}.*; .*write elsewhere")
    assert all(map(says.search, refusals)), refusals
    with injected(Faults(1, errno.ENOSPC, lasting=True)):
        error = toy.refused(new, capsys)
    assert "cannot be written: No space left on device" in error


@pytest.mark.parametrize("place", ["", "fp32", ".work", "model_repository_fp32", LOCK_NAME])
def test_a_file_in_the_way_is_one_line_before_any_work(toy: Toy, capsys, place: str) -> None:
    toy.export_graph = lambda *arguments: pytest.fail("exported although it cannot be published")
    path = toy.output / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if place == LOCK_NAME:
        path.mkdir()
    else:
        path.write_bytes(b"mine")
    assert str(path) in toy.refused("a", capsys)
    assert path.is_dir() or path.read_bytes() == b"mine"
    assert sorted(os.listdir(toy.output)) == [place] if place else True


def test_a_real_disk_that_is_full(toy: Toy, small_disk: Path, capsys) -> None:
    toy.output = small_disk / "build"
    toy.run("a")
    refusals = []
    for part in range(8):
        leave(small_disk, part * 120_000)
        try:
            toy.run("b")
            break
        except InputError:
            refusals.append(toy.refused("b", capsys))
        toy.is_intact("a", "b")
        (small_disk / "ballast").write_bytes(b"")
    assert len(refusals) > 2
    assert all("No space left on device" in error for error in refusals)
    (small_disk / "ballast").unlink()
    toy.run("b")
    toy.is_complete("b")


def waiting_for(toy: Toy, weights: str) -> tuple[threading.Thread, Console]:
    """An export in another thread that waits for the one which has the folder."""
    console = Console(record=True, width=200, file=io.StringIO())
    thread = threading.Thread(
        target=lambda: export(toy.options, console, stages=toy.stages(weights))
    )
    thread.start()
    return thread, console


@pytest.mark.parametrize("second", ["a", "b"])
def test_of_two_exports_at_once_the_second_waits(toy: Toy, monkeypatch, second: str) -> None:
    """The second begins while the first exports its last graph."""
    exported, others = [], []
    stages = toy.stages("a")

    def begin_another(model: object, name: str, recipe: object, folder: Path) -> None:
        exported.append(name)
        stages.export_graph(model, name, recipe, folder)
        if len(exported) == 3:
            others.append(waiting_for(toy, second))
            while not (told := others[0][1].export_text(clear=False)).count("waiting for"):
                assert others[0][0].is_alive(), told
            with pytest.raises(InputError, match=f"process {os.getpid()} on .*; wait until"):
                toy.run(second, wait=False)

    export(toy.options, Console(quiet=True), stages=replace(stages, export_graph=begin_another))
    ((thread, console),) = others
    thread.join(30)
    toy.is_complete(second)
    text = console.export_text()
    assert f"waiting for process {os.getpid()} on " in text
    assert ("nothing was exported again" in text) == (second == "a")
    assert ("is exported again: changed since: weights" in text) == (second == "b")


def test_no_run_takes_another_ones_work(toy: Toy) -> None:
    """A killed export in another precision keeps what it has; one in this precision goes on."""
    other = toy.output / ".work" / "fp32-odd-0123456789abcdef"
    stale = toy.output / ".work" / "fp32-0123456789abcdef"
    for folder in (other, stale):
        folder.mkdir(parents=True)
        (folder / "done.json").write_text("{}")
    toy.run("a")
    assert os.listdir(toy.output / ".work") == [other.name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"encoder.onnx": 1}', "\0", "[" * 100_000])
def test_a_damaged_record_of_finished_graphs_is_ignored(toy: Toy, text: str) -> None:
    exported: list[str] = []
    stages = toy.stages("a")

    def stop(model: object, name: str, recipe: object, folder: Path) -> None:
        exported.append(name)
        if name == "prompt_decoder" and exported.count(name) == 1:
            raise KeyboardInterrupt
        stages.export_graph(model, name, recipe, folder)

    stages_ = replace(stages, export_graph=stop)
    with pytest.raises(KeyboardInterrupt):
        export(toy.options, Console(quiet=True), stages=stages_)
    (record,) = toy.output.glob(".work/*/done.json")
    record.write_text(text)
    console = Console(record=True, width=300, file=io.StringIO())
    export(toy.options, console, stages=stages_)
    assert exported[3:] == ["encoder", "decoder", "prompt_decoder"]
    assert ("done.json is damaged" in console.export_text()) == (text != '{"encoder.onnx": 1}')
    toy.is_complete("a")


def test_another_precision_does_not_change_what_is_served(toy: Toy) -> None:
    toy.run("a")
    served = toy.output / "model_repository_fp32"
    before = load_repository(served), served.stat().st_ino
    export(replace(toy.options, precision="fp16"), Console(quiet=True), stages=toy.stages("b"))
    assert (load_repository(served), served.stat().st_ino) == before
    assert load_repository(toy.output / "model_repository_fp16").precision == "fp16"
