"""The copy that a server opens: whole, checked, its own."""

from __future__ import annotations

import errno
import shutil

import pytest
from support.faults import Faults, injected

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.serving.repository import Repository, file_hashes, load_repository
from dbsam_deploy.serving.snapshot import take_snapshot


@pytest.fixture
def repository(tiny_repository, tmp_path) -> Repository:
    """A repository of this test's own."""
    shutil.copytree(tiny_repository.folder, tmp_path / "repository")
    return load_repository(tmp_path / "repository")


def test_it_holds_the_listed_files_and_a_tuned_configuration(repository, tmp_path):
    root, copy = repository.folder, tmp_path / "copy"
    tuned = root / "dbsam_encoder/config.pbtxt"
    tuned.write_text(tuned.read_text() + "# tuned\n")
    (root / "dbsam_preprocess/1/__pycache__").mkdir()
    (root / "dbsam_preprocess/1/__pycache__/model.cpython-311.pyc").touch()
    taken = take_snapshot(root, copy)
    assert (taken.folder, taken.files) == (copy, repository.files)
    name = tuned.relative_to(root).as_posix()
    assert file_hashes(copy) == {**repository.files, name: sha256_of(tuned)}
    assert (copy / "dbsam/1").is_dir()
    assert copy.stat().st_mode & 0o777 == 0o700
    (root / "dbsam_encoder/1/model.onnx").write_bytes(b"another")
    assert (copy / "dbsam_encoder/1/model.onnx").read_bytes() != b"another"


@pytest.mark.parametrize("name", ["dbsam_encoder/1/model.onnx", "dbsam_preprocess/1/model.py"])
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
