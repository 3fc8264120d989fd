"""Numbers of a scan or picture → 0–255: the one place where intensities are mapped.

Every format goes the same way, in this order: excluded pixels (padding, fill values) are taken out
of the range; a window, or percentiles, give the range; the range becomes 0–255; an image that is
stored inverted is inverted; excluded pixels are shown as 0. What then holds one value only is
refused: a model draws a mask on anything, on black as well.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import NOTHING, ByteArray, all_values_are, is_constant

Window = tuple[float, float]
"""Level and width, in the units of the values."""

PERCENTILES = (0.5, 99.5)
CT_ADVICE = "for CT in HU consider the window 40 400"
AS_STORED = "0–255 as stored"

_EXACT = 2**53
"""Float64 keeps every whole number up to this one."""


@dataclass(frozen=True)
class Intensity:
    """How values became 0–255; `str` says it in words.

    Attributes:
        how: `stored`, `window`, `percentiles` or `range` (from the lowest to the highest value).
        low: the value that became 0 (255 where `is_inverted`), with everything below it.
        high: the value that became 255 (0 where `is_inverted`), with everything above it.
        text: the same in words.
        excluded: pixels that were left out of the range and are shown as 0.
        is_inverted: whether low values are shown bright.
        notes: what else was converted, and advice.
    """

    how: str
    low: float
    high: float
    text: str
    excluded: int = 0
    is_inverted: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.text]
        if self.excluded:
            plural = "s" if self.excluded > 1 else ""
            parts.append(f"{self.excluded} padding or fill value{plural} left out, shown as 0")
        if self.is_inverted:
            parts.append("inverted: stored white is low")
        return "; ".join([*parts, *self.notes])

    def with_notes(self, *notes: str) -> Intensity:
        """The same with further remarks; empty ones do not count."""
        added = tuple(note for note in notes if note)
        return dataclasses.replace(self, notes=(*self.notes, *added))


STORED = Intensity("stored", 0, 255, AS_STORED)


def to_uint8(
    values: npt.NDArray[Any],
    window: Window | None,
    path: Path,
    *,
    excluded: npt.NDArray[np.bool_] | None = None,
    is_inverted: bool = False,
    window_text: str = "",
    notes: tuple[str, ...] = (),
) -> tuple[ByteArray, Intensity]:
    """Values → 0–255, and how.

    Without a window uint8 stays as it is. Other types are clipped to the 0.5–99.5 percentiles of
    the non-zero values and zeros stay 0, as in MedSAM's preparation of MR. Where there are negative
    values, 0 is no background (it is water in HU), so all values count and none is kept; likewise
    in an inverted image. Where the percentiles coincide, the lowest and highest value replace them.

    Args:
        values: (D, H, W) or (D, H, W, 3) real numbers of any type.
        window: see `Window`.
        path: named in errors.
        excluded: (D, H, W), pixels that hold no measurement; they may be NaN or infinite.
        is_inverted: the lowest value is white (MONOCHROME1); applied last.
        window_text: what to call the window in words, by default by its numbers.
        notes: kept in the result, see `Intensity`.

    Raises:
        InputError: not real numbers, NaN or infinity, a width of 0 or less, a window outside the
            values, or an image that becomes constant.
    """
    if values.dtype.kind not in "uif":
        raise InputError(f"{path}: values of type {values.dtype}; expected real numbers")
    count = 0 if excluded is None else int(np.count_nonzero(excluded))
    if excluded is not None and count == excluded.size:
        raise InputError(f"{path}: every pixel is padding or a fill value; {NOTHING}")
    excluded = excluded if count else None
    _check_finite(values, excluded, path)
    if window is None and values.dtype == np.uint8:
        out, how = np.ascontiguousarray(values), STORED
    else:
        out, how = _mapped(values, window, path, excluded, is_inverted)
        how = dataclasses.replace(how, text=window_text or how.text)
    how = dataclasses.replace(how, excluded=count, is_inverted=is_inverted)
    _check_contrast(out, values, excluded, how, path)
    if is_inverted:
        out = np.uint8(255) - out
    if excluded is not None:
        out = out.copy() if np.may_share_memory(out, values) else out
        out[excluded] = 0
    return out, how.with_notes(*notes)


def _check_finite(
    values: npt.NDArray[Any], excluded: npt.NDArray[np.bool_] | None, path: Path
) -> None:
    if values.dtype.kind != "f":
        return
    for index, plane in enumerate(values):  # a mask of the whole volume would be a copy of it
        with np.errstate(over="ignore", invalid="ignore"):  # a wider type may exceed float64
            finite = np.isfinite(plane.astype(np.float64))
        measured = finite if excluded is None else finite[~excluded[index]]
        if not measured.all():
            raise InputError(
                f"{path} holds NaN or infinity: replace them (for example by the lowest value) "
                "first"
            )


def _mapped(
    values: npt.NDArray[Any],
    window: Window | None,
    path: Path,
    excluded: npt.NDArray[np.bool_] | None,
    is_inverted: bool,
) -> tuple[ByteArray, Intensity]:
    """`values` by a window or percentiles, not inverted yet, and how."""
    counted = (values if excluded is None else values[~excluded]).reshape(-1)
    lowest, highest = _number(counted.min()), _number(counted.max())
    keep_zeros = window is None and lowest >= 0 and not is_inverted
    # Whole numbers beyond those that float64 holds exactly are counted from the lowest.
    base = lowest if isinstance(lowest, int) and max(-lowest, highest) > _EXACT else 0
    if window is None:
        low, high, how, text = _percentile_range(counted, keep_zeros, base)
    else:
        low, high, text = window_range(window)
        low, high, how = low - base, high - base, "window"
    del counted
    out = np.empty(values.shape, np.uint8)
    for index, plane in enumerate(values):
        if excluded is not None:
            plane = plane.copy()
            plane[excluded[index]] = lowest  # NaN has no byte
        out[index] = _scaled(_float64(plane, base), low, high)
        if keep_zeros:
            out[index][plane == 0] = 0
    notes = (CT_ADVICE,) if window is None and lowest < 0 else ()
    return out, Intensity(how, low + base, high + base, text, notes=notes)


def _number(value: Any) -> int | float:
    return int(value) if value.dtype.kind in "iu" else float(value)


def _float64(values: npt.NDArray[Any], base: float) -> npt.NDArray[np.float64]:
    """`values` - `base`, a difference that is exact for whole numbers of 64 bits too."""
    if base:
        values = values.astype(np.uint64) - np.uint64(int(base) % 2**64)  # modulo 2**64
    return values.astype(np.float64)


def _scaled(plane: npt.NDArray[np.float64], low: float, high: float) -> ByteArray:
    """Low … high → 0–255, clipped."""
    if not math.isfinite(high - low):  # halves do not overflow, and are exact at this size
        plane, low, high = plane / 2, low / 2, high / 2
    scaled = (np.clip(plane, low, high) - low) / (high - low) * 255
    return scaled.astype(np.uint8)  # truncates, as MedSAM does


def window_range(window: Window) -> tuple[float, float, str]:
    """Both ends of a window, and the same in words.

    Raises:
        InputError: not two numbers, or none that make a range.
    """
    try:
        level, width = (float(value) for value in window)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"window {window!r}: expected two numbers, level and width, for example (40, 400)"
        ) from error
    if not (np.isfinite([level, width]).all() and width > 0):
        raise InputError(f"window {level:g} {width:g}: expected a finite level and a width > 0")
    low, high = level - width / 2, level + width / 2
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(f"window {level:g} {width:g}: its ends are no two finite numbers")
    return low, high, f"window level {level:g} width {width:g} ({low:g} to {high:g})"


def _percentile_range(
    counted: npt.NDArray[Any], without_zeros: bool, base: float
) -> tuple[float, float, str, str]:
    """Both ends less `base`, how they were found, and the same in words.

    Args:
        counted: one axis, the values that count, with zeros.
        without_zeros: leave zeros out.
        base: see `_float64`.
    """
    measured = counted[counted != 0] if without_zeros else counted.copy()
    which = "non-zero" if without_zeros else "all"
    measured = _float64(measured, base) if base else measured
    if measured.size:
        low, high = _percentiles(measured)
        if low < high:
            text = f"0.5–99.5 percentile of {which} voxels ({low + base:g} to {high + base:g})"
            return low, high, "percentiles", text
        low, high = float(measured.min()), float(measured.max())
    if not measured.size or not low < high:
        low, high = (_number(edge) - base for edge in (counted.min(), counted.max()))
        which = "all"
    text = (
        f"lowest to highest of {which} voxels ({low + base:g} to {high + base:g}), as their "
        "0.5–99.5 percentiles coincide"
    )
    # A constant image is refused once the ends of its range have been tried.
    return low, high if low < high else max(low + 1, math.nextafter(low, math.inf)), "range", text


def _percentiles(values: npt.NDArray[Any]) -> tuple[float, float]:
    """`PERCENTILES` of `values`, which are reordered; as NumPy's, without overflow of any type."""
    last = values.size - 1
    places = [last * (percentile / 100) for percentile in PERCENTILES]
    around = [(math.floor(place), math.ceil(place)) for place in places]
    values.partition(sorted({index for pair in around for index in pair}))
    low, high = (
        _between(float(values[below]), float(values[above]), place - below)
        for place, (below, above) in zip(places, around, strict=True)
    )
    return low, high


def _between(a: float, b: float, part: float) -> float:
    if a == b:
        return a
    if not math.isfinite(b - a):
        return a * (1 - part) + b * part
    return b - (b - a) * (1 - part) if part >= 0.5 else a + (b - a) * part


def _check_contrast(
    out: ByteArray,
    values: npt.NDArray[Any],
    excluded: npt.NDArray[np.bool_] | None,
    how: Intensity,
    path: Path,
) -> None:
    """Refuse an image whose pixels that count all became the same.

    Raises:
        InputError: it is constant, or its window made it so.
    """
    channels = values.shape[3:]
    shown = (out if excluded is None else out[~excluded]).reshape(-1, *channels)
    if not is_constant(shown):
        return
    counted = (values if excluded is None else values[~excluded]).reshape(-1, *channels)
    if is_constant(counted):
        raise InputError(f"{path}: {all_values_are(counted)}")
    raise InputError(
        f"{path}: at {how.text} every pixel is {shown.flat[0]}, as its values go from "
        f"{_number(counted.min()):g} to {_number(counted.max()):g}; {NOTHING}: choose a window "
        "within them"
    )
