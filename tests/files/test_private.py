"""Where a user's own files are kept."""

from __future__ import annotations

from pathlib import Path

from dbsam_deploy.files.private import cache_folder


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
