"""The protocols as data: boxes, frame, what a case is, and the tolerance of the NSD.

- `objects`: One object is a label on a slice (an instance, in microscopy); prompts and masks are in
  the image frame, whatever its size. The box encloses the object's pixels, each side grown by 0–20
  px at 1024 scale; objects under 16 px are skipped; logits are enlarged to the image and cut at 0.
  Dice per object; a case is a file, and its score and its task's are means over objects. NSD in 2D,
  within 2 px. The reference figures of LiteMedSAM are measured so, and it needs nothing of the data
  but masks, so it is the default.
- `medsam`: The paper's, which is MedSAM v0.1's: every slice is squeezed to 256×256 (images with
  order 3, labels with order 0; files that have that size are taken as they are), each label is a
  target of its own, and slices with at most 100 px of it are dropped. Boxes name the object's last
  row and column and grow by exactly 9 px a side on that grid, as the official test code does; the
  paper says 0–20 px at 1024 (`--box-growth-px 0 20`). Logits are cut at 0 on the 256×256 grid (a
  model whose mask grid has another side has them resized). A case is a label of a file. A stack is
  a volume and has one Dice, unless the task's name holds `2D`, as in the official code, or there is
  only one slice: then its images' Dice values are averaged. The case's NSD takes the stack as one
  volume with 1 voxel of tolerance, images too, as coded; with `mm`, 1 mm where the file has a
  spacing. Beside them stand, which the paper does not have, the 95th percentile of the surfaces'
  distance in the same unit, and by how much the volume is off. A task's score is the mean over its
  cases. Files with several labels, instances and other sizes do not occur in the paper's data; the
  above says what becomes of them.
- `cvpr24`: MedSAM on Laptop: boxes are the file's own, label i from box i (counted from 1), or else
  made from the truth, as in `medsam` but in the image frame and grown by 0–20 px at 1024 scale, the
  challenge's training jitter. A file with a spacing is a volume: one 3D box a label; from its
  middle slice outwards the next slice's box is the previous mask's, 3 px wider at 256 scale, or the
  first box where that mask is empty. Other stacks are images, each a case. All masks go into one
  label map, later labels over earlier ones, and a label is scored on it: Dice, and NSD within 2 mm
  in volumes and 2 px in images; an image's NSD is that of a slab one pixel thick, and the NSD
  counts as 0 where Dice is at most 0.2, both as coded. Label maps are 16 bit, so more than 255
  boxes do not overflow. Spacing is taken in the order of the array's axes, as the official code
  does. A case's score is the mean over its labels, a task's the mean over its cases.
- `one-prompt`: Volumes alone (stacks with a spacing). Each label has one box, on the slice with
  most of it, and `volumes.chain` carries the mask to the other slices without being told where the
  object ends. A label is scored on its own mask: Dice, and NSD as in `cvpr24`. Beside it stand the
  filled 3D box, the oracle (a box on each of the object's slices, which nobody draws) and the
  propagation of `cvpr24`, which is told first and last slice and an outline of the whole. All boxes
  are as large as the object, unless a growth is given. Cases and tasks as in `cvpr24`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import InputError
from .boxes import BoxGrowth

ProtocolName = Literal["objects", "medsam", "cvpr24", "one-prompt"]

MEDSAM_SIDE = 256
MEDSAM_MIN_PX = 100
CHALLENGE_MIN_DSC = 0.2
CHALLENGE_SIDE, CHALLENGE_MARGIN_PX = 256, 3


@dataclass(frozen=True)
class EvaluationProtocol:
    """One protocol with its options; see the module's docstring.

    Attributes:
        name: which.
        growth: of boxes made from the truth.
        tolerance: of the NSD, in pixels or voxels, or mm where `describe` says so.
        millimetres: medsam: tolerance in mm where the file has a spacing.
        min_object_px: objects: smaller ones are skipped.
        seed: of the boxes' growth; 0 gives the reference figures' boxes.
    """

    name: ProtocolName
    growth: BoxGrowth
    tolerance: float
    millimetres: bool = False
    min_object_px: int = 1
    seed: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether low-resolution logits are read."""
        return self.name == "medsam"

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {
            "protocol": self.name,
            "box_growth_px_at_1024": [self.growth.low, self.growth.high],
            "nsd_tolerance": self.tolerance,
            "nsd_in_mm": self.millimetres,
            "min_object_px": self.min_object_px,
            "seed": self.seed,
        }


_DEFAULTS: dict[str, EvaluationProtocol] = {
    "objects": EvaluationProtocol("objects", BoxGrowth(0, 20), tolerance=2, min_object_px=16),
    # 9 px on the 256 grid
    "medsam": EvaluationProtocol(
        "medsam", BoxGrowth(36, 36), tolerance=1, min_object_px=MEDSAM_MIN_PX + 1
    ),
    "cvpr24": EvaluationProtocol("cvpr24", BoxGrowth(0, 20), tolerance=2),
    "one-prompt": EvaluationProtocol("one-prompt", BoxGrowth(0, 0), tolerance=2),
}
PROTOCOLS: tuple[str, ...] = tuple(_DEFAULTS)


def build_protocol(
    name: str,
    *,
    growth: BoxGrowth | None = None,
    millimetres: bool = False,
    seed: int = 0,
) -> EvaluationProtocol:
    """A protocol with options.

    Args:
        name: one of `PROTOCOLS`.
        growth: instead of the protocol's own.
        millimetres: medsam only: NSD within 1 mm, not 1 voxel, where a file has a spacing.
        seed: of the boxes' growth.

    Raises:
        InputError: an unknown name, a negative seed, or millimetres for another protocol.
    """
    if name not in _DEFAULTS:
        raise InputError(f"protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    base = _DEFAULTS[name]
    if millimetres and name != "medsam":
        raise InputError(f"an NSD in mm goes with the protocol medsam, not with {name}")
    if seed < 0:
        raise InputError(f"seed {seed}: expected 0 or more")
    return EvaluationProtocol(
        base.name, growth or base.growth, base.tolerance, millimetres, base.min_object_px, seed
    )
