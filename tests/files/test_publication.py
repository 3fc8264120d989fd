"""A folder is replaced as a whole, with and without an exchange of names."""

import os
from pathlib import Path

import pytest

from dbsam_deploy.files import publication
from dbsam_deploy.files.publication import (
    beside,
    exchange,
    keep_only,
    new_folder,
    remove,
    replace_folder,
    tidy,
)


def put(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / text).write_text(text)
    return folder


@pytest.fixture(params=["exchange", "no exchange"])
def place(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "no exchange":
        monkeypatch.setattr(publication, "exchange", lambda *names: False)
    return put(tmp_path / "place", "old")


def test_a_folder_is_replaced_as_a_whole(place: Path) -> None:
    replace_folder(put(new_folder(place), "new"), place)
    assert os.listdir(place) == ["new"]
    assert os.listdir(place.parent) == ["place"]
    remove(place)
    replace_folder(put(new_folder(place), "first"), place)
    assert os.listdir(place) == ["first"]
    assert os.listdir(place.parent) == ["place"]


def test_a_failure_puts_the_earlier_folder_back(place: Path, monkeypatch) -> None:
    """The new folder cannot take the name: with one step or with two, the old one has it."""
    fresh, real = put(new_folder(place), "new"), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == fresh:
            raise OSError(5, "Input/output error")
        return real(path, target)

    def cannot(*names: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", refuse)
    if publication.exchange is exchange:
        monkeypatch.setattr(publication, "exchange", cannot)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(fresh, place)
    assert os.listdir(place) == ["old"]
    assert not beside(place, "old").exists()


def test_what_a_killed_run_left_is_removed_and_the_earlier_folder_put_back(place: Path) -> None:
    place.rename(beside(place, "old"))
    put(beside(place, "new"), "half")
    tidy(place)
    assert os.listdir(place) == ["old"]
    put(beside(place, "old"), "older")
    tidy(place)
    assert os.listdir(place) == ["old"]
    assert os.listdir(place.parent) == ["place"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, other = put(tmp_path / "one", "1"), put(tmp_path / "other", "2")
    if not exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    assert (os.listdir(one), os.listdir(other)) == (["2"], ["1"])
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "absent")


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    mine = put(tmp_path / "mine", "thesis")
    folder = put(tmp_path / "folder", "a")
    (folder / "link").symlink_to(mine)
    (folder / "broken").symlink_to("nowhere")
    keep_only(folder, ["a"])
    assert os.listdir(folder) == ["a"]
    assert os.listdir(mine) == ["thesis"]
    remove(folder / "absent")
