"""What a model found in an image or volume: masks, label map, files and pictures."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray
from ..files.atomic import write_file
from ..files.user_paths import user_path
from ..images.overlays import Panel, draw_overlay, evenly_spaced
from ..images.volumes import Volume, label_map_bytes, label_npz_bytes, png_bytes
from .prompts import Prompts

SUFFIXES = (".png", ".npz", ".nii.gz", ".nii")
"""Endings of the files that `Result.save` can write."""


@dataclass(frozen=True)
class Row:
    """One mask in a table.

    Attributes:
        label: its value in the label map, the prompt's position from 1.
        prompt: the prompt in words.
        pixels: pixels (voxels) of the mask, before any later prompt covered some.
        iou: predicted IoU; for a 3D box the mean over its slices.
        kept: whether this mask is the one in the label map.
    """

    label: int
    prompt: str
    pixels: int
    iou: float
    kept: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Masks of N prompts on one image or volume of D slices of H×W pixels.

    `masks, ious, logits = result` unpacks the masks of one prompt as SAM's predictor returns them.

    Attributes:
        image: what was segmented, with the mapping of its intensities.
        prompts: what was asked.
        labels: (D, H, W) uint8, or uint16 above 255 prompts: prompt i has label i + 1, a later one
            covers an earlier, 0 is outside. Of three alternatives the one with the best IoU counts.
        ious: (N, M) float32, the decoder's own estimate of each mask's IoU; M is 1, or 3 with
            multimask. For a 3D box the mean over its slices.
        pixels: (N, M) int64 pixels (voxels) of each mask, before a later prompt covered some; of a
            3D box that was carried through a volume, after.
        slices: indices of the slices that were segmented.
        blank_slices: those of them that hold one value only, whose masks are therefore empty.
        logits: (N, M, 4G, 4G) float32, `mask_input` of a later prompt; None for 3D boxes and where
            only the label map was asked for.
        alternatives: (3, H, W) label maps of the multimask alternatives, else None.
        own_masks: (N, M, H, W), if they were kept; see `masks`.
        note: what the user must know of the model, for example untrained weights; else empty.
    """

    image: Volume
    prompts: Prompts
    labels: npt.NDArray[Any]
    ious: FloatArray
    pixels: npt.NDArray[np.int64]
    slices: tuple[int, ...]
    logits: FloatArray | None = None
    alternatives: npt.NDArray[Any] | None = None
    own_masks: ByteArray | None = None
    note: str = ""
    blank_slices: tuple[int, ...] = ()

    @property
    def masks(self) -> ByteArray:
        """(N, M, H, W) uint8 of an image or slice, (N, 1, D, H, W) of 3D boxes; 1 inside.

        Where only the label map was kept, a mask lacks what a later prompt covered.
        """
        if self.own_masks is not None:
            return self.own_masks
        labels = self.labels if self.prompts.boxes_3d is not None else self.labels[self.slices[0]]
        return np.stack([labels == label for label in range(1, len(self.ious) + 1)]).astype(
            np.uint8
        )[:, None]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        """Masks (M, H, W) bool, IoU (M,) and logits (M, 4G, 4G) of one prompt, as in SAM.

        Raises:
            InputError: several prompts, or no logits.
        """
        if len(self.ious) != 1 or self.logits is None:
            raise InputError(
                f"a result of {len(self.ious)} prompts cannot be unpacked as SAM's three arrays: "
                "use .masks, .ious and .logits"
            )
        return iter((self.masks[0].astype(bool), self.ious[0], self.logits[0]))

    def rows(self) -> list[Row]:
        """Every mask, in the order of prompts and alternatives."""
        return [
            Row(i + 1, name, int(self.pixels[i, m]), float(iou), m == int(np.argmax(ious)))
            for i, (name, ious) in enumerate(zip(self.prompts.names, self.ious, strict=True))
            for m, iou in enumerate(ious)
        ]

    def __repr__(self) -> str:
        depth, height, width = self.labels.shape
        kept = [row for row in self.rows() if row.kept]
        text = ", ".join(f"{row.prompt}: {row.pixels} px, IoU {row.iou:.3f}" for row in kept[:3])
        more = f", and {len(kept) - 3} more" if len(kept) > 3 else ""
        return f"Result({depth}×{height}×{width}, {text}{more})"

    def save(self, path: str | Path) -> Path:
        """Write the label map, whole or not at all; the folder is made.

        Args:
            path: `.png` (an image), `.npz` (also IoU, alternatives, spacing) or `.nii.gz`, `.nii`
                (NIfTI and DICOM input, with its position in space).

        Raises:
            InputError: another ending, a kind that cannot hold this result, a file that was read as
                input, or a folder that cannot be written.
            EngineError: NIfTI without nibabel.
        """
        path = user_path(path)
        content = self._content(path)
        if os.path.exists(path) and any(path.samefile(source) for source in self.image.files):
            raise InputError(f"{path} is the input itself: choose another name or folder")
        return write_file(path, content)

    def _content(self, path: Path) -> bytes:
        name = path.name.lower()
        if name.endswith(".png"):
            if self.image.is_volume:
                raise InputError(f"{self.image.path} is a volume and PNG holds one slice: use npz")
            return png_bytes(self.labels[0])
        if name.endswith((".nii.gz", ".nii")):
            return label_map_bytes(self.labels, self.image, compressed=name.endswith(".gz"))
        if not name.endswith(".npz"):
            raise InputError(f"{path}: unknown ending; expected {', '.join(SUFFIXES)}")
        best = np.argmax(self.ious, axis=1)
        more = {} if self.alternatives is None else {"alternatives": self.alternatives}
        ious = np.take_along_axis(self.ious, best[:, None], axis=1)[:, 0]
        return label_npz_bytes(self.labels, self.image, ious, **more)

    def plot(self) -> Image.Image:
        """A picture: contours, prompts and a legend on the image, or on at most nine slices."""
        return draw_overlay(
            [self._panel(index) for index in evenly_spaced(self.slices)],
            [(r.label, f"{r.label}  {r.prompt}  IoU {r.iou:.3f}") for r in self.rows() if r.kept],
            self.note,
        )

    def _panel(self, index: int) -> Panel:
        boxes: list[tuple[int, tuple[float, float, float, float]]] = []
        if self.prompts.boxes_3d is not None:
            for label, (x0, y0, z0, x1, y1, z1) in enumerate(self.prompts.boxes_3d.tolist(), 1):
                if z0 <= index < z1:
                    boxes.append((label, (x0, y0, x1, y1)))
        elif self.prompts.boxes is not None:
            boxes = [(i, (x0, y0, x1, y1)) for i, (x0, y0, x1, y1) in enumerate(self._boxes(), 1)]
        points = [(x, y, sign == "+") for each in self.prompts.points() for x, y, sign in each]
        caption = f"slice {index}" if self.image.is_volume else ""
        return Panel(self.image.slice_rgb(index), self.labels[index], boxes, points, caption)

    def _boxes(self) -> list[list[float]]:
        return [] if self.prompts.boxes is None else self.prompts.boxes.tolist()

    def _repr_html_(self) -> str:
        """The picture and a table, for notebooks."""
        stream = io.BytesIO()
        self.plot().save(stream, format="PNG")
        picture = base64.b64encode(stream.getvalue()).decode("ascii")
        cells = "".join(
            f"<tr><td>{row.label}</td><td>{html.escape(row.prompt)}</td><td>{row.pixels}</td>"
            f"<td>{row.iou:.3f}</td></tr>"
            for row in self.rows()
            if row.kept
        )
        # A name that is no UTF-8 would leave the notebook without its picture.
        name = self.image.path.name.encode("utf-8", "replace").decode("utf-8")
        return (
            f'<img alt="masks on {html.escape(name)}" '
            f'src="data:image/png;base64,{picture}"/>'
            "<table><tr><th>label</th><th>prompt</th><th>mask pixels</th>"
            "<th>predicted IoU</th></tr>"
            f"{cells}</table>"
        )
