"""Archives that announce more than they hold, or that two readers would read in two ways."""

import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.files.zip_files import MAX_DIRECTORY_BYTES, open_zip, plain_sizes


def archive(path: Path, entries: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return path


def sizes(path: Path) -> dict[str, int]:
    with open_zip(path, CheckpointError) as found:
        return plain_sizes(found, path.stat().st_size)


def test_sizes_of_a_plain_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a/b": b"12", "a/c": bytes(1000)})
    assert sizes(path) == {"a/b": 2, "a/c": 1000}


def test_compressed_entries(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a": bytes(10_000)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(zipfile.BadZipFile, match="a is compressed"):
        sizes(path)


def test_an_entry_twice(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        warnings.simplefilter("ignore")
        target.writestr("a", b"1")
        target.writestr("a", b"2")
    with pytest.raises(zipfile.BadZipFile, match="a is there twice"):
        sizes(tmp_path / "a.zip")


def directory_of(content: bytes) -> tuple[int, int, int]:
    """Start, length and number of entries of a directory."""
    count, length, start = struct.unpack("<10xHII2x", content[-22:])
    return start, length, count


def with_directory(content: bytes, entries: bytes, count: int) -> bytes:
    """The same archive with another directory."""
    start, _, _ = directory_of(content)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(entries), start, 0)
    return content[:start] + entries + end


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """1000 names for the same megabyte: a file of 1 MB announces a gigabyte."""
    content = archive(tmp_path / "a.zip", {"a000": bytes(1 << 20)}).read_bytes()
    start, length, _ = directory_of(content)
    one = content[start : start + length]
    entries = b"".join(one.replace(b"a000", b"a%03d" % i) for i in range(1000))
    (tmp_path / "a.zip").write_bytes(with_directory(content, entries, 1000))
    with pytest.raises(zipfile.BadZipFile, match="overlaps"):
        sizes(tmp_path / "a.zip")


def test_an_entry_larger_than_the_file(tmp_path: Path) -> None:
    content = bytearray(archive(tmp_path / "a.zip", {"a": bytes(10)}).read_bytes())
    start, _, _ = directory_of(content)
    content[start + 20 : start + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="announces 1073741824 bytes"):
        sizes(tmp_path / "a.zip")


@pytest.mark.parametrize("change", ["comment", "before", "behind"])
def test_a_directory_that_two_readers_find_in_two_places(tmp_path: Path, change: str) -> None:
    path = archive(tmp_path / "a.zip", {"a": bytes(10)})
    content = path.read_bytes()
    if change == "comment":
        with zipfile.ZipFile(path, "a") as target:
            target.comment = b"PK\5\6"
    else:
        path.write_bytes(b"x" * 30 + content if change == "before" else content + bytes(30))
    with pytest.raises(zipfile.BadZipFile, match=r"not where its end says|not a zip file"):
        sizes(path)


def test_a_large_archive_has_its_directory_in_64_bits(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for index in range(66_000):  # more than 16 bits count
            target.writestr(zipfile.ZipInfo(f"{index}"), b"")
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    assert len(sizes(tmp_path / "a.zip")) == 66_000


def test_a_directory_has_a_longest(tmp_path: Path) -> None:
    content = archive(tmp_path / "a.zip", {"a": b""}).read_bytes()
    entries = bytes(MAX_DIRECTORY_BYTES + 1)
    (tmp_path / "a.zip").write_bytes(with_directory(content, entries, 1))
    with pytest.raises(zipfile.BadZipFile, match="directory announces 16777217 bytes"):
        sizes(tmp_path / "a.zip")
