"""What a folder holds: every slice is read or refused by its name, and the rest is said."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images import dicom_files
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.dicom_files import find_dicom, looks_like_dicom, read_header

pydicom = pytest.importorskip("pydicom")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_dicom_series(tmp_path / "ct", np.arange(5 * 4 * 6).reshape(5, 4, 6))


DAMAGE = {
    "empty": lambda content: b"",
    "no DICOM": lambda content: b"<html>not found</html>",
    "zeros": lambda content: bytes(len(content)),
    "cut in the header": lambda content: content[:400],
    "cut in the pixels": lambda content: content[:-10],
    "no pixels": lambda content: content[: content.rindex(b"\xe0\x7f\x10\x00")],
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_slice_that_cannot_be_read_is_named(files: list[Path], kind: str, place: int) -> None:
    """Whether it is the first, the last or one between: five slices of six look like a volume."""
    damaged = files[place]
    damaged.write_bytes(DAMAGE[kind](damaged.read_bytes()))
    with pytest.raises(InputError, match=damaged.name):
        read_dicom(damaged.parent)


@pytest.mark.parametrize("content", [b"", b"\x01\x02\x03\x00" * 50])
@pytest.mark.parametrize("names", ["IM{:04d}", "1.2.840.{}", "{}"])
def test_a_slice_without_suffix_is_named_as_well(
    files: list[Path], names: str, content: bytes
) -> None:
    for index, file in enumerate(files):
        file.rename(file.with_name(names.format(index)))
    damaged = files[0].with_name(names.format(4))
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=damaged.name):
        read_dicom(damaged.parent)


def test_a_link_to_nothing_is_no_slice_less(files: list[Path]) -> None:
    files[-1].unlink()
    files[-1].symlink_to("elsewhere")
    with pytest.raises(InputError, match="link to nothing"):
        read_dicom(files[0].parent)


def test_other_files_are_said_and_not_taken(files: list[Path]) -> None:
    folder = files[0].parent
    (folder / "README.txt").write_text("about")
    (folder / "thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
    (folder / "LICENSE").write_text("free")
    (folder / "DICOMDIR").write_bytes(files[0].read_bytes())
    scan = read_dicom(folder)
    assert len(scan.values) == 5
    (note,) = scan.notes
    assert "DICOMDIR, LICENSE, README.txt and 1 more" in note


def test_text_beside_slices_without_suffix_is_no_slice(files: list[Path]) -> None:
    for file in files:
        file.rename(file.with_suffix(""))
    (files[0].parent / "LICENSE").write_text("free")
    assert len(read_dicom(files[0].parent).values) == 5


def test_a_report_is_said_and_not_taken(files: list[Path]) -> None:
    report = files[0].parent / "report.dcm"
    report.write_bytes(files[0].read_bytes())
    edit(report, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", PixelData=None)
    scan = read_dicom(report.parent)
    assert len(scan.values) == 5
    assert scan.notes == (
        "passed over, since they are no images (Basic Text SR Storage): report.dcm",
    )
    with pytest.raises(InputError, match="Basic Text SR Storage; expected an image"):
        read_dicom(report)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_slices_without_preamble_are_read(files: list[Path], syntax: str) -> None:
    for file in files:
        dataset = pydicom.dcmread(file)
        del dataset.file_meta
        dataset.preamble = None
        implicit = syntax.endswith("1.2")
        dataset.save_as(file, enforce_file_format=False, implicit_vr=implicit, little_endian=True)
        assert file.read_bytes()[128:132] != b"DICM"
    scan = read_dicom(files[0].parent)
    np.testing.assert_array_equal(scan.values, np.arange(120).reshape(5, 4, 6))
    assert len(read_dicom(files[0]).values) == 1


def test_folders_in_folders_are_one_series(files: list[Path]) -> None:
    for index, file in enumerate(files):
        below = file.parent / f"part{index % 2}" / "deep"
        below.mkdir(parents=True, exist_ok=True)
        file.rename(below / file.name)
    assert len(read_dicom(files[0].parent).values) == 5


def test_a_pipe_is_not_opened(tmp_path: Path, files: list[Path]) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(files[0].parent / "pipe")
    assert "pipe" in read_dicom(files[0].parent).notes[0]
    os.mkfifo(files[0].parent / "7.dcm")
    with pytest.raises(InputError, match=r"7\.dcm is no file"):
        read_dicom(files[0].parent)


@pytest.mark.parametrize("name", ["thing", "7.dcm"])
@pytest.mark.parametrize("kind", ["socket", "device", "linked folder"])
def test_what_is_no_file_is_not_opened(
    files: list[Path], kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files[0].parent
    monkeypatch.chdir(folder)  # a socket's name has at most 108 bytes
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else folder.parent)
    if name == "thing":
        assert "passed over, since they hold no slices: thing" in read_dicom(folder).notes
    else:
        with pytest.raises(InputError, match=r"7\.dcm is no file"):
            read_dicom(folder)


def test_a_folder_that_cannot_be_looked_into_is_named(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies there would be missing; root may look everywhere, so this is played."""
    (files[0].parent / "part").mkdir()
    really = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "part":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="part cannot be looked into: Permission denied"):
        read_dicom(files[0].parent)


@pytest.mark.parametrize(
    ("limit", "value"),
    [("MAX_HEADER_BYTES", 300), ("MAX_HEADER_READS", 40), ("MAX_HEADER_ITEMS", 1)],
)
def test_a_header_has_bounds(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    nested = pydicom.Dataset()
    nested.VOILUTSequence = [pydicom.Dataset() for _ in range(3)]
    edit(files[0], VOILUTSequence=[nested])
    read_header(files[0])
    monkeypatch.setattr(dicom_files, limit, value)
    with pytest.raises(InputError, match="made to do harm"):
        read_header(files[0])


def test_deep_nesting_is_refused(files: list[Path]) -> None:
    """Sequences of unknown length within each other, which a reader follows by recursion."""
    content = files[0].read_bytes()
    at = content.index(b"\x28\x00\x02\x00US")
    deep = (b"\x28\x00\x10\x30SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 3000
    files[0].write_bytes(content[:at] + deep + content[at:])
    with pytest.raises(InputError):
        read_header(files[0])


def test_too_many_files_are_not_searched(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_files, "MAX_FILES", 4)
    with pytest.raises(InputError, match="more than 4 files"):
        find_dicom(files[0].parent)


def test_looks_like_dicom(tmp_path: Path, files: list[Path]) -> None:
    assert looks_like_dicom(files[0])
    assert not looks_like_dicom(tmp_path)
    (tmp_path / "a").write_text("text")
    assert not looks_like_dicom(tmp_path / "a")
