"""What is asked of one study: named objects, each with prompts on slices, a 3D box, or both.

Nothing here depends on a volume, so that one set of prompts goes with many studies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from ..outputs.segmentation import CodedTerm
from ..prediction.prompts import Prompts
from .frames import Plane, Space
from .places import Prompt

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class SlicePrompt:
    """A box, points, or both, of one object on one slice.

    In voxels, a place on a slice has two coordinates, pixels from the first pixel's corner: x and y
    on a stored slice (slice k is `pixels[k]`), and in any case the slice's two voxel axes in the
    order x, y, z, see `planes`. In millimetres a place has three.

    Attributes:
        box: two opposite corners, lower values first in voxels: 4 numbers, or 6 in millimetres.
        points: coordinates and, last, 1 inside or 0 outside.
        index: which slice of the plane, from 0; None in millimetres, which say it themselves.
        plane: of the slice.
    """

    box: Numbers | None = None
    points: tuple[Numbers, ...] = ()
    index: int | None = None
    plane: Plane = "stored"

    @property
    def asked(self) -> Prompt:
        """What a session is asked on this slice."""
        points = [point[:-1] for point in self.points] or None
        labels = [int(point[-1]) for point in self.points] or None
        return {"box": self.box, "points": points, "labels": labels, "index": self.index}


@dataclass(frozen=True)
class ObjectPrompts:
    """One object that is looked for; its label is its position among all of them, from 1.

    Attributes:
        name: what the user calls it.
        prompts: on slices.
        box_3d: x0, y0, z0, x1, y1, z1, slices z0 … z1 - 1; two opposite corners in millimetres. The
            object lies within these slices, and without `prompts` is looked for in it.
        colour: red, green, blue, 0–255.
        code: what it is, in a coding scheme.
    """

    name: str
    prompts: tuple[SlicePrompt, ...] = ()
    box_3d: Numbers | None = None
    colour: tuple[int, int, int] | None = None
    code: CodedTerm | None = None

    @property
    def plane(self) -> Plane:
        """On whose slices it is looked for."""
        return self.prompts[0].plane if self.prompts else "stored"


@dataclass(frozen=True)
class StudyPrompts:
    """All that is asked of a study.

    Attributes:
        objects: at least one.
        propagate: carry each object from its prompted slices to the others, without which a 3D box
            is refused; else only those slices are segmented.
        space: of all coordinates: `voxel`, or millimetres towards left, posterior and head (`lps`,
            as DICOM has them) or right, anterior and head (`ras`, as NIfTI has them).
    """

    objects: tuple[ObjectPrompts, ...]
    propagate: bool = True
    space: Space = "voxel"


def from_prompts(prompts: Prompts, *, propagate: bool) -> StudyPrompts:
    """The prompts of a command line or program, each of which is an object.

    Args:
        prompts: without `mask_input` and `multimask`.
        propagate: see `StudyPrompts`; 3D boxes are carried in any case.

    Raises:
        InputError: an earlier mask or alternatives, which are of one slice.
    """
    if prompts.mask_input is not None or prompts.multimask:
        raise InputError("earlier masks and alternatives are of one slice: drop propagate")
    names = prompts.names
    if prompts.boxes_3d is not None:
        boxes = [tuple(map(float, box)) for box in prompts.boxes_3d]
        objects = [ObjectPrompts(name, box_3d=box) for name, box in zip(names, boxes, strict=True)]
        return StudyPrompts(tuple(objects))
    objects = [ObjectPrompts(name, (_of_slice(prompts, row),)) for row, name in enumerate(names)]
    return StudyPrompts(tuple(objects), propagate)


def _of_slice(prompts: Prompts, row: int) -> SlicePrompt:
    coords, labels, boxes = prompts.point_coords, prompts.point_labels, prompts.boxes
    points: list[Any] = []
    if coords is not None and labels is not None:
        given = zip(coords[row].tolist(), labels[row].tolist(), strict=True)
        points = [(*place, label) for place, label in given if label >= 0]
    box = None if boxes is None else tuple(map(float, boxes[row]))
    return SlicePrompt(box, tuple(points), prompts.slice_index)
