"""Pictures and the writing of masks; intensities, scans and npz files have their own tests."""

import gzip
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.dicom_series import write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import (
    Volume,
    label_dtype,
    label_map_bytes,
    npz_bytes,
    picture_values,
    png_bytes,
    read_image,
)

HERE = Path("scan")


def test_colour_png_is_read_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    volume = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(volume.slice_rgb(0), pixels)
    assert volume.shape == (1, 7, 11)
    assert not volume.is_volume
    assert volume.files == (tmp_path / "a.png",)
    assert str(volume.intensity) == "0–255 as stored"


def test_grey_png_is_repeated_in_three_channels(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (7, 11), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "A.PNG")
    rgb = read_image(tmp_path / "A.PNG").slice_rgb(0)
    for channel in range(3):
        np.testing.assert_array_equal(rgb[..., channel], pixels)


def test_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), (200, 100, 50))
    image.paste((20, 40, 60), (8, 0, 16, 8))
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    rgb = read_image(tmp_path / "a.jpg").slice_rgb(0).astype(int)
    assert np.abs(rgb[:, :8] - [200, 100, 50]).max() <= 3
    assert np.abs(rgb[:, 8:] - [20, 40, 60]).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_picture_is_turned_upright_and_says_so(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    volume = read_image(tmp_path / f"a.{suffix}")
    assert volume.shape == (1, 16, 8)
    assert volume.slice_rgb(0)[1, 6].min() > 200  # top left goes to top right
    assert volume.slice_rgb(0)[14, 1].max() < 50
    assert "EXIF orientation 6" in str(volume.intensity)


@pytest.mark.parametrize(
    ("orientation", "corners"),
    [
        (1, "abcd"),
        (2, "badc"),
        (3, "dcba"),
        (4, "cdab"),
        (5, "acbd"),
        (6, "cadb"),
        (7, "dbca"),
        (8, "bdac"),
        (9, "abcd"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_exif_orientation(
    tmp_path: Path, orientation: int, corners: str, suffix: str
) -> None:
    """Where the four quarters of a picture (a b / c d) are shown; there is no orientation 9."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    shades = {"a": 10, "b": 80, "c": 150, "d": 220}
    pixels = np.kron(np.array([[10, 80], [150, 220]], np.uint8), np.ones((2, 3), np.uint8))
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    volume = read_image(tmp_path / f"a.{suffix}")
    shown = volume.pixels[0]
    found = [shown[0, 0], shown[0, -1], shown[-1, 0], shown[-1, -1]]
    assert found == [shades[corner] for corner in corners]
    said = f"EXIF orientation {orientation} says" in str(volume.intensity)
    assert said == (2 <= orientation <= 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_grey_values_of_a_tiff_are_kept(tmp_path: Path, dtype: type) -> None:
    values = np.linspace(-1000, 70000, 48).reshape(6, 8).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    volume = read_image(tmp_path / "a.tif", window=(0, 2000))
    assert volume.kind == "picture"
    expected = np.clip((values + 1000) / 2000, 0, 1) * 255
    np.testing.assert_allclose(volume.pixels[0], expected, rtol=0, atol=1)


@pytest.mark.parametrize("suffix", ["tif", "bmp", "webp"])
def test_other_pictures(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    pixels = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}").slice_rgb(0), pixels)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_several_pages_or_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]
    pages[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="2 pages or frames"):
        read_image(tmp_path / f"a.{suffix}")


def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.npz")
    (tmp_path / "b.nii").symlink_to(os.devnull)
    for name, kind in (("a.png", "FIFO"), ("a.npz", "FIFO"), ("b.nii", "device")):
        with pytest.raises(InputError, match=f"is a {kind}: expected a regular file"):
            read_image(tmp_path / name)


def test_a_picture_in_memory_has_the_values_of_its_file(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png_bytes(pixels))) as image:
        values, notes = picture_values(image)
    np.testing.assert_array_equal(values, pixels)
    assert notes == ()


def test_transparency_is_laid_over_black(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, [[0, 255], [128, 255]]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    volume = read_image(tmp_path / "a.png")
    assert volume.slice_rgb(0)[..., 0].tolist() == [[0, 200], [100, 200]]
    assert "transparency over black" in str(volume.intensity)


@pytest.mark.parametrize(("mode", "transparency"), [("LA", False), ("P", True), ("P", False)])
def test_palettes_and_grey_with_alpha(tmp_path: Path, mode: str, transparency: bool) -> None:
    image = Image.new("RGB", (4, 3), (10, 10, 10))
    image.putpixel((1, 2), (250, 250, 250))
    keep = {"transparency": 250} if transparency else {}
    image.convert("L").convert(mode).save(tmp_path / "a.png", **keep)
    rgb = read_image(tmp_path / "a.png").slice_rgb(0)
    assert rgb.shape == (3, 4, 3)
    assert rgb[2, 1].tolist() in ([250] * 3, [0] * 3)
    assert (rgb[2, 1] == 0).all() == transparency
    assert (rgb[0] == 10).all()


def test_black_and_white_png(tmp_path: Path) -> None:
    bits = np.array([[True, False], [False, True]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").pixels[0].tolist() == [[255, 0], [0, 255]]


def test_16_bit_grey_png_uses_percentiles_or_the_window(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = rng.integers(1, 4096, (40, 50)).astype(np.uint16)
    pixels[:5] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    volume = read_image(tmp_path / "a.png")
    low, high = np.percentile(pixels[pixels > 0], [0.5, 99.5])
    expected = ((np.clip(pixels, low, high) - low) / (high - low) * 255).astype(np.uint8)
    expected[pixels == 0] = 0
    assert np.abs(volume.pixels[0].astype(int) - expected).max() <= 1
    assert "0.5–99.5 percentile of non-zero voxels" in str(volume.intensity)
    windowed = read_image(tmp_path / "a.png", window=(2000, 1000))
    assert (windowed.pixels[0][pixels <= 1500] == 0).all()
    assert (windowed.pixels[0][pixels >= 2500] == 255).all()
    assert "window level 2000 width 1000 (1500 to 2500)" in str(windowed.intensity)


def test_16_bit_colour_png_says_what_is_lost(tmp_path: Path) -> None:
    # Pillow cannot write 16-bit colour, so the file is put together by hand.
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0x8000, 0x7FFF, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    volume = read_image(tmp_path / "a.png")
    assert volume.slice_rgb(0).tolist() == [[[0x12, 0xFF, 0x00], [0x80, 0x7F, 0x00]]]
    assert "high byte of 16-bit colour" in str(volume.intensity)


@pytest.mark.parametrize("size", [(9000, 9000), (20000, 20000)])
def test_a_picture_too_large_is_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    # One announces more pixels than we accept, one more than Pillow itself does.
    import struct
    import zlib

    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    (tmp_path / "a.png").write_bytes(bytes(content))
    with pytest.raises(InputError, match="more than 67108864 pixels"):
        read_image(tmp_path / "a.png")


def test_broken_pictures_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    good = png_bytes(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    path = tmp_path / "a.png"
    for broken in (good[:-2000], good[:20], b"", b"GIF89a" + good[6:], b"text"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="not a readable PNG, JPEG"):
            read_image(path)


def test_a_picture_of_another_format_is_not_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    with pytest.raises(InputError, match="not a readable PNG, JPEG"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["nothing.png", "nothing", "x" * 5000 + ".png", "a\0b.png"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / name)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"BM")
    with pytest.raises(InputError, match="unknown kind of file"):
        read_image(tmp_path / "a.gif")


def test_an_npz_gives_its_pixels_boxes_and_spacing(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    imgs = np.linspace(0, 4000, 60).reshape(3, 4, 5).astype(np.int16)
    boxes, spacing = np.array([[1, 0, 0, 3, 2, 1]]), np.array([2.5, 0.7, 0.8])
    np.savez(path, imgs=imgs, boxes=boxes, spacing=spacing)
    volume = read_image(path, window=(2000, 2000))
    assert (volume.kind, volume.path, volume.files) == ("npz", path, (path,))
    assert (volume.shape, volume.is_volume, volume.geometry) == ((3, 4, 5), True, None)
    assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.8))
    assert volume.boxes.tolist() == [[1, 0, 0, 3, 2, 2]]  # half-open
    expected = np.clip((imgs - 1000) / 2000, 0, 1) * 255
    np.testing.assert_allclose(volume.pixels, expected, rtol=0, atol=1)
    assert "level 2000 width 2000" in str(volume.intensity)
    assert read_image(path, with_boxes=False).boxes is None


@pytest.mark.parametrize("name", ["a.nii", "A.NII.GZ"])
def test_a_nifti_gives_its_pixels_and_takes_a_label_map(tmp_path: Path, name: str) -> None:
    nib = pytest.importorskip("nibabel")
    stored = np.linspace(-1000, 1000, 60).reshape(5, 4, 3).astype(np.int16)
    nib.save(nib.Nifti1Image(stored, np.diag([0.8, 0.7, 2.5, 1])), tmp_path / name.lower())
    path = (tmp_path / name.lower()).rename(tmp_path / name)
    volume = read_image(path, window=(0, 1000))
    assert (volume.kind, volume.path, volume.files) == ("nifti", path, (path,))
    assert (volume.boxes, volume.notes) == (None, ())
    assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.8))
    expected = np.clip((stored + 500) / 1000, 0, 1).transpose(2, 1, 0) * 255
    np.testing.assert_allclose(volume.pixels, expected, rtol=0, atol=1)
    with pytest.raises(InputError, match=rf"{name}.*window"):
        read_image(path, window=(5000, 10))  # all black
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    plain = label_map_bytes(labels, volume, compressed=False)
    assert gzip.decompress(label_map_bytes(labels, volume)) == plain
    back = nib.Nifti1Image.from_bytes(plain)
    np.testing.assert_array_equal(np.asarray(back.dataobj), labels.transpose(2, 1, 0))
    np.testing.assert_allclose(back.affine, np.diag([0.8, 0.7, 2.5, 1]), rtol=1e-6)


WINDOWS = [
    (None, (-160, 240), "soft-tissue window level 40 width 400 HU"),
    ((0, 100), (-50, 50), "level 0 width 100"),
    ("file", (300, 500), "the file's own window level 400.5 width 201"),
]
"""What is asked for, the values that become black and white, and what is said of it."""


@pytest.mark.parametrize(("window", "ends", "said"), WINDOWS)
@pytest.mark.parametrize("name", ["ct", "ct.dcm", "CT.DICOM", "ct0001"])
def test_a_ct_in_dicom_is_shown_by_the_window_that_it_says(
    tmp_path: Path, window: object, ends: tuple[int, int], said: str, name: str
) -> None:
    pytest.importorskip("pydicom")
    values = np.linspace(-900, 900, 60 if name == "ct" else 20).reshape(-1, 4, 5).astype(int)
    more = {"WindowCenter": "400.5", "WindowWidth": "201"}
    files = write_dicom_series(tmp_path / "ct", values, **more)
    path = tmp_path / "ct" if name == "ct" else files[0].rename(tmp_path / name)
    volume = read_image(path, window=window)
    assert (volume.kind, volume.path, volume.boxes) == ("dicom", path, None)
    assert volume.files == (tuple(files) if name == "ct" else (path,))
    assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.8))
    expected = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255
    np.testing.assert_allclose(volume.pixels, expected, rtol=0, atol=1)
    assert 0 < (volume.pixels == 0).mean() < 1
    assert said in str(volume.intensity)


def test_where_the_lowest_value_is_white_the_picture_is_inverted(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    values = np.linspace(-900, 900, 60).reshape(3, 4, 5).astype(int)
    write_dicom_series(tmp_path / "ct", values, PhotometricInterpretation="MONOCHROME1")
    volume = read_image(tmp_path / "ct", window=(0, 1000))
    expected = 255 - np.clip((values + 500) / 1000, 0, 1) * 255
    np.testing.assert_allclose(volume.pixels, expected, rtol=0, atol=1)
    assert volume.intensity.is_inverted


def test_one_of_several_series_is_taken_by_uid_or_number(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    for number, value in ((3, 100), (4, -100)):
        values = np.full((2, 4, 5), value)
        values[:, 0] += 50
        write_dicom_series(tmp_path / f"ct/{number}", values, SeriesNumber=number)
    with pytest.raises(InputError, match="2 DICOM series"):
        read_image(tmp_path / "ct")
    for series in (3, "3"):
        volume = read_image(tmp_path / "ct", series=series, window=(0, 400))
        assert volume.pixels[0, 1, 0] == pytest.approx(191, abs=1)
    assert read_image(tmp_path / "ct", series=4, window=(0, 400)).pixels[0, 1, 0] < 70


@pytest.mark.parametrize("name", ["a.dcm", "A.DICOM"])
def test_a_file_that_is_called_dicom_and_is_none(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pydicom")
    (tmp_path / name).write_text("no DICOM at all")
    with pytest.raises(InputError, match=rf"{name} is not DICOM"):
        read_image(tmp_path / name)


def test_options_of_one_kind_of_file_are_refused_for_another(tmp_path: Path) -> None:
    picture, series = tmp_path / "a.png", tmp_path / "ct"
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(picture)
    series.mkdir()
    for path, options, message in (
        (picture, {"window": "file"}, r"window 'file': .*a\.png is no DICOM; expected \(level"),
        (picture, {"series": 3}, r"series 3: .*a\.png is no DICOM"),
        (picture, {"volume": 1}, r"volume 1: .*a\.png is no NIfTI"),
        (series, {"volume": 0}, r"volume 0: .*ct is no NIfTI"),
        (series, {"window": "lung"}, r"window 'lung': expected \(level, width\) or \"file\""),
    ):
        with pytest.raises(InputError, match=message):
            read_image(path, **options)


def test_label_types() -> None:
    assert label_dtype(255) is np.uint8
    assert label_dtype(256) is label_dtype(65535) is np.uint16
    with pytest.raises(InputError, match="65535"):
        label_dtype(65536)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_label_maps_keep_their_values(rng: np.random.Generator, dtype: type) -> None:
    labels = rng.integers(0, np.iinfo(dtype).max + 1, (9, 8)).astype(dtype)
    with Image.open(io.BytesIO(png_bytes(labels))) as image:
        np.testing.assert_array_equal(np.asarray(image), labels)


def test_npz_bytes(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 9, (3, 4, 5)).astype(np.uint16)
    with np.load(io.BytesIO(npz_bytes(segs=labels)), allow_pickle=False) as back:
        assert back.files == ["segs"]
        np.testing.assert_array_equal(back["segs"], labels)


def test_nifti_needs_a_geometry() -> None:
    volume = Volume(HERE, "npz", np.zeros((2, 3, 4), np.uint8), STORED)
    with pytest.raises(InputError, match=r"scan: it has no position.*--format npz"):
        label_map_bytes(np.zeros((2, 3, 4), np.uint8), volume)
    uneven = replace(volume, unplaced="lie unevenly")
    with pytest.raises(InputError, match="its slices lie unevenly and form no straight grid"):
        label_map_bytes(np.zeros((2, 3, 4), np.uint8), uneven)
