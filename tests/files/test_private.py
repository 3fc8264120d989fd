"""Where a user's own files are kept."""

from __future__ import annotations

import os
from pathlib import Path

from dbsam_deploy.files.private import cache_folder, find_kept, keep, trim


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
