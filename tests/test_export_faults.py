"""An export that is killed, refused by the disk or run twice at once: nothing half, nothing left."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.commands import refused
from support.faults import Faults, Killed, injected

from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.export import ExportOptions, Stages, export, main
from dbsam_deploy.files import publication
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.files.locks import LOCK_NAME, one_writer
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
        return ExportOptions("fp32", output=self.output, engine="none", data_images=1)

    def run(self, weights: str = "a", **options: bool) -> None:
        stages = self.stages(weights)
        export(replace(self.options, **options), Console(quiet=True), stages=stages)

    def command(self, weights: str) -> Callable[[list[str]], int]:
        return lambda arguments: main(arguments, stages=self.stages(weights))

    @property
    def arguments(self) -> list[str]:
        words = "--precision fp32 --engine none --data-images 1 --output"
        return [*words.split(), str(self.output)]

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
        name: make_artefact(folder / name, 64, seed=seed)
        for seed, name in enumerate(("a", "b"))
    }


@pytest.fixture
def toy(graphs, tmp_path) -> Toy:
    return Toy(tmp_path / "build", graphs)


def test_killed_at_any_call_a_first_export_begins_again(toy: Toy) -> None:
    with injected(Faults()) as faults:
        toy.run()
    toy.is_complete("a")
    assert {"stream write", "sendfile", "fsync", "mkdir", "os.open"} <= set(faults.calls)
    for at in range(1, len(faults.calls) + 1):
        shutil.rmtree(toy.output)
        with injected(Faults(at)), pytest.raises(Killed):
            toy.run()
        toy.is_intact("a", missing=True)
        toy.run()
        toy.is_complete("a")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_at_any_call_the_earlier_export_stays_or_the_new_one_is_there(
    toy: Toy, monkeypatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(publication, "exchange", lambda *names: False)
    toy.run("a")
    with injected(Faults()) as faults:
        toy.run("b")
    toy.is_complete("b")
    old, new = "b", "a"
    for at in range(1, len(faults.calls) + 1):
        with injected(Faults(at)), pytest.raises(Killed):
            toy.run(new)
        toy.is_intact(old, new, missing=not can_exchange)
        toy.run(new)
        toy.is_complete(new)
        old, new = new, old
