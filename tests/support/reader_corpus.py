"""Small good files of every kind that a reader takes: what a fuzz starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.uid import UID
from safetensors.torch import save_file
from support.dicom_series import write_dicom_series, write_enhanced

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
CODESTREAM = Path(__file__).resolve().parents[1] / "images" / "codestreams" / "ramp.j2c"

SHADES = np.add.outer(np.arange(20) * 6, np.arange(24) * 5).astype(np.uint8)
RAMP = np.add.outer(np.arange(40) * 50, np.arange(48) * 40)
DICOM_SYNTAXES = {
    "rle": "1.2.840.10008.1.2.5",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "j2k": "1.2.840.10008.1.2.4.90",
    "deflated": "1.2.840.10008.1.2.1.99",
    "implicit": "1.2.840.10008.1.2",
}


def write_corpus(folder: Path) -> list[Path]:
    """Files and folders with a DICOM series, each good; some kilobytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    _pictures(folder)
    _arrays(folder)
    _scans(folder)
    _dicom(folder)
    _weights(folder)
    if CASES.is_dir():
        for place in sorted(path for path in CASES.rglob("*") if path.is_file()):
            target = folder / f"case_{place.parent.name}_{place.name}"
            if place.suffix != ".md" and place.stat().st_size:
                shutil.copyfile(place, target)
        shutil.copytree(CASES / "oblique_rounded" / "d3_0", folder / "case_series")
    return sorted(folder.iterdir())


def _pictures(folder: Path) -> None:
    colours = np.stack([SHADES, 255 - SHADES, SHADES // 2], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, values, options in (
        ("grey.png", SHADES, {}),
        ("wide.png", RAMP.astype(np.uint16), {}),
        ("turned.png", colours, {"exif": exif}),
        ("a.jpg", colours, {"exif": exif}),
        ("progressive.jpg", colours, {"progressive": True}),
        ("a.bmp", colours, {}),
        ("a.webp", colours, {"lossless": True, "exif": exif}),
        ("lossy.webp", colours, {}),
        ("turned.tif", SHADES, {"exif": exif}),
        ("lzw.tif", colours, {"compression": "tiff_lzw"}),
        ("jpeg.tif", colours, {"compression": "jpeg"}),
        ("wide.tif", RAMP.astype(np.uint16), {"compression": "tiff_adobe_deflate"}),
        ("float.tif", RAMP.astype(np.float32), {}),
        ("fax.tif", SHADES > 90, {"compression": "group4"}),
    ):
        Image.fromarray(values).save(folder / name, **options)
    palette = Image.fromarray(colours).quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    palette.save(folder / "palette.bmp")
    Image.fromarray(colours).convert("CMYK").save(folder / "inks.jpg")
    Image.fromarray(colours).save(
        folder / "camera.jpg", "MPO", save_all=True, append_images=[Image.fromarray(255 - colours)]
    )


def _arrays(folder: Path) -> None:
    stack = np.stack([SHADES, 255 - SHADES, SHADES, SHADES // 2])
    boxes = np.array([[2, 2, 0, 9, 9, 2], [4, 4, 1, 12, 12, 3]])
    labels = (stack > 90).astype(np.uint8)
    named = {"label_ids": np.array([1]), "label_names": np.array(["liver"])}
    np.savez_compressed(
        folder / "stack.npz", imgs=stack, boxes=boxes, spacing=np.ones(3), gts=labels, **named
    )
    np.savez(folder / "plain.npz", imgs=RAMP.astype(np.float32), boxes=boxes[:, [0, 1, 3, 4]])


def _scans(folder: Path) -> None:
    stored = np.stack([RAMP, RAMP // 2, RAMP // 3]).transpose(2, 1, 0)
    affine = np.diag([-0.8, -0.7, 2.5, 1])
    affine[:3, 3] = (10, 20, -30)
    for name, kind, dtype in (
        ("a.nii", nibabel.Nifti1Image, np.int16),
        ("a.nii.gz", nibabel.Nifti1Image, np.int16),
        ("float.nii.gz", nibabel.Nifti2Image, np.float32),
    ):
        nibabel.save(kind(stored.astype(dtype), affine), folder / name)


def _dicom(folder: Path) -> None:
    write_dicom_series(folder / "series", np.stack([RAMP, RAMP // 2, RAMP // 3, RAMP // 4]))
    enhanced = write_enhanced(folder / "enhanced.dcm", np.stack([RAMP] * 3), depths_mm=(0, 2, 4))
    for name, syntax in DICOM_SYNTAXES.items():
        (file,) = write_dicom_series(
            folder / f"{name}.folder", RAMP[None], intercept=0, BitsStored=12, HighBit=11
        )
        dataset = dcmread(file)
        if name in ("deflated", "implicit"):
            dataset.file_meta.TransferSyntaxUID = UID(syntax)
        else:
            dataset.compress(UID(syntax))
        dataset.save_as(
            folder / f"{name}.dcm",
            enforce_file_format=True,
            **({"implicit_vr": name == "implicit", "little_endian": True}),
        )
        shutil.rmtree(folder / f"{name}.folder")
    dataset = dcmread(enhanced)
    dataset.compress(UID(DICOM_SYNTAXES["jpegls"]))
    dataset.save_as(folder / "frames.dcm")
    _high_throughput(folder)


def _high_throughput(folder: Path) -> None:
    from pydicom.encaps import encapsulate

    dataset = dcmread(folder / "implicit.dcm")
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.201")
    dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.PixelData = encapsulate([CODESTREAM.read_bytes()])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(folder / "htj2k.dcm", implicit_vr=False, little_endian=True)


def _weights(folder: Path) -> None:
    tensors = {
        "a.weight": torch.arange(60.0).reshape(12, 5),
        "b.bias": torch.arange(7).half(),
        "c.num_batches_tracked": torch.tensor(3),
    }
    torch.save({"model": tensors, "epoch": 3}, folder / "a.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, folder / "a.safetensors")
