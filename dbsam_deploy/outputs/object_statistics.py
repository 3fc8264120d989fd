"""Numbers for each object: voxels, volume, mean of the stored values, extents; CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from ..images.stored import stored_values
from ..images.volumes import Volume
from .segmentation import Segmentation


@dataclass(frozen=True)
class ObjectStatistics:
    """One object in numbers; None is unknown, or there is no voxel to tell it.

    Attributes:
        label: its value in the label map.
        name: what the user calls it.
        voxels: how many.
        volume_ml: their volume; None where the spacing is unknown or uneven.
        mean: of the stored values (HU for CT) of its voxels, without those that hold no
            measurement; None for colour, pictures and arrays.
        std: their standard deviation.
        unit: of `mean` and `std`: `HU` or `stored value`.
        first_voxel: x, y, z of the box around it; y counts rows, z slices.
        extent_voxels: sides of that box along x, y, z.
        extent_mm: the same in mm; None where the spacing is unknown or uneven.
        confidence: mean predicted IoU over the slices on which it was decoded; 0 for none.
        review: whether it is below the least confidence; None where none was asked for, or it
            was not decoded, as objects of an earlier result.
    """

    label: int
    name: str
    voxels: int
    volume_ml: float | None
    mean: float | None
    std: float | None
    unit: str | None
    first_voxel: tuple[int, int, int] | None
    extent_voxels: tuple[int, int, int] | None
    extent_mm: tuple[float, float, float] | None
    confidence: float
    review: bool | None = None


def measure(segmentation: Segmentation) -> tuple[ObjectStatistics, ...]:
    """The objects of a segmentation in numbers, in their order.

    Raises:
        InputError: the image's files are gone, or others by now.
    """
    labels = np.array([one.label for one in segmentation.objects], np.int64)
    low, high = _boxes(segmentation.labels, int(labels.max(initial=0)))
    unit, measured, means, deviations = _values(segmentation, len(low))
    spacing, each_ml = segmentation.image.spacing_mm, voxel_ml(segmentation.image)
    voxels, confidence = voxel_counts(segmentation).tolist(), mean_confidence(segmentation)
    decoded = segmentation.decoded.tolist()
    found = []
    for index, one in enumerate(segmentation.objects):
        least = segmentation.min_confidence if decoded[index] else None
        count, start = voxels[index], low[one.label]
        sides = high[one.label] - start if count else None
        found.append(
            ObjectStatistics(
                one.label,
                one.name,
                count,
                volume_ml=None if each_ml is None else round(count * each_ml, 6),
                mean=round(float(means[one.label]), 4) if measured[one.label] else None,
                std=round(float(deviations[one.label]), 4) if measured[one.label] else None,
                unit=unit,
                first_voxel=_triple(start) if count else None,
                extent_voxels=None if sides is None else _triple(sides),
                extent_mm=_in_mm(sides, spacing),
                confidence=round(float(confidence[index]), 4),
                review=bool(confidence[index] < least) if least is not None else None,
            )
        )
    return tuple(found)


def voxel_ml(image: Volume) -> float | None:
    """The volume of one voxel; of sheared ones, it is no product of their sides."""
    if image.geometry is not None:
        return abs(float(np.linalg.det(image.geometry.affine[:3, :3]))) / 1000
    return None if image.spacing_mm is None else math.prod(image.spacing_mm) / 1000


def voxel_counts(segmentation: Segmentation) -> npt.NDArray[np.int64]:
    """(N,) voxels of each object; slice by slice, as counting takes eight bytes a voxel."""
    labels = [one.label for one in segmentation.objects]
    counts = np.zeros(max(labels, default=0) + 1, np.int64)
    for plane in segmentation.labels:
        counts += np.bincount(plane.ravel(), minlength=len(counts))[: len(counts)]
    return counts[labels]


def mean_confidence(segmentation: Segmentation) -> FloatArray:
    """(N,) float32 mean over the slices on which an object was decoded; 0 for none."""
    decoded = np.isfinite(segmentation.confidence)
    total = np.where(decoded, segmentation.confidence, 0).sum(axis=1, dtype=np.float64)
    return (total / np.maximum(decoded.sum(axis=1), 1)).astype(np.float32)


def _boxes(
    labels: npt.NDArray[np.unsignedinteger], last: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(last + 1, 3) first voxel and the one after the last, x, y, z, of every label."""
    low = np.full((last + 1, 3), np.iinfo(np.int64).max)
    high = np.zeros((last + 1, 3), np.int64)
    for z, plane in enumerate(labels):
        y, x = np.nonzero(plane)
        for axis, place in enumerate((x, y, np.full_like(x, z))):
            np.minimum.at(low[:, axis], plane[y, x], place)
            np.maximum.at(high[:, axis], plane[y, x], place + 1)
    return low, high


def _values(
    segmentation: Segmentation, count: int
) -> tuple[str | None, npt.NDArray[np.int64], FloatArray, FloatArray]:
    """Unit, (count,) measured voxels, their mean and standard deviation of every label."""
    labels = segmentation.labels
    counts = np.zeros(count, np.int64)
    sums = np.zeros((2, count))
    stored = stored_values(segmentation.image)
    if stored is not None:
        for z, values in stored[1]:
            inside = (labels[z] > 0) & np.isfinite(values)
            which, given = labels[z][inside], values[inside].astype(np.float64)
            counts += np.bincount(which, minlength=count)
            sums += [np.bincount(which, given**power, count) for power in (1, 2)]
    measured = np.maximum(counts, 1)
    means = sums[0] / measured
    unit = None if stored is None else stored[0]
    return unit, counts, means, np.sqrt(np.maximum(sums[1] / measured - means**2, 0))


def _triple(values: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _in_mm(
    sides: npt.NDArray[np.int64] | None, spacing: tuple[float, float, float] | None
) -> tuple[float, float, float] | None:
    if sides is None or spacing is None:
        return None
    x, y, z = (
        round(float(side * step), 6) for side, step in zip(sides, spacing[::-1], strict=True)
    )
    return x, y, z


def json_bytes(segmentation: Segmentation) -> bytes:
    """The model, its note, and a list of `ObjectStatistics`; nothing that names the patient."""
    content = {
        "model": segmentation.model,
        "note": segmentation.note,
        "objects": [asdict(one) for one in measure(segmentation)],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def csv_bytes(segmentation: Segmentation) -> bytes:
    """One row for each object; lists are spread over columns with an axis, unknown is empty."""
    rows = [_flat(one) for one in measure(segmentation)]
    empty = ObjectStatistics(0, "", 0, None, None, None, None, None, None, None, 0.0)
    stream = io.StringIO()
    table = csv.DictWriter(stream, _flat(empty), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue().encode()


def _flat(one: ObjectStatistics) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, value in asdict(one).items():
        if name in ("first_voxel", "extent_voxels", "extent_mm"):
            row |= {f"{name}_{axis}": value and value[i] for i, axis in enumerate("xyz")}
        else:
            row[name] = value
    return row
