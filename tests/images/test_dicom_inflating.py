"""Deflated DICOM: read as any other, and never unpacked beyond what its header says."""

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images import dicom_inflating
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.dicom_inflating import inflated, is_deflated

pydicom = pytest.importorskip("pydicom")

VALUES = np.arange(3 * 40 * 48).reshape(3, 40, 48)


def deflate(file: Path) -> Path:
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(file)
    return file


def parts(file: Path) -> tuple[bytes, bytes]:
    """Both groups of a deflated file: how it is written, and its inflated data."""
    content = file.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    return content[:start], zlib.decompressobj(-15).decompress(content[start:])


def write(file: Path, head: bytes, data: bytes) -> Path:
    pack = zlib.compressobj(1, zlib.DEFLATED, -15)
    file.write_bytes(head + pack.compress(data) + pack.flush())
    return file


def test_a_deflated_series_is_read_like_any_other(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path / "ct", VALUES)
    plain = read_dicom(tmp_path / "ct")
    assert not is_deflated(files[0])
    for file in files:
        assert is_deflated(deflate(file))
    scan = read_dicom(tmp_path / "ct")
    np.testing.assert_array_equal(scan.values, VALUES)
    np.testing.assert_array_equal(scan.geometry.affine, plain.geometry.affine)


def test_deflated_frames(tmp_path: Path) -> None:
    path = deflate(write_enhanced(tmp_path / "e.dcm", VALUES, depths_mm=(2, 0, 4)))
    np.testing.assert_array_equal(read_dicom(path).values, VALUES[[1, 0, 2]])


def test_data_that_inflate_beyond_their_header_are_refused(tmp_path: Path) -> None:
    (file,) = write_dicom_series(tmp_path, VALUES[:1])
    head, data = parts(deflate(file))
    write(file, head, data + bytes(200 << 20))
    assert file.stat().st_size < 2 << 20
    tracemalloc.start()
    with pytest.raises(InputError, match="bytes of pixels once it is inflated, expected 3840"):
        read_dicom(file)
    assert tracemalloc.get_traced_memory()[1] < 160 << 20  # the longest header, twice
    tracemalloc.stop()


def test_data_that_inflate_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = write_dicom_series(tmp_path, VALUES[:1])
    head, data = parts(deflate(file))
    write(file, head, data + bytes(3 << 20))
    monkeypatch.setattr(dicom_inflating, "MAX_VOLUME_BYTES", 2 << 20)
    with pytest.raises(InputError, match="more than 2097152 bytes once it is inflated"):
        read_dicom(file)


@pytest.mark.parametrize("change", ["cut", "flipped", "followed"])
def test_damaged_deflated_data(tmp_path: Path, change: str) -> None:
    (file,) = write_dicom_series(tmp_path, VALUES[:1])
    content = bytearray(deflate(file).read_bytes())
    if change == "cut":
        del content[-40:]
    elif change == "flipped":
        content[144 + int.from_bytes(content[140:144], "little")] = 0xFF
    else:
        content += bytes(5000)
    file.write_bytes(content)
    said = {"cut": "cut short in its deflated", "flipped": "damaged", "followed": "bytes follow"}
    with pytest.raises(InputError, match=f"{file.name}.*{said[change]}"):
        read_dicom(file)


def test_only_as_much_as_asked_is_kept(tmp_path: Path) -> None:
    (file,) = write_dicom_series(tmp_path, VALUES[:1])
    head, data = parts(deflate(file))
    content, size = inflated(file, len(head) + 10)
    assert content[132:] == head[132:].replace(b"1.2.1.99", b"1.2.1\0\0\0") + data[:10]
    assert size == len(head) + len(data)
