"""What is opened at all: regular files, texts of a bounded length."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import CheckpointError, InputError
from dbsam_deploy.datasets.finding import read_split
from dbsam_deploy.files.regular import MAX_TEXT_BYTES, regular_size, small_text
from dbsam_deploy.images.npz_files import open_npy
from dbsam_deploy.images.volumes import read_image
from dbsam_deploy.model.checkpoint import read_checkpoint, read_training_state
from dbsam_deploy.recipe import read_recipe
from dbsam_deploy.training.recipe import read_training_recipe

READERS: dict[str, Callable[[Path], object]] = {
    "a.png": read_image,
    "a.npz": read_image,
    "a.nii.gz": read_image,
    "a.dcm": read_image,
    "IM0001": read_image,
    "a.npy": open_npy,
    "a.pth": read_checkpoint,
    "a.safetensors": read_checkpoint,
    "state.pt": read_training_state,
    "split.json": lambda path: read_split(path, "train"),
    "fp16.toml": read_recipe,
    "tiny.toml": read_training_recipe,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name has at most 108 bytes
    path = Path(name)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises((InputError, CheckpointError), match=kind if kind != "folder" else name):
        READERS[name](path)


def test_size_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "link").symlink_to("a")
    assert regular_size(tmp_path / "link") == 3
    with pytest.raises(CheckpointError, match="no such file"):
        regular_size(tmp_path / "none", CheckpointError)


def test_texts_have_a_longest(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("ü = 1")
    assert small_text(path) == "ü = 1"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a readable text"):
        small_text(path)
    with path.open("wb") as stream:
        stream.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(InputError, match="at most"):
        small_text(path)


@pytest.mark.parametrize("name", ["split.json", "split.toml", "fp16.toml", "tiny.toml"])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"a = " + b"[" * 100_000])
def test_a_damaged_text_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    read = READERS.get(name, READERS["split.json"])
    with pytest.raises(InputError, match=name) as error:
        read(tmp_path / name)
    assert len(str(error.value)) < 500
