"""The copy that a server opens: whole, checked, its own."""

from __future__ import annotations

import errno
import shutil
import subprocess

import numpy as np
import pytest
from support.faults import Faults, injected

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.repository import (
    Repository,
    build_repository,
    file_hashes,
    load_repository,
)
from dbsam_deploy.serving.server import Ports, TritonServer
from dbsam_deploy.serving.snapshot import take_snapshot
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession


@pytest.fixture
def repository(tiny_repository, tmp_path) -> Repository:
    """A repository of this test's own."""
    shutil.copytree(tiny_repository.folder, tmp_path / "repository")
    return load_repository(tmp_path / "repository")


def test_it_holds_the_listed_files_and_a_tuned_configuration(repository, tmp_path):
    root, copy = repository.folder, tmp_path / "copy"
    tuned = root / "dbsam_encoder/config.pbtxt"
    tuned.write_text(tuned.read_text() + "# tuned\n")
    (root / "dbsam_interactive/1/__pycache__").mkdir()
    (root / "dbsam_interactive/1/__pycache__/model.cpython-311.pyc").touch()
    taken = take_snapshot(root, copy)
    assert (taken.folder, taken.files) == (copy, repository.files)
    name = tuned.relative_to(root).as_posix()
    assert file_hashes(copy) == {**repository.files, name: sha256_of(tuned)}
    assert (copy / "dbsam/1").is_dir()
    assert copy.stat().st_mode & 0o777 == 0o700
    (root / "dbsam_encoder/1/model.onnx").write_bytes(b"another")
    assert (copy / "dbsam_encoder/1/model.onnx").read_bytes() != b"another"


@pytest.mark.parametrize("name", ["dbsam_encoder/1/model.onnx", "dbsam_interactive/1/model.py"])
def test_a_changed_file_is_refused(repository, tmp_path, name):
    path = repository.folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=rf"{name} was changed after repository\.json"):
        take_snapshot(repository.folder, tmp_path / "copy")


def test_a_file_that_changes_while_it_is_copied_is_refused(repository, tmp_path, monkeypatch):
    """What is hashed is the copy, so there is no moment between."""
    copy = shutil.copyfile

    def changing(source, target):
        copy(source, target)
        if target.name == "model.onnx":
            target.write_bytes(b"what stood there for a moment")

    monkeypatch.setattr(shutil, "copyfile", changing)
    with pytest.raises(InputError, match=r"model\.onnx was changed"):
        take_snapshot(repository.folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["dbsam_encoder/2/model.onnx", "more/config.pbtxt", "x"])
def test_what_is_not_listed_is_refused(repository, tmp_path, name):
    path = repository.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(InputError, match="does not list"):
        take_snapshot(repository.folder, tmp_path / "copy")


def test_a_full_disk_is_one_line(repository, tmp_path):
    with (
        injected(Faults(4, errno.ENOSPC, lasting=True)),
        pytest.raises(InputError, match=r"copy cannot be written: No space left.*free some"),
    ):
        take_snapshot(repository.folder, tmp_path / "copy")


@pytest.mark.triton
def test_what_is_served_is_what_was_checked_whatever_becomes_of_the_repository(
    tiny_artefact, make_artefact, server_environment, tmp_path, monkeypatch, rng
):
    """It is replaced by another export's, and a version is added, when the server's start began."""
    root = build_repository(tiny_artefact, tmp_path / "models ü").folder
    other = make_artefact(tmp_path / "b", seed=1)
    start_process = subprocess.Popen

    def replace_and_start(command, **options):
        build_repository(other, root)
        shutil.copytree(root / "dbsam_encoder/1", root / "dbsam_encoder/2")
        (root / "dbsam_interactive/1/model.py").write_text("raise SystemExit('mine')")
        return start_process(command, **options)

    monkeypatch.setattr(subprocess, "Popen", replace_and_start)
    server = TritonServer(root, server_environment, log=tmp_path / "log", ports=Ports(0, 0, 0))
    image, box = rng.integers(0, 256, (40, 33, 3), np.uint8), np.array([[2, 3, 30, 25]], np.float32)
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    predictor.set_image(image)
    with server, DbsamClient(server.grpc_url) as client:
        masks = client.segment(image, box).masks
    np.testing.assert_array_equal(masks, predictor.predict_boxes(box).masks)
    assert not list(root.rglob("__pycache__"))
    with pytest.raises(InputError, match=r"does not list 'dbsam_encoder/2'"):
        server.start()
    assert server._runtime is None
