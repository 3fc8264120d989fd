"""Graphs whose weights lie in a second file, as those above 2 GiB: written, checked, read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.manifests import reseal
from support.tiny_artefact import in_two_files

from dbsam_deploy.artefact import MANIFEST_NAME, Artefact, graph_file, load_artefact, take_graphs
from dbsam_deploy.core.errors import EngineError, ExportError, InputError
from dbsam_deploy.files import onnx_files
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.files.onnx_data import DATA_HASH, data_names, data_path
from dbsam_deploy.files.onnx_files import check_valid, read_content, save_onnx
from dbsam_deploy.files.work import WorkFolder
from dbsam_deploy.serving.repository import build_repository, load_repository
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.onnxruntime_tensorrt_session import OnnxRuntimeTensorrtSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession


@pytest.fixture
def large(tiny_artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    return in_two_files(tiny_artefact, tmp_path / "large", monkeypatch)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("form", ["proto", "ir"])
def test_a_graph_and_its_weights(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source, path = tiny_artefact.path("encoder"), tmp_path / "encoder.onnx"
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 2**20)
    save_onnx(onnx.load(source), path)
    assert not data_path(path).exists()
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 1000)
    save_onnx(onnx.load(source) if form == "proto" else ir.load(source), path, check_valid)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    assert path.stat().st_size < 10_000 < data_path(path).stat().st_size
    assert data_names(path.read_bytes()) == {"encoder.onnx.data"}
    notes = {note.key: note.value for note in onnx.load(path).metadata_props}
    assert notes == {DATA_HASH: sha256_of(data_path(path))}
    for name, array in weights(source).items():
        np.testing.assert_array_equal(weights(path)[name], array)


def test_a_file_is_replaced_by_one_with_its_weights_inside(
    large: Artefact,
) -> None:
    path = large.path("encoder")
    before = weights(path)
    save_onnx(ir.load(path), path, check_valid)
    assert not data_path(path).exists()
    np.testing.assert_equal(weights(path), before)


def test_a_refused_graph_leaves_both_files(
    large: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large.path("encoder")
    before = {file: sha256_of(file) for file in large.folder.iterdir()}

    def refuse(partial: Path) -> None:
        assert data_path(partial).is_file()
        raise ExportError("no")

    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match="no"):
        save_onnx(ir.load(path), path, refuse)
    assert {file: sha256_of(file) for file in large.folder.iterdir()} == before


def test_the_manifest_has_both_files(large: Artefact, tiny_artefact: Artefact) -> None:
    item = large.graphs["encoder"]
    assert item.data is not None
    assert [file.file for file in item.files] == ["encoder.onnx", "encoder.onnx.data"]
    assert item.data.sha256 == sha256_of(data_path(large.path("encoder")))
    inside = {graph: read_content(content) for graph, content in take_graphs(tiny_artefact)}
    for graph, content in take_graphs(large):
        assert content.location == f"{graph}.onnx.data"
        for ours, theirs in zip(
            read_content(content).graph.initializer, inside[graph].graph.initializer, strict=True
        ):
            found, expected = map(onnx.numpy_helper.to_array, (ours, theirs))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "its hash differs"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "was changed after"),
        (lambda path: path.unlink(), "which is not there"),
    ],
)
def test_changed_weights_are_refused(large: Artefact, damage, message: str) -> None:
    damage(data_path(large.path("encoder")))
    with pytest.raises(InputError, match=message):
        load_artefact(large.folder)


def test_weights_that_the_manifest_does_not_have_are_refused(large: Artefact) -> None:
    manifest = large.folder / MANIFEST_NAME
    graphs = {name: dataclasses.asdict(item) for name, item in large.graphs.items()}
    alone = {**graphs, "encoder": {**graphs["encoder"], "data": None}}
    reseal(manifest, graphs=alone)
    with pytest.raises(InputError, match=r"does not list 'encoder\.onnx\.data'"):
        load_artefact(large.folder)
    data = data_path(large.path("encoder"))
    data.rename(data.with_name("other.data"))
    other = {**graphs["encoder"]["data"], "file": "other.data"}
    reseal(manifest, graphs={**graphs, "encoder": {**graphs["encoder"], "data": other}})
    with pytest.raises(InputError, match="weights in another file"):
        load_artefact(large.folder)


@pytest.mark.parametrize("make", [OnnxRuntimeSession, OpenvinoSession])
def test_sessions_compute_the_same(
    large: Artefact, tiny_artefact: Artefact, tmp_path: Path, make, monkeypatch
) -> None:
    if make is OpenvinoSession:
        pytest.importorskip("openvino")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    size = large.preprocessing.image_size
    feed = {"image": np.random.default_rng(0).random((1, 3, size, size), np.float32)}
    found, expected = (make(one).run("encoder", feed) for one in (large, tiny_artefact))
    np.testing.assert_array_equal(found["image_embeddings"], expected["image_embeddings"])
    left = [path.suffix for path in (tmp_path / "caches").rglob("*") if path.is_file()]
    assert left == ([] if make is OnnxRuntimeSession else [".blob"] * 2)


def test_tensorrt_within_onnx_runtime_is_refused(large: Artefact) -> None:
    session = object.__new__(OnnxRuntimeTensorrtSession)
    session._artefact = large
    with pytest.raises(EngineError, match="--precision fp16"):
        session._open("encoder")


def test_a_repository_serves_both_files(large: Artefact, tmp_path: Path) -> None:
    repository = build_repository(large, tmp_path / "served")
    assert load_repository(tmp_path / "served") == repository
    folder = tmp_path / "served" / "dbsam_encoder" / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.onnx.data", "model.onnx"]
    assert repository.known_answers
    np.testing.assert_equal(weights(folder / "model.onnx"), weights(large.path("encoder")))


def test_a_killed_export_goes_on_with_a_graph_that_has_both_files(
    large: Artefact, tmp_path: Path
) -> None:
    work = WorkFolder(tmp_path / "work")
    work.open(pytest.fail)
    for path in (large.path("encoder"), data_path(large.path("encoder"))):
        path.rename(work.scratch / path.name)
    done = work.finish("encoder.onnx", {})
    assert work.open(pytest.fail) == done
    assert graph_file(work.files / "encoder.onnx", work.files).data is not None
    data_path(work.files / "encoder.onnx").unlink()
    assert work.open(pytest.fail) == {}
    assert list(work.files.iterdir()) == []
