"""A file appears whole or not at all."""

import os
from pathlib import Path

import pytest
from support.faults import Faults, injected

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files.atomic import write_atomically, write_file, write_files, writing_to


def test_a_block_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with write_atomically(path) as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_file_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "mask.png"
    assert write_file(path, b"one") == path
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    old = os.umask(0o027)
    try:
        assert write_file(path, b"x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_write_file_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path / "mask.png", b"old")

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_file_into_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / "file" / "mask.png", b"")


def test_a_replacement_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.replace", refused)
    with pytest.raises(OSError, match="Input"), write_atomically(tmp_path / "a") as stream:
        stream.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a"
    (tmp_path / "a.partial").write_bytes(b"more than the new content")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_share_a_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with write_atomically(path) as first:
        first.write(b"first" * 9)
        first.flush()
        with write_atomically(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 9
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "a.partial").symlink_to("mine")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    write_files(dict.fromkeys(paths, b"old"))
    full = Faults(at=8, error=28, lasting=True)  # at the second file's first byte, and on
    with injected(full), pytest.raises(InputError, match="No space"):
        write_files(dict.fromkeys(paths, b"new"))
    assert full.calls[:8] == ["mkdir", "os.open", "ftruncate", "stream write"] * 2
    assert [path.read_bytes() for path in paths] == [b"old"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "c.csv"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "x cannot be written: No space .*; free some"),
        (PermissionError(13, "Permission denied", "x/y"), r"denied \(x/y\); make it writable"),
        (FileExistsError(17, "File exists", "x"), "x cannot be written: File exists; move"),
        (FileNotFoundError(2, "No such file", "x"), "x cannot be written: No .*; write elsewhere"),
    ],
)
def test_what_a_disk_refuses_is_the_users_to_mend(error: OSError, message: str) -> None:
    with pytest.raises(InputError, match=message), writing_to(Path("x")):
        raise error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody makes folders")
def test_a_folder_that_the_system_lets_nobody_make_is_the_users_to_mend() -> None:
    place = Path("/proc/out/of/reach")
    refused = pytest.raises(InputError, match=f"{place} cannot be written.*elsewhere")
    with refused, writing_to(place):
        place.mkdir(parents=True)


@pytest.mark.parametrize("name", [None, "y", "x/y"])
def test_other_errors_of_the_system_stay_bugs(name: str | None) -> None:
    with pytest.raises(FileNotFoundError), writing_to(Path("x")):
        raise FileNotFoundError(2, "No such file or directory", name)
