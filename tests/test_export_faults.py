"""An export that is killed, refused by the disk or run twice at once: nothing half or left."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.faults import Faults, Killed, injected

from dbsam_deploy import export as door
from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.export import ExportOptions, Stages, export, main
from dbsam_deploy.files import publication
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.files.locks import LOCK_NAME
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.serving.repository import load_repository
from dbsam_deploy.verification.parity import Figures

FIGURES = Figures(
    **{
        name: {"int": 1, "str": "x"}.get(str(kind), 1.0)
        for name, kind in Figures.__annotations__.items()
    }
)
"""Every figure as good as it can be."""


@dataclass
class Toy:
    """An export of tiny graphs with chosen weights into one folder."""

    output: Path
    graphs: dict[str, Artefact]
    data: Path
    export_graph: Callable[..., object] | None = None

    def stages(self, weights: str) -> Stages:
        made = self.graphs[weights]
        model = torch.nn.Identity()
        model.config = VARIANTS["lite_medsam"]  # no fused operator has to be in its graphs
        about = {**made.weights, "sha256": weights}

        def take(model: object, name: str, recipe: object, folder: Path) -> None:
            (folder / f"{name}.tmp").write_bytes(b"scratch")
            shutil.copyfile(made.path(name), folder / f"{name}.onnx")

        return Stages(
            load_model=lambda **options: LoadedModel(model, made.preprocessing, about),
            export_graph=self.export_graph or take,
            compare=lambda *arguments, **options: FIGURES,
        )

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(
            "fp32", output=self.output, engine="none", data=self.data, data_images=1
        )

    def run(self, weights: str = "a", **options: bool) -> None:
        stages = self.stages(weights)
        export(replace(self.options, **options), Console(quiet=True), stages=stages)

    def refused(self, weights: str, capsys: pytest.CaptureFixture[str]) -> str:
        """What the command line says: after what it told before, one line, and status 2."""
        words = "--precision fp32 --engine none --data-images 1 --data"
        arguments = [*words.split(), str(self.data), "--output", str(self.output)]
        capsys.readouterr()
        assert run(lambda words: main(words, stages=self.stages(weights)), arguments) == 2
        told, _, error = capsys.readouterr().err.partition("error: ")
        assert told.splitlines()[0] == "weights: test graphs"
        assert error.count("\n") == 1
        return error

    def is_intact(self, *weights: str, missing: bool = False) -> None:
        """What is published and what is served is whole, and one of these."""
        hashes = [self.graphs[name].graphs for name in weights]
        place, served = self.output / "fp32", self.output / "model_repository_fp32"
        if not missing or place.exists():
            assert load_artefact(place).graphs in hashes
        if not missing or served.exists():
            encoders = [graphs["encoder"].sha256 for graphs in hashes]
            assert sha256_of(load_repository(served).folder / "dbsam_encoder/1/model.onnx") in (
                encoders
            )

    def is_complete(self, weights: str) -> None:
        """The export's graphs are these, what is served is the same, and nothing else is there."""
        self.is_intact(weights)
        assert sorted(os.listdir(self.output)) == ["fp32", "model_repository_fp32"]
        names = {f"{name}.onnx" for name in self.graphs[weights].graphs}
        assert set(os.listdir(self.output / "fp32")) == {"manifest.json", *names}
        repository = load_repository(self.output / "model_repository_fp32")
        found = {p.relative_to(repository.folder) for p in repository.folder.rglob("*.*")}
        files = {path.as_posix() for path in found if (repository.folder / path).is_file()}
        assert files == {*repository.files, "repository.json"}


@pytest.fixture(scope="module")
def graphs(make_artefact, tmp_path_factory) -> dict[str, Artefact]:
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: make_artefact(folder / name, 64, seed=seed) for seed, name in enumerate(("a", "b"))
    }


@pytest.fixture
def toy(graphs, tmp_path, monkeypatch) -> Toy:
    monkeypatch.setattr(door, "installed_versions", lambda *packages: {"python": "3"})  # slow
    (tmp_path / "data").mkdir()
    image, labels = np.zeros((2, 64, 64), np.uint8)
    labels[8:40, 8:40] = 1
    np.savez(tmp_path / "data" / "2DBox_case.npz", imgs=image, gts=labels)
    return Toy(tmp_path / "build", graphs, tmp_path / "data")


def killed(toy: Toy, at: int, weights: str) -> None:
    with injected(Faults(at)), pytest.raises(Killed):
        toy.run(weights)


def rerun(toy: Toy, weights: str) -> None:
    with injected(Faults()):  # which only saves the time that a disk takes
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_that_is_full(toy: Toy, small_disk: Path, capsys) -> None:
    toy.output = small_disk / "build"
    toy.run("a")
    (small_disk / "ballast").write_bytes(b"")
    free = os.statvfs(small_disk)
    room = free.f_bavail * free.f_frsize
    refusals = []
    for part in range(8):
        (small_disk / "ballast").write_bytes(b"x" * (room - part * 120_000))
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


def said_again(toy: Toy, weights: str = "a") -> str:
    console = Console(record=True, width=500, file=io.StringIO())
    export(toy.options, console, stages=toy.stages(weights))
    return console.export_text()


def test_only_packages_that_take_part_make_it_again_and_it_says_which(
    toy: Toy, monkeypatch
) -> None:
    versions = {"python": "3", "torch": "2.13.0", "onnxruntime": "1.32.0"}

    def installed(packages: tuple[str, ...] = ("openvino", "torch")) -> dict[str, str]:
        return {name: version for name, version in versions.items() if name in packages}

    monkeypatch.setattr(door, "installed_versions", installed)
    toy.run("a")
    versions.update({"openvino": "2026.4.1", "tensorrt": "11", "nvidia-modelopt": "1"})
    assert "is up to date" in said_again(toy)
    versions["torch"] = "2.14.0"
    assert "exported again: changed since: torch (2.13.0, now 2.14.0)\n" in said_again(toy)
    versions["onnxruntime"] = "1.33.0"
    assert "changed since: onnxruntime (1.32.0, now 1.33.0)\n" in said_again(toy)
    assert "changed since: weights (a, now b)\n" in said_again(toy, "b")
    (toy.output / "fp32" / "decoder.onnx").write_bytes(b"")
    assert "exported again: " in (text := said_again(toy, "b"))
    assert "decoder.onnx was changed after manifest.json was written" in text


def test_another_precision_does_not_change_what_is_served(toy: Toy) -> None:
    toy.run("a")
    served = toy.output / "model_repository_fp32"
    before = load_repository(served), served.stat().st_ino
    export(replace(toy.options, precision="fp16"), Console(quiet=True), stages=toy.stages("b"))
    assert (load_repository(served), served.stat().st_ino) == before
    assert load_repository(toy.output / "model_repository_fp16").precision == "fp16"
