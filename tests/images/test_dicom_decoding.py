"""Compressed DICOM: every decoder of the extra `dicom` on a file made here, or pydicom's own."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.dicom_series import edit, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError, MissingError
from dbsam_deploy.extras import pip_line
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.dicom_decoding import coded_size

pydicom = pytest.importorskip("pydicom")
from pydicom.encaps import encapsulate, encapsulate_extended  # noqa: E402
from pydicom.pixels import get_decoder  # noqa: E402
from pydicom.uid import UID  # noqa: E402

RAMP = np.add.outer(np.arange(40) * 50, np.arange(48) * 40)  # 12 bits
LOSSLESS = {
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}


def compressed(folder: Path, syntax: str) -> Path:
    (file,) = write_dicom_series(folder, RAMP[None], intercept=0, BitsStored=12, HighBit=11)
    dataset = pydicom.dcmread(file)
    dataset.compress(UID(syntax))
    dataset.save_as(file)
    return file


def recoded(folder: Path, syntax: str, frame: bytes, **values: object) -> Path:
    """A file whose one frame was compressed elsewhere."""
    (file,) = write_dicom_series(folder, RAMP[None], intercept=0)
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(file)
    return file


def by_gdcm(gdcm: Any, file: Path, kind: int) -> None:
    """Compress a file by GDCM, in place."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(kind))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_kinds_are_exact(tmp_path: Path, kind: str) -> None:
    np.testing.assert_array_equal(read_dicom(compressed(tmp_path, LOSSLESS[kind])).values[0], RAMP)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"])
def test_lossless_jpeg_is_exact(tmp_path: Path, syntax: str) -> None:
    gdcm = pytest.importorskip("gdcm")
    (file,) = write_dicom_series(tmp_path, RAMP[None], intercept=0, BitsStored=12, HighBit=11)
    kinds = {
        "57": gdcm.TransferSyntax.JPEGLosslessProcess14,
        "70": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    }
    by_gdcm(gdcm, file, kinds[syntax[-2:]])
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_dicom(file).values[0], RAMP)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_jpeg_of_twelve_bits(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The value is the one that pydicom's own tests expect of the file."""
    pytest.importorskip("gdcm")
    path = Path(pydicom.__file__).parent / "data" / "test_files" / name
    scan = read_dicom(path)
    assert scan.values.shape == (1, 1024, 256)
    assert scan.values[0, 420, 140] == 244
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm"),
    ],
)
def test_files_of_others(name: str, plain: str) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    found, expected = read_dicom(folder / name).values, read_dicom(folder / plain).values
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)


@pytest.mark.parametrize("last", [201, 202, 203])
def test_a_high_throughput_codestream(tmp_path: Path, last: int) -> None:
    """`RAMP` by OpenJPH: `imagecodecs.htj2k_encode(RAMP.astype("uint16"), reversible=True)`."""
    code = (Path(__file__).parent / "codestreams" / "ramp.j2c").read_bytes()
    assert int.from_bytes(code[6:8], "big") & 0x4000  # the codestream says that it is HTJ2K
    syntax = f"1.2.840.10008.1.2.4.{last}"
    assert get_decoder(UID(syntax)).available_plugins == ("pylibjpeg",)
    file = recoded(tmp_path, syntax, code)
    np.testing.assert_array_equal(read_dicom(file).values[0], RAMP)
    edit(file, Rows=4, Columns=4)
    with pytest.raises(InputError, match=r"says 4×4 pixels, the compressed image 40×48"):
        read_dicom(file)
    for cut in (30, 150, 320):
        recoded(tmp_path, syntax, code[:-cut])
        with pytest.raises(InputError, match=file.name):
            read_dicom(file)


def test_jpeg_of_twelve_bits_with_a_sign(tmp_path: Path) -> None:
    gdcm = pytest.importorskip("gdcm")
    (file,) = write_dicom_series(tmp_path, RAMP[None], intercept=0, BitsStored=12, HighBit=11)
    by_gdcm(gdcm, file, gdcm.TransferSyntax.JPEGExtendedProcess2_4)
    np.testing.assert_allclose(read_dicom(file).values[0], RAMP, atol=4)
    edit(file, PixelRepresentation=1)
    signed = np.where(RAMP >= 2048, RAMP - 4096, RAMP)
    np.testing.assert_allclose(read_dicom(file).values[0], signed, atol=4)


def test_baseline_jpeg_in_colour(tmp_path: Path) -> None:
    picture = np.zeros((40, 48, 3), np.uint8)
    picture[:, :24], picture[:, 24:] = (200, 40, 40), (30, 60, 180)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
    file = recoded(
        tmp_path,
        "1.2.840.10008.1.2.4.50",
        stream.getvalue(),
        PhotometricInterpretation="YBR_FULL_422",
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    np.testing.assert_allclose(read_dicom(file).values[0].astype(int), picture, atol=16)


def test_compressed_frames_are_slices(tmp_path: Path) -> None:
    volume = np.stack([RAMP + k for k in range(4)])
    path = write_enhanced(tmp_path / "e.dcm", volume, depths_mm=(4, 0, 2, 6))
    dataset = pydicom.dcmread(path)
    dataset.compress(UID(LOSSLESS["JPEG-LS"]))
    dataset.save_as(path)
    np.testing.assert_array_equal(read_dicom(path).values, volume[[1, 2, 0, 3]])


def test_offsets_in_elements_of_their_own(tmp_path: Path) -> None:
    file = compressed(tmp_path, LOSSLESS["RLE"])
    dataset = pydicom.dcmread(file)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData, offsets, lengths = encapsulate_extended(frames)
    dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = offsets, lengths
    dataset.save_as(file)
    np.testing.assert_array_equal(read_dicom(file).values[0], RAMP)


@pytest.mark.parametrize("kind", ["JPEG-LS", "JPEG 2000"])
def test_an_image_larger_than_the_header_says_is_not_decoded(tmp_path: Path, kind: str) -> None:
    """A few bytes can unpack to gigabytes."""
    file = compressed(tmp_path, LOSSLESS[kind])
    edit(file, Rows=4, Columns=4)
    with pytest.raises(InputError, match=r"says 4×4 pixels, the compressed image 40×48"):
        read_dicom(file)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("cut", [20, 200])
def test_a_cut_file_is_refused(tmp_path: Path, kind: str, cut: int) -> None:
    file = compressed(tmp_path, LOSSLESS[kind])
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(InputError, match=file.name):
        read_dicom(tmp_path)


def test_missing_frames_are_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "e.dcm", np.stack([RAMP] * 3), depths_mm=(0, 2, 4))
    dataset = pydicom.dcmread(path)
    dataset.compress(UID(LOSSLESS["RLE"]))
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=3))
    dataset.PixelData = encapsulate(frames[:2])
    dataset.save_as(path)
    with pytest.raises(InputError, match="2 compressed frames; expected 3"):
        read_dicom(path)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless"),
        ("1.2.840.10008.1.2.4.70", "JPEG Lossless"),
        ("1.2.840.10008.1.2.4.201", "High-Throughput JPEG 2000"),
    ],
)
def test_an_absent_decoder_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, name: str
) -> None:
    file = recoded(tmp_path, syntax, b"\xff\xd8\xff\xd9")
    decoder = get_decoder(UID(syntax))
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(MissingError, match=f"no decoder for {name}") as caught:
        read_dicom(tmp_path)
    assert caught.value.install == pip_line("dicom")
    assert file.name in caught.value.what


def test_pillow_alone_is_no_decoder_for_twelve_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syntax = UID("1.2.840.10008.1.2.4.51")
    decoder = get_decoder(syntax)
    kept = {name: plugin for name, plugin in decoder._available.items() if name == "pillow"}
    monkeypatch.setattr(decoder, "_available", kept)
    recoded(tmp_path, syntax, b"\xff\xd8\xff\xd9", BitsStored=12, HighBit=11)
    with pytest.raises(MissingError, match="no decoder for JPEG Extended"):
        read_dicom(tmp_path)


def test_films_have_no_decoder(tmp_path: Path) -> None:
    recoded(tmp_path, "1.2.840.10008.1.2.4.102", b"\0\0\0\x18ftyp")
    with pytest.raises(InputError, match=r"no decoder for MPEG-4 .*dcmconv"):
        read_dicom(tmp_path)


def test_a_damaged_codestream_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    for kind, syntax in LOSSLESS.items():
        content = compressed(tmp_path / kind, syntax).read_bytes()
        (file,) = (tmp_path / kind).iterdir()
        for _ in range(20):
            damaged = bytearray(content)
            for place in rng.integers(len(content) - 300, len(content), 6):
                damaged[place] = rng.integers(0, 256)
            file.write_bytes(bytes(damaged))
            with contextlib.suppress(InputError):
                read_dicom(file)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("encoded", "size"),
    [
        (b"", None),
        (b"RIFF", None),
        (b"\xff\xd8\xff\xe0\0\x04ab\xff\xc0\0\x0b\x08\x01\x02\x03\x04\x01\x01\x11\0", (258, 772)),
        (b"\xff\xd8\xff\xff\xf7\0\x0b\x10\0\x07\0\x09\x01\x01\x11\0", (7, 9)),
        (b"\xff\xd8\xff\xda\0\x02", None),
        (b"\xff\x4f\xff\x51\0\x29\0\0" + bytes.fromhex("00000009000000070000000200000001"), (6, 7)),
    ],
)
def test_coded_size(encoded: bytes, size: tuple[int, int] | None) -> None:
    assert coded_size(encoded) == size
