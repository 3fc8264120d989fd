"""NIfTI: axes, geometry, rescaling, and what is refused."""

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.damage import refusals
from support.dicom_series import rotation

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.extras import pip_line
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.nifti import read_nifti
from dbsam_deploy.images.scans import (
    ScanGeometry,
    check_voxels,
    nifti_bytes,
)

nib = pytest.importorskip("nibabel")

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation(12, -23, 31) @ np.diag([0.7, -0.9, 2.5])
OBLIQUE[:3, 3] = [-91.25, 33.5, 1042.75]


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE, **codes: int) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=codes.get("sform", 1))
    image.set_qform(affine, code=codes.get("qform", 1))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_nifti_axes(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    array = rng.integers(-900, 2000, (7, 5, 4)).astype(np.int16)
    scan = read_nifti(save_nifti(tmp_path / name, array))
    assert scan.values.shape == (4, 5, 7)
    for x, y, z in [(0, 0, 0), (6, 0, 0), (0, 4, 0), (0, 0, 3), (2, 3, 1)]:
        assert scan.values[z, y, x] == array[x, y, z]
    assert scan.spacing_mm == pytest.approx((2.5, 0.9, 0.7), rel=1e-5)


def test_nifti_scale_factors_are_applied(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = rng.integers(0, 250, (4, 5, 3)).astype(np.uint8)
    image = nib.Nifti1Image(stored, OBLIQUE)
    image.header.set_slope_inter(2.0, -100.0)
    nib.save(image, tmp_path / "scaled.nii")
    scan = read_nifti(tmp_path / "scaled.nii")
    expected = stored.transpose(2, 1, 0).astype(np.float32) * 2 - 100
    np.testing.assert_array_equal(scan.values, expected)


def test_nifti_bytes_without_scaling_stay_uint8(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    assert read_nifti(save_nifti(tmp_path / "u.nii.gz", stored)).values.dtype == np.uint8


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 1), (6, 5, 1), (6, 5)])
@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (2, 0), (0, 1), (4, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_map_has_the_inputs_geometry(
    tmp_path: Path,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    sform: int,
    qform: int,
    dtype: type,
) -> None:
    array = rng.integers(0, 900, shape).astype(np.int16)
    source = nib.load(save_nifti(tmp_path / "in.nii.gz", array, OBLIQUE, sform=sform, qform=qform))
    scan = read_nifti(tmp_path / "in.nii.gz")
    labels = rng.integers(0, np.iinfo(dtype).max + 1, scan.values.shape).astype(dtype)
    (tmp_path / "out.nii.gz").write_bytes(nifti_bytes(labels, scan.geometry))
    back = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.affine, source.affine)
    assert back.shape == source.shape
    assert back.get_data_dtype() == dtype
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(back.header[field], source.header[field])
    again = read_nifti(tmp_path / "out.nii.gz").values
    np.testing.assert_array_equal(again.astype(dtype), labels)
    # The stored array itself, by its own axes.
    stored = np.asarray(back.dataobj).reshape(labels.shape[::-1])
    np.testing.assert_array_equal(stored, labels.transpose(2, 1, 0))


def test_label_map_of_a_nifti2_is_a_nifti2(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(np.zeros((3, 4, 5), np.int16), OBLIQUE), tmp_path / "two.nii")
    scan = read_nifti(tmp_path / "two.nii")
    (tmp_path / "out.nii.gz").write_bytes(nifti_bytes(scan.values.astype(np.uint8), scan.geometry))
    assert isinstance(nib.load(tmp_path / "out.nii.gz"), nib.Nifti2Image)


def test_label_map_drops_what_describes_the_scan(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), OBLIQUE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    image.header["cal_max"] = 400
    nib.save(image, tmp_path / "in.nii")
    scan = read_nifti(tmp_path / "in.nii")
    content = gzip.decompress(nifti_bytes(np.ones((5, 4, 3), np.uint8), scan.geometry))
    assert b"Jane Doe" not in content
    header = nib.Nifti1Image.from_bytes(content).header
    assert header["cal_max"] == 0
    assert scan.geometry.header["cal_max"] == 400  # the input's own header is left alone


def test_label_map_bytes_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = read_nifti(save_nifti(tmp_path / "in.nii", np.ones((3, 4, 5), np.int16)))
    first = nifti_bytes(scan.values.astype(np.uint8), scan.geometry)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert nifti_bytes(scan.values.astype(np.uint8), scan.geometry) == first


# Where a NIfTI-1 header keeps a field, and what is written there.
HEADER_DAMAGE = {
    "bad type": (70, b"\x07\x77"),
    "huge": (40, np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], "<i2").tobytes()),
    "negative": (40, np.array([3, -3, 4, 5, 1, 1, 1, 1], "<i2").tobytes()),
    "far offset": (108, np.array([1e30], "<f4").tobytes()),
    "nan affine": (280, np.array([np.nan], "<f4").tobytes()),
    "flat affine": (312, bytes(16)),
}
WHOLE_DAMAGE = {
    "text": lambda content: b"this is no scan at all" * 40,
    "empty": lambda content: b"",
    "cut header": lambda content: content[:200],
    "cut data": lambda content: content[:-30],
}


def broken_nifti(tmp_path: Path, kind: str) -> Path:
    path = save_nifti(tmp_path / "scan.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    content = bytearray(path.read_bytes())
    if kind in HEADER_DAMAGE:
        place, value = HEADER_DAMAGE[kind]
        content[place : place + len(value)] = value
        path.write_bytes(bytes(content))
    else:
        path.write_bytes(WHOLE_DAMAGE[kind](bytes(content)))
    return path


@pytest.mark.parametrize("kind", [*HEADER_DAMAGE, *WHOLE_DAMAGE])
def test_broken_nifti_is_refused(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = broken_nifti(tmp_path, kind)
    with pytest.raises(InputError, match=r"scan\.nii"):
        read_nifti(path)
    assert caplog.records == []  # nibabel would print them on stderr


def test_cut_gzip_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 900, (20, 20, 20)).astype(np.int16)
    path = save_nifti(tmp_path / "scan.nii.gz", array)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="Compressed file ended"):
        read_nifti(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5, 2), np.int16), "--volume 0 to 1"),
        (np.zeros((3, 4, 5), np.complex64), "real numbers"),
        (np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "real numbers"),
    ],
)
def test_nifti_that_is_no_grey_volume_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    nib.save(nib.Nifti1Image(array, OBLIQUE), tmp_path / "scan.nii")
    with pytest.raises(InputError, match=message):
        read_nifti(tmp_path / "scan.nii")


@pytest.mark.parametrize(
    ("shape", "voxel_bytes", "message"),
    [
        ((0, 4, 5), 1, "array of 0×4×5 holds no voxel"),
        ((4, 0, 5), 1, "array of 4×0×5 holds no voxel"),
        ((4, 5, 0), 1, "array of 4×5×0 holds no voxel"),
        ((1, 5, 13421773), 1, "1 slices of 5×13421773 pixels; at most 67108864 pixels in a slice"),
        ((177, 1, 3033169), 1, "in a slice and 536870912 voxels in all are read"),
        ((17, 1, 15790321), 8, "voxels of 8 bytes; at most 2147483648 bytes are read"),
        ((17, 2048, 8192), 8, "17×2048×8192 voxels of 8 bytes"),
    ],
)
def test_check_voxels_refuses(shape: tuple[int, ...], voxel_bytes: int, message: str) -> None:
    """What is one voxel more than a limit allows, where it is about a limit."""
    with pytest.raises(InputError, match=rf"^scan: .*{re.escape(message)}"):
        check_voxels(shape, Path("scan"), voxel_bytes)


@pytest.mark.parametrize(
    ("shape", "voxel_bytes"),
    [
        ((1, 1, 1), 1),
        ((8, 8192, 8192), 1),
        ((512, 1024, 1024), 1),
        ((512, 1024, 1024), 4),
        ((16, 4096, 4096), 8),
    ],
)
def test_check_voxels_takes_what_is_as_large_as_it_says(
    shape: tuple[int, ...], voxel_bytes: int
) -> None:
    check_voxels(shape, Path("scan"), voxel_bytes)
    if voxel_bytes == 1:
        check_voxels(shape, Path("scan"))


def test_flipped_bytes_never_escape_as_another_error(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Damage at random places of a header is read or refused, never anything else."""
    path = save_nifti(tmp_path / "scan.nii", np.ones((3, 4, 5), np.int16))
    assert refusals(path, read_nifti, rng, times=1000, below=352) > 133  # of about 200


@pytest.mark.parametrize(
    ("what", "package", "extra", "read"),
    [("NIfTI file", "nibabel", "nifti", read_nifti), ("DICOM", "pydicom", "dicom", read_dicom)],
)
def test_a_missing_extra_names_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, package: str, extra: str, read
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"{what}.*{re.escape(pip_line(extra))}"):
        read(tmp_path / "scan")


def test_geometry_without_a_header_makes_a_header() -> None:
    content = nifti_bytes(np.ones((2, 3, 4), np.uint8), ScanGeometry(OBLIQUE, (4, 3, 2)))
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_allclose(image.affine, OBLIQUE, rtol=1e-6)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 0)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_a_compressed_label_map_holds_the_plain_one() -> None:
    geometry = ScanGeometry(OBLIQUE, (4, 3, 2))
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    plain = nifti_bytes(labels, geometry, compressed=False)
    packed = nifti_bytes(labels, geometry)
    assert gzip.decompress(packed) == plain
    assert packed[4:8] == bytes(4)  # no time of writing
    image = nib.Nifti1Image.from_bytes(plain)
    np.testing.assert_array_equal(np.asarray(image.dataobj), labels.transpose(2, 1, 0))
