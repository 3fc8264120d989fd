"""Masks and overlay of one segmentation as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..core.contract import IOU_PREDICTIONS
from ..core.errors import InputError
from ..files.atomic import write_file
from ..images.overlays import Panel, draw_overlay, evenly_spaced
from ..images.scans import require_nibabel
from ..images.volumes import Volume, label_map_bytes, npz_bytes, png_bytes
from .segment import Prompts, Segmentation


def planned_files(volume: Volume, mask_format: str, folder: Path, overlay: bool) -> dict[str, Path]:
    """What will be written: `png`, `npz`, `nifti`, `overlay` → path.

    Raises:
        InputError: a format that cannot hold this volume, or a file that was read as input.
        EngineError: NIfTI without nibabel.
    """
    stem = volume.path.resolve().name
    for suffix in (".nii.gz", ".nii", volume.path.suffix):
        stem = stem.removesuffix(suffix)
    kinds: tuple[str, ...] = (mask_format,)
    if mask_format == "auto":
        if volume.geometry is not None:
            kinds = ("nifti",)
        else:
            kinds = ("npz",) if volume.is_volume else ("png", "npz")
    if "png" in kinds and volume.is_volume:
        raise InputError(f"{volume.path} is a volume: PNG holds one slice; use --mask-format npz")
    if "nifti" in kinds:
        if volume.geometry is None:
            raise InputError(
                f"{volume.path} has no position in space, which NIfTI needs: use --mask-format npz"
            )
        require_nibabel()
    endings = {"png": "_mask.png", "npz": "_mask.npz", "nifti": "_mask.nii.gz"}
    paths = {kind: folder / f"{stem}{endings[kind]}" for kind in kinds}
    if overlay:
        paths["overlay"] = folder / f"{stem}_overlay.png"
    for path in paths.values():
        if path.exists() and any(path.samefile(source) for source in volume.files):
            raise InputError(f"{path} is the input itself: choose another --output folder")
    return paths


def write_results(
    paths: dict[str, Path], volume: Volume, result: Segmentation, prompts: Prompts, note: str
) -> None:
    """Write every planned file, each whole or not at all."""
    labels = result.labels if volume.is_volume else result.labels[0]
    if "png" in paths:
        write_file(paths["png"], png_bytes(labels))
    if "nifti" in paths:
        write_file(paths["nifti"], label_map_bytes(result.labels, volume))
    if "npz" in paths:
        arrays: dict[str, Any] = {
            "segs": labels,
            IOU_PREDICTIONS: np.array([f.iou for f in result.findings], np.float32),
        }
        if result.alternatives is not None:
            arrays["alternatives"] = result.alternatives
        if volume.spacing_mm is not None:
            arrays["spacing"] = np.array(volume.spacing_mm, np.float64)
        write_file(paths["npz"], npz_bytes(**arrays))
    if "overlay" in paths:
        picture = draw_overlay(
            [_panel(volume, result, prompts, index) for index in evenly_spaced(result.slices)],
            [(f.label, f"{f.label}  {f.prompt}  IoU {f.iou:.3f}") for f in result.findings],
            note,
        )
        write_file(paths["overlay"], png_bytes(np.asarray(picture)))


def _panel(volume: Volume, result: Segmentation, prompts: Prompts, index: int) -> Panel:
    boxes: list[tuple[int, tuple[float, float, float, float]]] = []
    if prompts.boxes_3d is not None:
        for label, (x0, y0, z0, x1, y1, z1) in enumerate(prompts.boxes_3d.tolist(), start=1):
            if z0 <= index < z1:
                boxes.append((label, (x0, y0, x1, y1)))
    elif prompts.boxes is not None:
        boxes = [(i, (b[0], b[1], b[2], b[3])) for i, b in enumerate(prompts.boxes.tolist(), 1)]
    points = [(x, y, label == 1) for x, y, label in prompts.points]
    caption = f"slice {index}" if volume.is_volume else ""
    return Panel(volume.slice_rgb(index), result.labels[index], boxes, points, caption)
