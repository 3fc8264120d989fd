"""A manifest is read back as it was written, or refused with what to do."""

import json
import os
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.files.manifests import MAX_BYTES, ManifestKind, seal_of

KIND = ManifestKind("a list of things", "make it again", EngineError, version=3)


def numbers(body: dict) -> list[int]:
    return [int(item) for item in body["numbers"]]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = KIND.write(tmp_path / "a.json", {"numbers": [1, 2]})
    assert KIND.read(path, numbers) == [1, 2]
    body = {"numbers": [1, 2]}
    assert json.loads(path.read_text()) == {"format": 3, **body, "seal": seal_of(body)}
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
        ('{"format": 3, "numbers": [1], "seal": "0"}', "was edited after it was written"),
        ('{"format": 3, "format": 3}', "'format' stands there twice"),
        ('{"format": 3, "numbers": [NaN]}', "NaN is no number of JSON"),
        ('{"format": 3, "numbers": [1e999]}', "no finite number"),
        ('{"format": 3, "numbers": [' + "9" * 5000 + "]}", "not a list of things"),
        ("[" * 100_000, "not a list of things .too deep"),
        ('{"format": 3, "numbers": ' + "[" * 100_000, "not a list of things .too deep"),
        (" " * (MAX_BYTES + 1), "expected at most"),
    ],
)
def test_everything_else_is_refused_with_what_to_do(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match=f"{message}.*; make it again") as caught:
        KIND.read(path, numbers)
    assert len(caught.value.message) < 400


def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(EngineError, match="no regular file"):
        KIND.read(tmp_path / "a.json", numbers)


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
    (path.parent / "away").symlink_to(tmp_path)
    (path.parent / "loop").symlink_to("loop")
    assert KIND.find(path, "inside") == path.parent / "inside"
    for name in (
        "../outside",
        str(tmp_path / "outside"),
        "link",
        "away/outside",
        "loop/inside",
        "missing",
        ".",
        "",
        "a\0b",
        "a\\b",
        "x" * 5000,
        "inside/",
        5,
    ):
        with pytest.raises(EngineError, match="which is not there; make it again"):
            KIND.find(path, name)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    KIND.compare(path, tmp_path / "b", "ab" * 32, "ab" * 32)
    with pytest.raises(EngineError, match="its hash differs: abababababab, not cdcdcdcdcdcd"):
        KIND.compare(path, tmp_path / "b", "ab" * 32, "cd" * 32)
