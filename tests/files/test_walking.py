"""Folders behind symbolic links."""

from dbsam_deploy.datasets.finding import find_labelled
from dbsam_deploy.files.walking import files_below


def test_links_to_folders_are_followed_and_circles_end(tmp_path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "own").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for path in (data / "own" / "a.npz", elsewhere / "deep" / "b.npz", elsewhere / "c.txt"):
        path.touch()
    (data / "linked").symlink_to(elsewhere)
    (elsewhere / "deep" / "round").symlink_to(elsewhere)
    (data / "again").symlink_to(data)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(data).as_posix() for path in files_below(data)]
    assert found == ["gone", "linked/c.txt", "linked/deep/b.npz", "own/a.npz"]
    assert [case.task for case in find_labelled(data).cases] == ["linked/deep", "own"]


def test_pairs_behind_a_link_are_found(tmp_path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    for name in ("x.nii.gz", "x_mask.nii.gz"):
        (elsewhere / name).touch()
    (data / "task").symlink_to(elsewhere)
    assert [case.task for case in find_labelled(data).cases] == ["task"]
