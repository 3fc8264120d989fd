"""How far a fused kernel may be from its reference in float32, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import AccuracyError


@dataclass(frozen=True)
class Tolerance:
    """How far a deployed tensor may be from the float32 reference.

    Attributes:
        relative: largest error as a fraction of the reference's own largest magnitude.
        reason: where the number comes from.
    """

    relative: float
    reason: str


KERNELS: dict[str, Tolerance] = {
    "float32": Tolerance(
        1e-5,
        "rounding 6e-8 in sums of thousands of terms in another order; measured 2e-7 to 3e-6",
    ),
    "float16": Tolerance(1e-3, "the result is rounded once, 5e-4; measured 4.3e-4"),
    "bfloat16": Tolerance(8e-3, "the result is rounded once, 4e-3; measured 3.2e-3"),
}
"""Type of a kernel's tensors → its bound."""


def share_of_bound(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], bound: Tolerance, what: str = "output"
) -> float:
    """The largest error as a share of what is allowed.

    Args:
        found: what is judged, of any shape.
        expected: the reference.
        bound: how far it may be off.
        what: for the message.

    Raises:
        AccuracyError: another shape, a value that is not finite, or a larger error.
    """
    if found.shape != expected.shape:
        raise AccuracyError(f"{what}: shape {found.shape}, expected {expected.shape}")
    scale = float(np.abs(expected).max())
    error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    most = bound.relative * scale
    if not error <= most:  # NaN fails as well
        raise AccuracyError(f"{what}: largest error {error:.3g}, at most {most:.3g}")
    return error / most if most else 0.0
