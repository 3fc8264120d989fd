"""What a damaged, hostile or talkative NIfTI file becomes; axes and geometry: test_scans."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.nifti import SLACK_BYTES, read_nifti
from dbsam_deploy.images.scans import nifti_bytes
from dbsam_deploy.images.volumes import read_image

nib = pytest.importorskip("nibabel")


def save(path: Path, array: np.ndarray, **fields: bytes) -> Path:
    image = nib.Nifti1Image(array, np.diag([1, 2, 3, 1]))
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def test_every_flipped_bit_of_a_compressed_file_is_found(tmp_path, rng) -> None:
    array = rng.integers(0, 900, (9, 8, 7)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", array)
    content = path.read_bytes()
    for _ in range(60):
        broken = bytearray(content)
        broken[rng.integers(10, len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(broken))
        try:
            values = read_nifti(path).values
        except InputError:
            continue
        np.testing.assert_array_equal(values.transpose(2, 1, 0), array)  # a name or a time stamp


def test_free_text_does_not_reach_the_label_map(tmp_path) -> None:
    fields = {"descrip": b"Jane Doe 1", "aux_file": b"Jane Doe 2", "db_name": b"Jane Doe 3"}
    path = save(tmp_path / "a.nii", np.arange(60).reshape(3, 4, 5).astype(np.int16), **fields)
    assert b"Jane Doe 3" in path.read_bytes()
    geometry = read_nifti(path).geometry
    written = nifti_bytes(np.ones((5, 4, 3), np.uint8), geometry, compressed=False)
    assert b"Jane" not in written


def test_one_volume_of_4d(tmp_path, rng) -> None:
    array = rng.integers(0, 900, (3, 4, 5, 6)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, array)
        scan = read_nifti(path, volume=4)
        np.testing.assert_array_equal(scan.values.transpose(2, 1, 0), array[..., 4])
        assert scan.geometry.shape == (3, 4, 5)
        for wrong in (6, -1):
            with pytest.raises(InputError, match="it holds 6, counted from 0"):
                read_image(path, volume=wrong)


@pytest.mark.parametrize("fill", [-32768, 32767])
def test_a_fill_value_is_no_intensity(tmp_path, fill: int) -> None:
    array = np.tile(np.arange(-1000, 1000, dtype=np.int16), (20, 3, 1)).reshape(20, 60, 100)
    array[:2] = fill
    image = read_image(save(tmp_path / "a.nii.gz", array))
    assert image.intensity.excluded == 2 * 60 * 100
    assert -1000 <= image.intensity.low < -900
    assert 900 < image.intensity.high <= 999
    assert image.pixels[:, :, :2].max() == 0


SINGLE, DOUBLE = (float(np.finfo(kind).max) for kind in (np.float32, np.float64))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("dtype", "end"), [(np.float32, SINGLE), (np.float64, SINGLE), (np.float64, DOUBLE)]
)
def test_the_ends_of_floats_are_fill_values(tmp_path, dtype: type, end: float, sign: int) -> None:
    array = np.linspace(0, 0.9, 60).reshape(3, 4, 5).astype(dtype)
    array[1] = sign * end
    padding = read_nifti(save(tmp_path / "a.nii", array)).padding
    np.testing.assert_array_equal(padding.transpose(2, 1, 0), array == sign * end)
    array[0, 0, 0] = np.nan  # then no range is known
    assert read_nifti(save(tmp_path / "b.nii", array)).padding is None


@pytest.mark.parametrize(
    ("stored", "rescaled"),
    [
        (np.int16, np.float32),
        (np.float32, np.float32),
        (np.int32, np.float64),
        (np.float64, np.float64),
    ],
)
def test_a_slope_gives_a_type_that_holds_the_result(tmp_path, stored: type, rescaled: type) -> None:
    """Single where it is exact, half the memory; 2**24 + 1 needs double."""
    array = np.array([[[-7, 3, 2**24 + 1 if rescaled == np.float64 else 900]]], stored)
    path = save(tmp_path / "a.nii", array, scl_slope=2, scl_inter=-1)
    values = read_nifti(path).values
    assert values.dtype == rescaled
    assert values.ravel().tolist() == [-15, 5, array[0, 0, 2] * 2 - 1]


def test_full_range_and_two_values_are_no_fill(tmp_path) -> None:
    full = np.linspace(-32768, 32767, 8000).astype(np.int16).reshape(20, 20, 20)
    assert read_nifti(save(tmp_path / "a.nii", full)).padding is None
    two = np.where(full > 0, 32767, -32768).astype(np.int16)
    assert read_nifti(save(tmp_path / "b.nii", two)).padding is None


def test_a_block_may_follow_the_voxels_of_a_compressed_file(tmp_path) -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    path = save(tmp_path / "a.nii.gz", array)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + bytes(SLACK_BYTES)))
    np.testing.assert_array_equal(read_nifti(path).values.transpose(2, 1, 0), array)
    path.write_bytes(gzip.compress(content + bytes(SLACK_BYTES + 1)))
    with pytest.raises(InputError) as refused:
        read_nifti(path)
    assert str(refused.value) == (
        f"{path}: more than 4096 bytes follow the voxels that its header announces: its header is "
        "damaged"
    )


def test_announced_sizes_are_refused_before_anything_is_read(tmp_path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((4, 4, 4))
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 2**29
    bomb = header.binaryblock + b"\1\0\0\0" + bytes(2**25)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bomb, 1))
    header["vox_offset"] = 352
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(2**25), 1))
    (tmp_path / "c.nii").write_bytes(header.binaryblock + bytes(100))
    header.set_data_shape((1000, 1000, 500))
    header.set_data_dtype(np.float64)
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(2**25), 1))
    tracemalloc.start()
    for name, message in (
        ("a.nii.gz", "voxels start at byte"),
        ("b.nii.gz", "bytes follow the voxels"),
        ("c.nii", "its header announces 480"),
        ("d.nii.gz", "at most 2147483648 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            read_nifti(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
