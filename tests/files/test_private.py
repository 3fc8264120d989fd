"""Where a user's own files are kept."""

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.files.private import cache_folder, find_kept, keep, making, trim


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder("kernels") == tmp_path / "caches/dbsam_deploy/kernels"
    for other in ("", "relative/path"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache_folder("kernels") == tmp_path / ".cache/dbsam_deploy/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("kernels") == tmp_path / ".cache/dbsam_deploy/kernels"


def test_tests_keep_out_of_the_users_own_cache():
    assert not cache_folder("kernels").is_relative_to(Path.home() / ".cache")


def test_what_was_used_longest_ago_goes_first(tmp_path):
    paths = [keep(tmp_path, stem, ".bin", stem.encode() * 10) for stem in ("one", "two", "six")]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    other = keep(tmp_path, "one", ".txt", b"of another kind" * 10)
    assert find_kept(tmp_path, "one", ".bin")  # which is use
    trim(tmp_path, ".bin", 60)
    assert sorted(path.name[:3] for path in tmp_path.glob("*.bin")) == ["one", "six"]
    trim(tmp_path, ".bin", 0, spare=paths[2])
    assert set(tmp_path.iterdir()) == {other, paths[2]}
    trim(tmp_path, ".bin", 0)
    assert list(tmp_path.iterdir()) == [other]


def test_a_user_without_a_home_is_told_of_xdg_cache_home(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(EngineError, match=r"no home folder: .*XDG_CACHE_HOME"):
        cache_folder("kernels")


def test_one_that_another_process_deletes_meanwhile_is_not_there(tmp_path, monkeypatch):
    path = keep(tmp_path, "one", ".bin", b"content")
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: path.unlink() or path.open())
        assert find_kept(tmp_path, "one", ".bin", damaged=told.append) is None
    assert not told
    path.mkdir()  # what is in the way goes
    (path / "file").touch()
    (tmp_path / "one-.bin").symlink_to("nowhere")
    assert find_kept(tmp_path, "one", ".bin", damaged=told.append) is None
    assert len(told) == 2
    assert list(tmp_path.iterdir()) == []


def test_links_do_not_end_the_trimming(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"1" * 100)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "a-dead-one.bin").symlink_to("nowhere")
    (cache / "to-a-folder.bin").symlink_to(elsewhere)
    for number in range(3):
        keep(cache, str(number), ".bin", b"1" * 100)
    trim(cache, ".bin", 150)
    assert [path.is_symlink() for path in cache.iterdir()] == [False]
    assert len(list(elsewhere.iterdir())) == 1


def test_what_a_killed_process_left_goes_and_what_is_made_now_stays(tmp_path):
    (tmp_path / "one-1.bin.partial").write_bytes(b"1" * 100)
    left = tmp_path / "tmp0.bin.unfinished"
    left.mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)
    with making(tmp_path, ".bin") as scratch:
        (scratch / "large").write_bytes(b"1" * 100)
        trim(tmp_path, ".bin", 1)
        assert list(tmp_path.iterdir()) == [scratch]
    assert list(tmp_path.iterdir()) == []
