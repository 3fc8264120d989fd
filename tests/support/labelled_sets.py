"""Images with label maps as other programs write them: SimpleITK's NIfTI, highdicom's SEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from support.dicom_series import write_dicom_series

LABELS = np.zeros((4, 5, 6), np.uint8)
LABELS[1, 1:4, 2] = LABELS[1, 3, 2:5] = 1
LABELS[2, 0, 4:] = 2
IMAGE = np.arange(LABELS.size, dtype=np.int16).reshape(LABELS.shape) - 20
"""Values that are all different, and labels of them that no turn or flip maps onto themselves."""


def write_nifti(path: Path, array: npt.NDArray[Any], **place: Any) -> Path:
    """(D, H, W[, C]) as NIfTI; `place`: spacing (x, y, z), origin, direction of SimpleITK."""
    import SimpleITK

    parts = [array] if array.ndim == 3 else [array[..., c] for c in range(array.shape[-1])]
    images = [_placed(SimpleITK.GetImageFromArray(part), place) for part in parts]
    image = images[0] if len(images) == 1 else SimpleITK.JoinSeries(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def _placed(image: Any, place: dict[str, Any]) -> Any:
    image.SetSpacing(place.get("spacing", (0.7, 0.8, 2.5)))
    image.SetOrigin(place.get("origin", (1.0, 2.0, 3.0)))
    image.SetDirection(place.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return image


def write_series(folder: Path, volume: npt.NDArray[Any], **options: Any) -> list[Path]:
    """A series with all that highdicom asks of the images of a SEG."""
    from pydicom.uid import generate_uid

    empty = (
        *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "PatientBirthDate", "PatientSex"),
        *("ReferringPhysicianName", "Manufacturer", "PositionReferenceIndicator"),
    )
    about: dict[str, Any] = dict.fromkeys(empty, "")
    about.update(FrameOfReferenceUID=generate_uid(), SeriesNumber=1, PatientName="A^B")
    return write_dicom_series(folder, volume, **about, **options)


def write_seg(
    path: Path,
    files: list[Path],
    pixels: npt.NDArray[Any],
    kind: str = "BINARY",
    **options: Any,
) -> Path:
    """A SEG of two segments.

    Args:
        path: the file.
        files: images in the order of `pixels`.
        pixels: (D, H, W) labels, or (D, H, W, 2) fractions.
        kind: SegmentationType.
        options: of highdicom's `Segmentation`.
    """
    import highdicom
    import pydicom

    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    algorithm = highdicom.AlgorithmIdentificationSequence("test", code, "1")
    segments = [
        highdicom.seg.SegmentDescription(
            number, name, code, code, "AUTOMATIC", algorithm, tracking_uid=highdicom.UID(),
            tracking_id=name,
        )
        for number, name in ((1, "liver"), (2, "spleen"))
    ]  # fmt: skip
    made = highdicom.seg.Segmentation(
        [pydicom.dcmread(file) for file in files],
        pixels,
        kind,
        segments,
        highdicom.UID(),
        2,
        highdicom.UID(),
        1,
        "nobody",
        "test",
        "1",
        "0",
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
    return path
