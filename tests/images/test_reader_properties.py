"""What holds for every file that a reader takes, and for every byte that it does not."""

import contextlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from support.dicom_series import rotation, write_dicom_series

from dbsam_deploy.core.errors import DbsamError, InputError
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.intensity import to_uint8
from dbsam_deploy.images.nifti import read_nifti
from dbsam_deploy.images.npz_files import read_npz
from dbsam_deploy.images.scans import nifti_bytes
from dbsam_deploy.images.volumes import read_image
from dbsam_deploy.model.checkpoint import read_checkpoint

nib = pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

HERE = Path("scan")
SIDES = st.integers(1, 5)
DEGREES = st.floats(-180, 180)
MM = st.floats(0.2, 6).map(lambda value: round(value, 4))
DTYPES = ["u1", "i1", "<i2", ">i2", "<u2", "<i4", "<f4", ">f4", "<f8"]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """One for each example; pytest's are one for each test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """A place in the patient: turned, mirrored and with axes in any order, as files have it."""
    axes = rotation(draw(DEGREES), draw(DEGREES), draw(DEGREES))
    axes = axes[:, draw(st.permutations([0, 1, 2]))] * draw(st.sampled_from([-1, 1]))
    affine = np.eye(4)
    affine[:3, :3] = axes * [draw(MM), draw(MM), draw(MM)]
    affine[:3, 3] = [draw(st.floats(-400, 400)) for _ in range(3)]
    return affine


@given(
    affine=affines(),
    shape=st.tuples(SIDES, SIDES, SIDES),
    dtype=st.sampled_from(DTYPES),
    second=st.booleans(),
    packed=st.booleans(),
    data=st.data(),
)
def test_nifti_comes_back_as_it_lay(affine, shape, dtype, second, packed, data) -> None:
    """Voxels, their place, and a label map on the very same voxels, whatever the orientation."""
    finite = {"allow_nan": False, "allow_infinity": False} if "f" in dtype else {}
    elements = arrays.from_dtype(np.dtype(dtype), **finite)
    stored = data.draw(arrays.arrays(np.dtype(dtype), shape, elements=elements))
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    with folder() as here:
        path = here / ("a.nii.gz" if packed else "a.nii")
        nib.save(kind(stored, affine), path)
        scan = read_nifti(path)
        np.testing.assert_array_equal(scan.values.transpose(2, 1, 0), stored)
        np.testing.assert_allclose(scan.geometry.affine, affine, rtol=1e-5, atol=1e-3)
        labels = np.arange(stored.size, dtype=np.uint16).reshape(scan.values.shape)
        path.write_bytes(nifti_bytes(labels, scan.geometry, compressed=packed))
        back = nib.load(path)
        np.testing.assert_array_equal(np.asarray(back.dataobj).transpose(2, 1, 0), labels)
        np.testing.assert_allclose(back.affine, scan.geometry.affine, rtol=1e-5, atol=1e-3)


@given(
    angles=st.tuples(DEGREES, DEGREES, DEGREES),
    spacing_mm=st.tuples(MM, MM, MM),
    origin_mm=st.tuples(*[st.floats(-400, 400)] * 3),
    shape=st.tuples(st.integers(2, 4), st.integers(1, 6), st.integers(1, 6)),
    data=st.data(),
)
def test_a_box_of_voxels_lies_where_the_file_puts_it(
    angles, spacing_mm, origin_mm, shape, data
) -> None:
    """Corner by corner, DICOM's patient frame (left, posterior, superior) against the affine."""
    axes, depth = rotation(*angles), shape[0]
    with folder() as here:
        volume = np.arange(np.prod(shape)).reshape(shape)
        write_dicom_series(
            here / "ct", volume, directions=axes, spacing_mm=spacing_mm, origin_mm=origin_mm
        )
        scan = read_dicom(here / "ct")
    np.testing.assert_array_equal(scan.values, volume)  # the files' names are in another order
    corner = [data.draw(st.integers(0, side)) for side in (shape[2], shape[1], depth)]
    z_mm, y_mm, x_mm = spacing_mm
    lps = np.array(origin_mm) + axes @ (np.array([x_mm, y_mm, z_mm]) * corner)
    ras = scan.geometry.affine @ [*corner, 1]
    np.testing.assert_allclose(ras[:3], lps * [-1, -1, 1], atol=0.02)
    there = np.linalg.solve(scan.geometry.affine, [*(lps * [-1, -1, 1]), 1])[:3]
    np.testing.assert_allclose(there, corner, atol=0.1)


@given(
    shape=arrays.array_shapes(min_dims=2, max_dims=3, min_side=5, max_side=9),
    dtype=st.sampled_from(["u1", "<i2", ">u2", "<f4"]),
    fortran=st.booleans(),
    ends=st.lists(st.integers(0, 8), max_size=3),
    data=st.data(),
)
def test_npz_comes_back(shape, dtype, fortran, ends, data) -> None:
    finite = {"allow_nan": False, "allow_infinity": False} if "f" in dtype else {}
    elements = arrays.from_dtype(np.dtype(dtype), **finite)
    stored = data.draw(arrays.arrays(np.dtype(dtype), shape, elements=elements))
    boxes = np.array([[0, 0, 0, 4, 4, end] for end in ends]).reshape(-1, 6)
    with folder() as here:
        given_boxes = {"boxes": boxes} if len(shape) == 3 else {}
        imgs = np.asfortranarray(stored) if fortran else stored
        np.savez_compressed(here / "a.npz", imgs=imgs, **given_boxes)
        content = read_npz(here / "a.npz")
    np.testing.assert_array_equal(content.values, stored.reshape(-1, *shape[-2:]))
    if given_boxes:  # the last slice becomes the one after it, or stays where it is that already
        assert content.boxes[:, 5].tolist() == [e if e == shape[0] else e + 1 for e in ends]


VALUES = st.lists(st.integers(-3000, 3000), min_size=4, max_size=40, unique=True)


@given(values=VALUES, level=st.floats(-2000, 2000), width=st.floats(1, 5000))
def test_a_window_is_monotone(values, level, width) -> None:
    stored = np.array(sorted(values), np.float32).reshape(1, 1, -1)
    try:
        shown, how = to_uint8(stored, (level, width), HERE)
    except InputError as error:
        assert "choose a window within them" in str(error)  # noqa: PT017 - either may happen
        return
    assert (np.diff(shown[0, 0].astype(int)) >= 0).all()
    assert (shown[stored <= how.low] == 0).all()
    assert (shown[stored >= how.high] == 255).all()
    turned, _ = to_uint8(stored, (level, width), HERE, is_inverted=True)
    np.testing.assert_array_equal(turned, 255 - shown)


@given(values=VALUES, inverted=st.booleans(), dtype=st.sampled_from(["i2", "i4", "f4", "f8"]))
def test_percentiles_are_monotone(values, inverted, dtype) -> None:
    stored = np.array(sorted(values), dtype).reshape(1, 1, -1)
    shown = to_uint8(stored, None, HERE, is_inverted=inverted)[0][0, 0].astype(int)
    steps = np.diff(shown) * (-1 if inverted else 1)
    assert (steps >= 0).all()
    assert {shown.min(), shown.max()} == {0, 255}


@given(
    values=VALUES,
    padding=st.lists(st.sampled_from([-32768, 32767, 0, 12]), min_size=1, max_size=20),
    window=st.sampled_from([None, (0, 4000)]),
    data=st.data(),
)
def test_padding_changes_nothing_but_itself(values, padding, window, data) -> None:
    """Whatever value it has and wherever it lies, even NaN."""
    order = data.draw(st.permutations(range(len(values) + len(padding))))
    both = np.array([*values, *padding], np.float32)[order].reshape(1, 1, -1)
    excluded = np.array([*[False] * len(values), *[True] * len(padding)])[order].reshape(1, 1, -1)
    both[excluded & (both == 12)] = np.nan
    alone = both[~excluded].reshape(1, 1, -1)
    expected, how = to_uint8(alone, window, HERE)
    shown, same = to_uint8(both, window, HERE, excluded=excluded)
    np.testing.assert_array_equal(shown[~excluded], expected.reshape(-1))
    assert (shown[excluded] == 0).all()
    assert (same.low, same.high, same.excluded) == (how.low, how.high, len(padding))


@given(
    orientation=st.integers(1, 8),
    size=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    suffix=st.sampled_from(["png", "tif"]),
)
def test_a_turned_picture_keeps_its_pixels(orientation, size, suffix) -> None:
    pixels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    with folder() as here:
        Image.fromarray(pixels).save(here / f"a.{suffix}", exif=exif)
        found = read_image(here / f"a.{suffix}").pixels[0]
    expected = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels[::-1].T,
        7: pixels[::-1, ::-1].T,
        8: pixels[:, ::-1].T,
    }[orientation]
    np.testing.assert_array_equal(found, expected)


STARTS = {
    "a.png": b"\x89PNG\r\n\x1a\n",
    "a.jpg": b"\xff\xd8\xff\xe0",
    "a.tif": b"II*\0\x08\0\0\0",
    "a.bmp": b"BM",
    "a.webp": b"RIFF\x40\0\0\0WEBPVP8 ",
    "a.npz": b"PK\x03\x04",
    "a.nii": struct.pack("<I", 348),
    "a.nii.gz": b"\x1f\x8b\x08\0",
    "a.dcm": bytes(128) + b"DICM\x02\0\0\0UL\x04\0",
    "IM0001": b"\x08\0\x05\0CS",
    "a.pth": b"PK\x03\x04",
    "old.pth": b"\x80\x02",
    "a.safetensors": struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"',
}


@pytest.mark.parametrize("name", STARTS)
@given(body=st.binary(max_size=600))
def test_any_bytes_are_one_line(name, body) -> None:
    read = read_checkpoint if name.endswith(("pth", "safetensors")) else read_image
    with folder() as here:
        path = here / name
        path.write_bytes(STARTS[name] + body)
        with contextlib.suppress(DbsamError):
            read(path)
