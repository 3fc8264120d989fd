"""Stored values of DICOM → values with a meaning: padding, LUTs, rescale, windows, colours."""

from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images import scans
from dbsam_deploy.images.dicom import read_dicom

pydicom = pytest.importorskip("pydicom")


def write_one(folder: Path, stored: np.ndarray, **values: object) -> Path:
    """One slice of stored values with further elements."""
    (file,) = write_dicom_series(folder, stored[None], intercept=0, **values)
    return file


@pytest.mark.parametrize("value", [63536, -2000])
@pytest.mark.parametrize("signed", [0, 1])
def test_padding_is_known_by_its_stored_value(tmp_path: Path, value: int, signed: int) -> None:
    """Files write the sign of this element and that of their pixels in all ways."""
    stored = np.array([[0, 1000], [63536, 40]])  # 63536 is -2000 in 16 bits
    file = write_one(tmp_path / "ct", stored, RescaleIntercept="-1024", PixelRepresentation=signed)
    dataset = pydicom.dcmread(file)
    vr = "US" if value > 0 else "SS"
    dataset.add_new("PixelPaddingValue", vr, value)
    dataset.save_as(file)
    scan = read_dicom(file)
    np.testing.assert_array_equal(scan.padding, [[[False, False], [True, False]]])
    assert scan.values[0, 0].tolist() == [-1024, -24]


def test_padding_may_be_a_range(tmp_path: Path) -> None:
    file = write_one(
        tmp_path / "ct",
        np.array([[0, 5], [10, 11]]),
        PixelPaddingValue=10,
        PixelPaddingRangeLimit=5,
    )
    np.testing.assert_array_equal(read_dicom(file).padding, [[[False, True], [True, False]]])


def test_without_padding_there_is_no_mask(tmp_path: Path) -> None:
    file = write_one(tmp_path / "ct", np.array([[0, 5]]), PixelPaddingValue=9)
    assert read_dicom(file).padding is None


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    """As PET has it."""
    files = write_dicom_series(tmp_path / "ct", np.full((3, 2, 2), 10), intercept=0)
    for index, file in enumerate(files):
        edit(file, RescaleSlope=str(index + 0.5), RescaleIntercept=str(-index), Modality="PT")
    scan = read_dicom(tmp_path / "ct")
    assert scan.values[:, 0, 0].tolist() == [5, 14, 23]
    assert not scan.is_ct


def test_a_modality_lut_is_applied(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4, 1, 16])
    table.LUTData = np.array([100, 300, 700, 1500], "<u2").tobytes()
    table.ModalityLUTType = "US"
    file = write_one(tmp_path / "ct", np.array([[0, 1, 2], [3, 4, 9]]))
    edit(file, ModalityLUTSequence=[table], RescaleSlope=None, RescaleIntercept=None)
    assert read_dicom(file).values[0].tolist() == [[100, 100, 300], [700, 1500, 1500]]


def test_bits_above_the_stored_ones_are_no_values(tmp_path: Path) -> None:
    """Old files keep overlays there."""
    stored = np.array([[0x8123, 0x0FFF], [0x4000, 0x0001]])
    file = write_one(tmp_path / "ct", stored, BitsStored=12, HighBit=11)
    assert read_dicom(file).values[0].tolist() == [[0x123, 0xFFF], [0, 1]]
    edit(file, PixelRepresentation=1)
    assert read_dicom(file).values[0].tolist() == [[0x123, -1], [0, 1]]


def test_bytes_stay_bytes(tmp_path: Path) -> None:
    file = write_one(tmp_path / "ct", np.zeros((2, 2), int))
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    edit(file, **eight, PixelData=bytes([0, 128, 254, 255]))
    scan = read_dicom(file)
    assert scan.values.dtype == np.uint8
    assert scan.values.ravel().tolist() == [0, 128, 254, 255]


def test_monochrome1_keeps_its_values(tmp_path: Path) -> None:
    file = write_one(
        tmp_path / "x", np.array([[0, 1], [65535, 7]]), PhotometricInterpretation="MONOCHROME1"
    )
    scan = read_dicom(file)
    assert scan.is_inverted
    assert scan.values[0].tolist() == [[0, 1], [65535, 7]]


@pytest.mark.parametrize(
    ("function", "expected", "text"),
    [
        # PS3.3 C.11.2.1: linear counts the window's ends as values, the exact one as a length.
        (None, [0, 127.5 * 200 / 199, 255], "the file's own window level 800 width 200"),
        ("LINEAR_EXACT", [0, 127.5, 255], "(LINEAR_EXACT)"),
        ("SIGMOID", [255 / (1 + np.exp(4)), 127.5, 255 / (1 + np.exp(-4))], "(SIGMOID)"),
    ],
)
def test_the_own_window(
    tmp_path: Path, function: str | None, expected: list[float], text: str
) -> None:
    file = write_one(
        tmp_path / "x",
        np.array([[600, 800, 1000]]) + 24,
        RescaleIntercept="-24",
        WindowCenter=["800", "3"],
        WindowWidth=["200", "4"],
        **({} if function is None else {"VOILUTFunction": function}),
    )
    scan = read_dicom(file, own_window=True)
    np.testing.assert_allclose(scan.values[0, 0], expected, rtol=1e-5)
    assert text in scan.own_window


def test_the_own_window_may_be_a_table(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [3, 10, 12])
    table.LUTData = np.array([0, 1000, 4095], "<u2").tobytes()
    file = write_one(tmp_path / "x", np.array([[9, 10], [11, 12]]))
    edit(file, VOILUTSequence=[table])
    scan = read_dicom(file, own_window=True)
    np.testing.assert_allclose(scan.values[0], [[0, 0], [1000 / 4095 * 255, 255]], rtol=1e-6)
    assert "VOI LUT" in scan.own_window


def test_each_slice_has_its_own_window(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path / "mr", np.full((2, 2, 2), 100), intercept=0)
    for file, level in zip(files, ("100.5", "50"), strict=True):
        edit(file, WindowCenter=level, WindowWidth="11")
    scan = read_dicom(tmp_path / "mr", own_window=True)
    assert scan.values[:, 0, 0].tolist() == [127.5, 255]
    assert "1 others, each slice its own" in scan.own_window


@pytest.mark.parametrize("values", [{}, {"WindowCenter": "40", "WindowWidth": "0"}])
def test_no_own_window_is_said(tmp_path: Path, values: dict[str, object]) -> None:
    file = write_one(tmp_path / "x", np.array([[0, 5]]), **values)
    with pytest.raises(InputError, match=": give level and width"):
        read_dicom(file, own_window=True)


RGB = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 100, 50]]], np.uint8)


def write_colour(folder: Path, kind: str, pixels: bytes, **values: object) -> Path:
    file = write_one(folder, np.zeros((2, 2), int))
    edit(
        file,
        PhotometricInterpretation=kind,
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=pixels,
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        **values,
    )
    return file


def test_a_photograph(tmp_path: Path) -> None:
    scan = read_dicom(write_colour(tmp_path / "x", "RGB", RGB.tobytes()))
    np.testing.assert_array_equal(scan.values, RGB[None])
    assert scan.geometry is None
    assert scan.spacing_mm is None
    with pytest.raises(InputError, match="a window is for grey images"):
        read_dicom(scan.files[0], own_window=True)


def test_planes_of_colours(tmp_path: Path) -> None:
    planes = RGB.transpose(2, 0, 1).tobytes()
    file = write_colour(tmp_path / "x", "RGB", planes)
    edit(file, PlanarConfiguration=1)
    np.testing.assert_array_equal(read_dicom(file).values[0], RGB)


@pytest.mark.parametrize("kind", ["YBR_FULL", "YBR_FULL_422"])
def test_luminance_and_chroma_become_rgb(tmp_path: Path, kind: str) -> None:
    """By PS3.3 C.7.6.3.1.2; pairs of pixels share their chroma in 422."""
    flat = np.repeat(RGB[:, :1], 2, axis=1)
    red, green, blue = np.moveaxis(flat.astype(float), -1, 0)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [128 + (blue - luminance) * 0.564, 128 + (red - luminance) * 0.713]
    ybr = np.rint(np.stack([luminance, *chroma], axis=-1)).astype(np.uint8)
    if kind == "YBR_FULL_422":
        content = b"".join(bytes([a[0], b[0], a[1], a[2]]) for a, b in ybr)
    else:
        content = ybr.tobytes()
    scan = read_dicom(write_colour(tmp_path / "x", kind, content))
    np.testing.assert_allclose(scan.values[0].astype(int), flat, atol=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_colours(tmp_path: Path, bits: int) -> None:
    file = write_one(tmp_path / "x", np.zeros((1, 3), int))
    edit(
        file,
        PhotometricInterpretation="PALETTE COLOR",
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=bytes([0, 1, 2, 0]),
    )
    dataset = pydicom.dcmread(file)
    columns = {"Red": [9, 20, 255, 1], "Green": [8, 21, 0, 1], "Blue": [7, 22, 128, 1]}
    for name, column in columns.items():
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [4, 0, bits])
        table = np.array(column, f"<u{bits // 8}") * (257 if bits == 16 else 1)
        data = table.astype(f"<u{bits // 8}").tobytes()
        setattr(dataset, f"{name}PaletteColorLookupTableData", data + b"\0" * (len(data) % 2))
    dataset.save_as(file)
    expected = [[[[9, 8, 7], [20, 21, 22], [255, 0, 128]]]]
    assert read_dicom(file).values.tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "pixels are YBR_PARTIAL_420"),
        ({"SamplesPerPixel": 3}, "MONOCHROME2 with 3 samples"),
        ({"BitsAllocated": 64}, "64 bits"),
        ({"BitsAllocated": 1}, "1 bits"),
        ({"Rows": 0}, "no voxel"),
        ({"Rows": 60000, "Columns": 60000}, "60000×60000 pixels; at most"),
        ({"Rows": 3}, "cut short: 8 bytes of pixels, expected 12"),
    ],
)
def test_pixels_that_cannot_be_are_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    file = write_one(tmp_path / "x", np.zeros((2, 2), int), **values)
    dataset = pydicom.dcmread(file)
    if "Rows" in values:
        dataset.Rows = values["Rows"]
    dataset.save_as(file)
    with pytest.raises(InputError, match=message):
        read_dicom(file)


def test_frames_are_counted_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "MAX_VOXELS", 4 * 5 * 9 - 1)
    path = write_enhanced(tmp_path / "e.dcm", np.zeros((4, 5, 9), int), depths_mm=(0, 2, 4, 6))
    with pytest.raises(InputError, match="4 slices of 5×9"):
        read_dicom(path)


def test_several_colour_images_are_refused(tmp_path: Path) -> None:
    for name, depth in (("a", 0), ("b", 2)):
        file = write_colour(tmp_path / name, "RGB", RGB.tobytes(), SeriesInstanceUID="1.2")
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = (
            [0, 0, depth],
            [1, 0, 0, 0, 1, 0],
        )
        dataset.save_as(file)
    with pytest.raises(InputError, match="2 images in colour"):
        read_dicom(tmp_path)
