"""npz files: shapes, boxes, and files made to run code or fill the memory."""

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images import npz_files, scans
from dbsam_deploy.images.npz_files import read_label_names, read_npz
from dbsam_deploy.images.scans import MAX_VOXELS


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 7), (1, 9, 7)),
        ((9, 4), (1, 9, 4)),
        ((9, 7, 3), (1, 9, 7, 3)),
        ((1, 9, 7), (1, 9, 7)),
        ((1, 9, 7, 3), (1, 9, 7, 3)),
        ((6, 9, 7), (6, 9, 7)),
        ((6, 9, 7, 3), (6, 9, 7, 3)),
    ],
)
def test_shapes_of_imgs(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    imgs = rng.integers(0, 256, shape, dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", imgs=imgs)
    values = read_npz(tmp_path / "a.npz").values
    np.testing.assert_array_equal(values, imgs.reshape(expected))
    assert values.shape == expected


@pytest.mark.parametrize("shape", [(9, 7, 4), (9, 7, 1), (9, 7, 2), (2, 9, 7, 4), (9,), (), (0, 7)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz")


def test_boxes_and_spacing(tmp_path: Path) -> None:
    imgs, boxes = np.zeros((9, 8, 3), np.uint8), np.array([[1, 2, 5, 6], [0, 0, 8, 9]])
    np.savez(tmp_path / "a.npz", imgs=imgs, boxes=boxes)
    content = read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(content.boxes, boxes)
    assert content.spacing_mm is None
    assert read_npz(tmp_path / "a.npz", with_boxes=False).boxes is None


def test_boxes_of_a_volume_become_half_open(tmp_path: Path) -> None:
    boxes = np.array([[1, 2, 0, 5, 6, 3], [1, 2, 2, 5, 6, 5], [1, 2, 2, 5, 6, 6]])
    spacing = np.array([5, 0.7, 0.8], np.float32)
    np.savez(tmp_path / "a.npz", imgs=np.zeros((6, 9, 8), np.uint8), boxes=boxes, spacing=spacing)
    content = read_npz(tmp_path / "a.npz")
    # z_max names the last slice; only a file's z_max = D can already be the end
    np.testing.assert_array_equal(content.boxes[:, 5], [4, 6, 6])
    np.testing.assert_array_equal(content.boxes[:, :5], boxes[:, :5])
    assert content.spacing_mm == pytest.approx((5, 0.7, 0.8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"boxes": np.zeros((2, 5))}, "boxes float64"),
        ({"boxes": np.zeros(4)}, "boxes float64"),
        ({"boxes": np.array([["a"] * 4])}, "boxes <U1"),
        ({"boxes": np.zeros((1, 6))}, "boxes float64"),  # a 3D box in a 2D file
        ({"boxes": np.zeros((1_000_000, 4))}, "at most"),
        ({"spacing": np.zeros(3)}, "spacing"),
        ({"spacing": np.ones(2)}, "spacing"),
        ({"spacing": np.array([1, np.nan, 1])}, "spacing"),
        ({"spacing": np.array([1, np.inf, 1])}, "spacing"),
        ({"spacing": np.ones(10_000)}, "at most"),
    ],
)
def test_unusable_boxes_and_spacing(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez_compressed(tmp_path / "a.npz", imgs=np.zeros((9, 8), np.uint8), **arrays)
    with pytest.raises(InputError, match=message):
        read_npz(tmp_path / "a.npz")


def test_without_imgs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((9, 8), np.uint8))
    with pytest.raises(InputError, match=r"no array `imgs` among \['image.npy'\]"):
        read_npz(tmp_path / "a.npz")


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["imgs", "boxes", "spacing"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    hostile = np.array([Payload(trap)], object)
    pickle.loads(pickle.dumps(Payload(trap))).close()  # noqa: S301 - shows that the trap works
    assert trap.exists()
    trap.unlink()
    arrays = {"imgs": np.zeros((9, 8), np.uint8), name: hostile}
    np.savez(tmp_path / "a.npz", **arrays)
    assert not trap.exists()
    with pytest.raises(InputError, match=f"{name} holds pickled Python objects"):
        read_npz(tmp_path / "a.npz")
    assert not trap.exists()


def test_a_pickle_under_the_name_of_an_npz(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(InputError, match="not a readable npz"):
        read_npz(tmp_path / "a.npz")
    assert not trap.exists()


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def zip_bomb(path: Path, shape: tuple[int, ...], zeros: int) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("imgs.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(npy_header(shape))
        block = bytes(1 << 24)
        for _ in range(zeros // len(block)):
            stream.write(block)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    depth = MAX_VOXELS // (1 << 20) + 16
    zip_bomb(tmp_path / "a.npz", (depth, 1024, 1024), depth << 20)
    assert (tmp_path / "a.npz").stat().st_size < 8 << 20
    tracemalloc.start()
    with pytest.raises(InputError, match="at most"):
        read_npz(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("shape", [(4, 4), (1 << 40, 1 << 40), (-1, 4), (1 << 14, 1 << 14)])
def test_a_header_that_lies_about_the_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    zip_bomb(tmp_path / "a.npz", shape, 1 << 24)
    with pytest.raises(InputError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz")


def test_an_encrypted_or_damaged_archive(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, imgs=rng.integers(0, 256, (40, 40), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    damaged = content.copy()
    damaged[500] ^= 1  # a pixel: the zip's checksum no longer fits
    encrypted = content.copy()
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    for broken in (damaged, encrypted, content[:-40], b"", b"PK\x05\x06"):
        path.write_bytes(bytes(broken))
        with pytest.raises(InputError, match="not a readable npz"):
            read_npz(path)


@pytest.mark.parametrize("beside", ["gts", "spacing", ""])
def test_three_planes_are_slices_only_where_the_file_says_so(tmp_path, beside):
    planes = np.arange(3 * 8 * 9, dtype=np.uint8).reshape(3, 8, 9)
    more = {"gts": planes % 2, "spacing": np.ones(3)}
    path = tmp_path / "planes.npz"
    np.savez(path, imgs=planes, **{key: more[key] for key in more if key == beside})
    if beside:
        np.testing.assert_array_equal(read_npz(path).values, planes)
    else:
        with pytest.raises(InputError, match="its channels first or three slices"):
            read_npz(path)


def test_wide_numbers_count_as_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shape = tmp_path / "a.npz", (2, 100, 100)
    monkeypatch.setattr(scans, "MAX_VOLUME_BYTES", 50_000)
    np.savez_compressed(path, imgs=np.zeros(shape, np.uint8))
    assert read_npz(path).values.shape == shape
    for dtype in ("<f8", "<U4", "|V16"):
        np.savez_compressed(path, imgs=np.zeros(shape, dtype))
        with pytest.raises(InputError, match="at most 50000 bytes are read"):
            read_npz(path)


@pytest.mark.parametrize(
    ("name", "limit", "array"),
    [
        ("boxes", "MAX_BOXES_BYTES", np.zeros((9, 4))),
        ("spacing", "MAX_SPACING_BYTES", np.ones(3)),
        ("label_ids", "MAX_NAMES_BYTES", np.arange(9)),
    ],
)
def test_what_lies_beside_images_has_a_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: str, array: np.ndarray
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, imgs=np.zeros((8, 9), np.uint8), **{name: array})
    monkeypatch.setattr(npz_files, limit, 20)
    read = read_label_names if name.startswith("label") else read_npz
    with pytest.raises(InputError, match=f"{name} has {array.nbytes} bytes; at most 20 are read"):
        read(path)
