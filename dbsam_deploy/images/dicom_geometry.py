"""Order, spacing and place in the patient of the slices of a DICOM series.

Numbers in DICOM are decimal strings, often with one or three digits behind the point, and what that
rounding explains is removed: directions are made orthonormal, as ITK wants them, and positions form
one even stack. What it does not explain is no grid. A tilted gantry shears the stack, slices may
lie unevenly: these are segmented slice by slice, and get no label map in NIfTI, which has no way to
say where such slices lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from .dicom_frames import FLOAT, DicomSlice
from .scans import ScanGeometry

SAME_DIRECTION = 2e-3
"""By how much a component of the directions of two slices of one stack may differ."""
LEAST_ANGLE = 1e-3
"""Radians that directions may be off in any case: a twentieth of a degree."""
COARSEST_DECIMALS = 2
"""Digits behind the point that directions must have for their error to count as rounding."""
EVENNESS = 0.05
"""By how much of the step a slice may lie beside its place, besides rounding."""


@dataclass(frozen=True)
class Stack:
    """Slices in order, with their place.

    Attributes:
        frames: sorted along the normal of the slices.
        geometry: the grid that they form; None where they form none.
        spacing_mm: along (z, y, x); None where the file does not say it, or it is uneven.
        unplaced: why there is no grid, as the predicate of a sentence; empty where there is one or
            where the file has no positions at all.
        notes: what was made of the stored numbers.
    """

    frames: tuple[DicomSlice, ...]
    geometry: ScanGeometry | None
    spacing_mm: tuple[float, float, float] | None
    unplaced: str = ""
    notes: tuple[str, ...] = ()


def arrange(frames: Sequence[DicomSlice], path: Path) -> Stack:
    """Sort slices along their normal and find the grid that they form.

    Args:
        frames: of one series, in any order.
        path: what the user named, for messages.

    Raises:
        InputError: slices of several sizes, directions or pixel spacings, without positions, one
            that is missing or stored twice, or directions that are none.
    """
    first = frames[0]
    _check_alike(frames, path)
    orientation = first.orientation
    if orientation is None or any(frame.position is None for frame in frames):
        if len(frames) > 1:
            raise InputError(
                f"{path}: ImagePositionPatient is missing, so its slices cannot be ordered"
            )
        return Stack(tuple(frames), None, None)
    along_x, along_y = orientation.reshape(2, 3)
    normal = np.cross(along_x, along_y)
    if abs(float(np.linalg.norm(normal)) - 1) > 3e-2 or first.pixel_spacing is None:
        raise InputError(f"{path}: its orientation or PixelSpacing is not valid; repair the header")
    if not (first.pixel_spacing > 0).all():
        raise InputError(f"{path}: PixelSpacing is {first.pixel_spacing}; expected more than 0 mm")
    normal /= np.linalg.norm(normal)
    positions = np.array([frame.position for frame in frames], np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    ordered = tuple(frames[index] for index in order)
    return _on_a_grid(ordered, positions[order], (along_x, along_y, normal), path)


def _check_alike(frames: Sequence[DicomSlice], path: Path) -> None:
    headers = [frame.file.header for frame in frames]
    for name in ("Rows", "Columns", "PhotometricInterpretation", "SamplesPerPixel"):
        found = {str(header.get(name)) for header in headers}
        if len(found) > 1 or "None" in found:
            raise InputError(
                f"{path}: {name} is {', '.join(sorted(found))}; expected one value in all slices"
            )
    for name, values in (
        ("ImageOrientationPatient", [frame.orientation for frame in frames]),
        ("PixelSpacing", [frame.pixel_spacing for frame in frames]),
    ):
        given = [value for value in values if value is not None]
        if len(given) < len(values):
            if len(frames) > 1:
                raise InputError(f"{path}: {name} is missing, so its slices cannot be ordered")
            continue
        if not np.allclose(given, given[0], rtol=0, atol=SAME_DIRECTION):
            raise InputError(f"{path}: {name} differs between slices; expected one straight stack")


def _on_a_grid(
    frames: tuple[DicomSlice, ...],
    positions: FLOAT,
    axes: tuple[FLOAT, FLOAT, FLOAT],
    path: Path,
) -> Stack:
    """The stack of sorted slices, with a grid if they form one."""
    first = frames[0]
    along_x, along_y, normal = axes
    row_mm, column_mm = (float(value) for value in first.pixel_spacing)  # type: ignore[union-attr]
    rounding_mm = _rounding_mm(frames)
    step_mm, uneven = _step(frames, positions, normal, rounding_mm, path)
    if uneven:
        note = f"the slices {uneven}; they are segmented one by one"
        return Stack(frames, None, None, uneven, (note,))
    angle = _rounding_angle(frames, along_x, along_y)
    length = step_mm * (len(frames) - 1)
    travel = positions[-1] - positions[0]
    aside = float(np.linalg.norm(travel - normal * (travel @ normal)))
    if aside > 2 * np.sqrt(3) * rounding_mm + length * angle:
        tilt = np.degrees(np.arctan2(aside, length))
        sheared = f"are sheared by {tilt:.1f}° (a tilted gantry)"
        return Stack(
            frames,
            None,
            (step_mm, row_mm, column_mm),
            sheared,
            (f"the slices {sheared}; they are segmented as stored",),
        )
    skew = abs(float(np.arcsin(np.clip(along_x @ along_y, -1, 1))))
    if skew > angle:
        crooked = f"have rows and columns at {90 - np.degrees(skew):.1f}°, not at right angles"
        return Stack(
            frames, None, (step_mm, row_mm, column_mm), crooked, (f"the slices {crooked}",)
        )
    directions = _orthonormal(np.column_stack(axes))
    affine = np.eye(4)
    affine[:3, :3] = directions @ np.diag([column_mm, row_mm, step_mm])
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # left, posterior → right, anterior
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(f"{path}: its position and spacing do not place voxels in space")
    header = first.file.header
    geometry = ScanGeometry(affine, (int(header.Columns), int(header.Rows), len(frames)))
    return Stack(frames, geometry, (step_mm, row_mm, column_mm))


def _orthonormal(matrix: FLOAT) -> FLOAT:
    """The rotation next to a (3, 3) matrix of directions that were rounded."""
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right, np.float64)


def _rounding_mm(frames: Sequence[DicomSlice]) -> float:
    """By how much a coordinate of a position can be off, as its digits say."""
    decimals = max(frame.decimals[0] for frame in frames)
    return 0.5 * 10.0 ** -max(decimals, 1)


def _rounding_angle(frames: Sequence[DicomSlice], along_x: FLOAT, along_y: FLOAT) -> float:
    """By how many radians directions can be off, as their digits say."""
    exact = np.isin(np.abs(np.concatenate([along_x, along_y])), (0, 1)).all()
    decimals = max(frame.decimals[1] for frame in frames)
    if exact:
        return LEAST_ANGLE
    return max(LEAST_ANGLE, 2 * np.sqrt(3) * 0.5 * 10.0 ** -max(decimals, COARSEST_DECIMALS))


def _step(
    frames: Sequence[DicomSlice], positions: FLOAT, normal: FLOAT, rounding_mm: float, path: Path
) -> tuple[float, str]:
    """Distance between slices in mm, and how they lie unevenly if they do.

    Args:
        frames: sorted.
        positions: (D, 3) of their first pixels.
        normal: (3,) of their planes.
        rounding_mm: see `_rounding_mm`.
        path: for messages.

    Raises:
        InputError: a slice that is missing or stored twice.
    """
    first = frames[0]
    if len(frames) == 1:
        return first.gap or first.thickness or 1.0, ""
    depths = positions @ normal
    steps = np.diff(depths)
    rounding = np.sqrt(3) * rounding_mm  # of all three coordinates
    usual = float(np.median(steps))
    if float(steps.min()) <= max(1e-3, min(2 * rounding, 0.2 * usual)):
        _refuse_double(frames, int(steps.argmin()), path)
    places = np.arange(len(frames))
    per_slice, start = np.polyfit(places, positions, 1)
    off = np.linalg.norm(positions - (start + places[:, None] * per_slice), axis=1)
    mean = float(per_slice @ normal)
    tolerance = 1.25 * rounding + EVENNESS * mean
    if float(off.max()) <= tolerance:
        return _nominal(frames, float(depths[-1] - depths[0]), mean, 2 * rounding), ""
    _check_nothing_missing(frames, steps, usual, 2 * rounding, path)
    if np.ptp(steps) <= 2 * tolerance:
        return mean, f"do not lie in one straight line (one is {off.max():.3g} mm beside it)"
    return mean, f"lie unevenly, {steps.min():.3g} to {steps.max():.3g} mm apart"


def _nominal(frames: Sequence[DicomSlice], length: float, mean: float, tolerance: float) -> float:
    """The step as the header gives it, where positions agree with it within their rounding."""
    for stated in (frames[0].gap, frames[0].thickness):
        if stated and abs(stated * (len(frames) - 1) - length) <= tolerance:
            return stated
    return mean


def _refuse_double(frames: Sequence[DicomSlice], index: int, path: Path) -> None:
    names = [f"{frame.file.path.name}" for frame in frames[index : index + 2]]
    where = " and ".join(dict.fromkeys(names))
    if len(set(names)) == 1:
        where += f" (frames {frames[index].index} and {frames[index + 1].index})"
    raise InputError(
        f"{path}: slices are not evenly spaced: {where} lie at one place: one is stored twice, or "
        "there are several echoes or points in time; keep one of each place"
    )


def _check_nothing_missing(
    frames: Sequence[DicomSlice], steps: FLOAT, usual: float, tolerance: float, path: Path
) -> None:
    """Refuse gaps of whole steps, unless the slices' own numbers say that none is missing there."""
    numbers = [frame.number for frame in frames]
    for index, step in enumerate(steps):
        skipped = round(float(step) / usual) - 1
        whole = abs(float(step) - (skipped + 1) * usual) <= tolerance + 0.1 * usual
        before, after = numbers[index], numbers[index + 1]
        in_a_row = before is not None and after is not None and abs(after - before) == 1
        if skipped >= 1 and whole and not in_a_row:
            names = " and ".join(frame.file.path.name for frame in frames[index : index + 2])
            raise InputError(
                f"{path}: slices are not evenly spaced ({usual:.3g} mm apart, but {step:.3g} mm "
                f"between {names}): {skipped} missing there; fetch the series again"
            )
