"""An export of tiny graphs that takes milliseconds, and what must hold of its folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dbsam_deploy import export as door
from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.points import POINTS, usual_record
from dbsam_deploy.export import ExportOptions, Stages, export, main
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.serving.repository import load_repository
from dbsam_deploy.verification import provenance
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
        model = torch.nn.Module()
        model.image_encoder = torch.nn.Identity()
        model.config = VARIANTS["lite_medsam"]  # no fused operator has to be in its graphs
        about = {**made.weights, "sha256": weights, POINTS: usual_record("x", trained=False)}

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

    def run(self, weights: str = "a", **options: Any) -> None:
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
def toy_graphs(make_artefact, tmp_path_factory) -> dict[str, Artefact]:
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: make_artefact(folder / name, 64, seed=seed) for seed, name in enumerate(("a", "b"))
    }


@pytest.fixture
def toy(toy_graphs, tmp_path, monkeypatch) -> Toy:
    for module in (door, provenance):  # slow
        monkeypatch.setattr(module, "installed_versions", lambda *packages: {"python": "3"})
    (tmp_path / "data").mkdir()
    image, labels = np.zeros((2, 64, 64), np.uint8)
    labels[8:40, 8:40] = 1
    np.savez(tmp_path / "data" / "2DBox_case.npz", imgs=image, gts=labels)
    return Toy(tmp_path / "build", toy_graphs, tmp_path / "data")
