"""Paths as people write them, in Python and on command lines."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy import predict
from dbsam_deploy.cli import Parser, run
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files.user_paths import user_path
from dbsam_deploy.images.volumes import read_image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_the_home_folder(home: Path) -> None:
    assert user_path("~/a.png") == home / "a.png"
    assert user_path(Path("~")) == home
    assert user_path("a~b/~") == Path("a~b/~")
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize("value", [3, None, b"a.png", ["a.png"]])
def test_what_is_no_path(value: object) -> None:
    with pytest.raises(InputError, match=r"the file is .*: expected text"):
        user_path(value, "the file")


def test_images_are_read_below_the_home_folder(home: Path) -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(pixels).save(home / "a.png")
    volume = read_image("~/a.png")
    np.testing.assert_array_equal(volume.pixels[0], pixels)
    assert volume.path == home / "a.png"


def test_every_path_of_a_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("x")
    parser.add_argument("--output", type=Path)
    assert parser.parse_args(["--output=~/masks"]).output == home / "masks"
    assert run(predict.main, ["~/none.png", "--box", "1", "2", "3", "4"]) == 2
    assert f"error: {home}/none.png: no such file" in capsys.readouterr().err
