"""Pictures as cameras, scanners and microscopes write them: the right pixels, or one line."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.images.volumes import read_image

RAMP = (np.arange(20 * 30).reshape(20, 30) * 100).astype(np.uint16)
SHADES = (np.add.outer(np.arange(20) * 6, np.arange(30) * 4)).astype(np.uint8)
COLOURS = np.stack([SHADES, 255 - SHADES, SHADES // 2], axis=-1)


def tiff(path: Path, values: np.ndarray, photometric: int, *, kind: int = 1) -> Path:
    """A grey TIFF of one strip, put together by hand: Pillow writes no white of 0."""
    data, bits = values.tobytes(), values.dtype.itemsize * 8
    (height, width), at = values.shape, 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, at)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, at + len(data))
    path.write_bytes(start + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("dtype", ["<u2", "<i2", "<i4", "<f4"])
def test_tiff_of_wide_numbers(tmp_path: Path, dtype: str) -> None:
    kind = {"u": 1, "i": 2, "f": 3}[dtype[1]]
    path = tiff(tmp_path / "a.tif", (RAMP // 2).astype(dtype), 1, kind=kind)
    volume = read_image(path, window=(1000, 2000))
    expected = (np.clip(RAMP // 2, 0, 2000) / 2000 * 255).astype(np.uint8)
    np.testing.assert_array_equal(volume.pixels[0], expected)
    assert read_image(path).intensity.how == "percentiles"


def test_tiff_in_which_0_is_white(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", SHADES, 0)
    np.testing.assert_array_equal(read_image(path).pixels[0], 255 - SHADES)
    tiff(path, RAMP, 0)
    with pytest.raises(InputError, match="0 is white: invert it first"):
        read_image(path)
    Image.fromarray(SHADES > 100).save(path, compression="group4")  # a fax has white paper, too
    np.testing.assert_array_equal(read_image(path).pixels[0], (SHADES > 100) * np.uint8(255))


def with_other_tag(path: Path, tag: int, before: int, after: int) -> Path:
    """The TIFF, one of whose tags has another value."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", tag, 4, 1, before))
    content[at + 8 : at + 12] = struct.pack("<I", after)
    path.write_bytes(content)
    return path


def test_a_tiff_without_all_of_its_strips(tmp_path: Path) -> None:
    """Pillow leaves what is missing black."""
    path = with_other_tag(tiff(tmp_path / "a.tif", SHADES, 1), 257, 20, 50_000)
    with pytest.raises(InputError, match="of which its strips hold 600: the file is damaged"):
        read_image(path)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(COLOURS).save(path, compression=compression)
    np.testing.assert_array_equal(read_image(path).pixels[0], COLOURS)
    Image.fromarray(RAMP).save(path, compression=compression)
    assert read_image(path).intensity.high > 50_000


@pytest.mark.parametrize("values", [SHADES, RAMP // 300, COLOURS], ids=["8", "16", "colour"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_turned_tiff_has_its_own_pixels(
    tmp_path: Path, values: np.ndarray, compression: str
) -> None:
    """Pillow 13 maps plain grey ones into memory with their width for their height."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path, exif=exif, compression=compression)
    expected = np.rot90(values, -1)
    window = None if values.dtype == np.uint8 else (100, 200)
    if window:
        expected = (expected / 200 * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path, window=window).pixels[0], expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_volume(image, window=window).pixels[0], expected)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_become_colours(tmp_path: Path, suffix: str) -> None:
    """CMYK: JPEG stores the inks inverted, as Adobe began to."""
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / f"a.{suffix}", quality=95)
    found = read_image(tmp_path / f"a.{suffix}").pixels[0]
    np.testing.assert_allclose(found.astype(int), COLOURS, atol=12)


def test_a_camera_s_second_picture_is_left_out(tmp_path: Path) -> None:
    first, second = Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    found = read_image(tmp_path / "a.jpg").pixels[0]
    np.testing.assert_allclose(found.astype(int), COLOURS, atol=12)


def test_colours_of_16_bits_in_tiff_are_refused(tmp_path: Path) -> None:
    path = with_other_tag(tiff(tmp_path / "a.tif", RAMP[:, :30], 2), 277, 1, 3)
    with pytest.raises(InputError, match="not a readable PNG, JPEG, TIFF"):
        read_image(path)


def test_other_pixels_under_the_old_checksum_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(SHADES).save(path)
    content = path.read_bytes()
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at], "big")
    rows = bytearray(zlib.decompress(content[at + 4 : at + 4 + length]))
    rows[100] ^= 1
    body = zlib.compress(bytes(rows))
    size = len(body).to_bytes(4, "big")
    path.write_bytes(content[: at - 4] + size + b"IDAT" + body + content[at + 4 + length :])
    with pytest.raises(InputError, match="not a readable PNG"):
        read_image(path)


@pytest.mark.parametrize("level", [0, 6])  # 0: pixels stand there as they are
def test_a_flipped_bit_of_a_png_is_found(
    tmp_path: Path, rng: np.random.Generator, level: int
) -> None:
    """Each chunk has a checksum, which Pillow does not compare for pixels."""
    path = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(path, compress_level=level)
    content = path.read_bytes()
    refused = 0
    for _ in range(60):
        broken = bytearray(content)
        broken[rng.integers(8, len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            found = read_image(path).pixels[0]
        except InputError:
            refused += 1
        else:  # within the empty chunk at the end
            np.testing.assert_array_equal(found, COLOURS)
    assert refused > 40


FILES: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "a.png": (COLOURS, {}),
    "a.jpg": (COLOURS, {"quality": 95}),
    "a.bmp": (COLOURS, {}),
    "a.webp": (COLOURS, {"lossless": True}),
    "lossy.webp": (COLOURS, {"quality": 90}),
    "a.tif": (COLOURS, {}),
    "lzw.tif": (COLOURS, {"compression": "tiff_lzw"}),
    "deflate.tif": (COLOURS, {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": (COLOURS, {"compression": "jpeg"}),
    "wide.tif": (RAMP, {}),
    "fax.tif": (SHADES > 100, {"compression": "group4"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_that_was_cut_short(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    """One line, without words of Pillow or libtiff beside it; where no pixel is lost, the picture.

    What is lost then is the padding of a BMP, the last chunk of a PNG or TIFF's end of the list.
    """
    values, options = FILES[name]
    path = tmp_path / name
    Image.fromarray(values).save(path, **options)
    content, whole = path.read_bytes(), read_image(path).pixels
    refusals = []
    for length in {*range(0, len(content), max(1, len(content) // 40)), *range(-12, 0)}:
        path.write_bytes(content[:length])
        try:
            found = read_image(path).pixels
        except InputError as error:
            refusals.append(str(error))
        else:
            np.testing.assert_array_equal(found, whole)
    assert len(refusals) > 30
    assert all(name in text and "\n" not in text for text in refusals)
    assert capfd.readouterr() == ("", "")
    assert not recwarn
