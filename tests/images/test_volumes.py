"""Pictures and the writing of masks; intensities, scans and npz files have their own tests."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import (
    Volume,
    label_dtype,
    label_map_bytes,
    npz_bytes,
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


def test_label_types() -> None:
    assert label_dtype(255) is np.uint8
    assert label_dtype(256) is np.uint16
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
    with pytest.raises(InputError, match="--mask-format npz"):
        label_map_bytes(np.zeros((2, 3, 4), np.uint8), volume)
