"""A manifest is read back as it was written, or refused with what to do."""

import json
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.files.manifests import ManifestKind

KIND = ManifestKind("a list of things", "make it again", EngineError, version=3)


def numbers(body: dict) -> list[int]:
    return [int(item) for item in body["numbers"]]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = KIND.write(tmp_path / "a.json", {"numbers": [1, 2]})
    assert KIND.read(path, numbers) == [1, 2]
    assert json.loads(path.read_text()) == {"format": 3, "numbers": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a list of things"),
        ("", "not a list of things"),
        ("null", "not a list of things"),
        ("[]", "not a list of things"),
        ("{}", "not a list of things"),
        ('{"format": 2}', "another manifest format"),
        ('{"format": 3}', "not a list of things"),
        ('{"format": 3, "numbers": ["one"]}', "not a list of things"),
    ],
)
def test_everything_else_is_refused_with_what_to_do(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match=f"{message}.*; make it again"):
        KIND.read(path, numbers)


def test_an_error_of_the_reader_passes_as_it_is(tmp_path: Path) -> None:
    path = KIND.write(tmp_path / "a.json", {})

    def refuse(body: dict) -> None:
        raise InputError("too small")

    with pytest.raises(InputError, match=r"^too small$"):
        KIND.read(path, refuse)


def test_named_files_lie_below_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    path.parent.mkdir()
    for file in (tmp_path / "outside", path.parent / "inside"):
        file.write_text("x")
    (path.parent / "link").symlink_to(tmp_path / "outside")
    assert KIND.find(path, "inside") == path.parent / "inside"
    for name in ("../outside", str(tmp_path / "outside"), "link", "missing", "."):
        with pytest.raises(EngineError, match="which is not there; make it again"):
            KIND.find(path, name)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    KIND.compare(path, tmp_path / "b", "ab" * 32, "ab" * 32)
    with pytest.raises(EngineError, match="its hash differs: abababababab, not cdcdcdcdcdcd"):
        KIND.compare(path, tmp_path / "b", "ab" * 32, "cd" * 32)
