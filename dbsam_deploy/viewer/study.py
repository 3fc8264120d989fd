"""What a page works on: an image, and several objects with marks and a step back of their own."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.volumes import Volume, label_dtype
from ..outputs.files import content_of
from ..outputs.segmentation import Segmentation, SegmentedObject
from ..volumes.embeddings import SharedPredictor
from ..volumes.objects import slab
from ..volumes.stop_rules import MaskArray
from .marks import Mark, SeedMark
from .uploads import Upload, with_sources
from .workspace import LABEL, Redrawn, WorkRules, Workspace

COLOURS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
"""Okabe and Ito's, which colour-blind people tell apart; a page has as many objects."""
FORMATS = ("nifti", "dicom-seg", "rtstruct", "png", "npz")
"""What a page saves, the first that an image can have as its usual one."""
_LONGEST_NAME = 64


class PageObject(Workspace):
    """One object of a page: a workspace whose image was read here.

    Args:
        shared: the model.
        rules: see `WorkRules`.
        volume: the image; objects share its pixels, and the embeddings of its slices.
    """

    def __init__(self, shared: SharedPredictor, rules: WorkRules, volume: Volume) -> None:
        super().__init__(shared, rules)
        self._begin(volume)
        self.has_buffer = True

    def mask(self) -> MaskArray:
        """(D, H, W)."""
        return self._read(slab(self.shape))

    def confidence(self) -> npt.NDArray[np.float32]:
        """(D,), the model's estimate of each slice's IoU; NaN where it was not asked."""
        session = self._work()
        if not session.objects:
            return np.full(self.shape[0], np.nan, np.float32)
        return session.confidence(LABEL)

    def bring_back(self, mask: MaskArray) -> None:
        """Begin with what the page has of it, (D, H, W), behind which there is no step back."""
        self.seed(SeedMark(mask), runs=False)
        self._undo = None

    def rest(self) -> None:
        """Encode nothing ahead until the next mark."""
        self._work().slices.stop_ahead()


class PageStudy:
    """An image and its objects; used by one thread at a time.

    Args:
        shared: the model.
        rules: see `WorkRules`; the window is that of the image already.
        image: what was opened.
        upload: its files, kept for a format that refers to them; None where none does.
    """

    def __init__(
        self, shared: SharedPredictor, rules: WorkRules, image: Volume, upload: Upload | None
    ) -> None:
        self.image, self._shared, self._rules, self._upload = image, shared, rules, upload
        # Planes are those of the array here, whatever they are in a patient.
        self._plain = replace(image, kind="viewer", geometry=None, files=())
        self._objects: dict[int, PageObject] = {}

    def close(self) -> None:
        """Drop image and objects."""
        for one in self._objects.values():
            one.close()
        self._objects, self._upload = {}, None

    @property
    def nbytes(self) -> int:
        """Of the image, and of the files that are kept."""
        return self.image.pixels.nbytes + (self._upload.nbytes if self._upload else 0)

    @property
    def formats(self) -> tuple[str, ...]:
        """What it can be saved as, the usual one first."""
        fits = {
            "nifti": self.image.geometry is not None,
            "dicom-seg": self._upload is not None,
            "rtstruct": self._upload is not None,
            "png": not self.image.is_volume,
            "npz": True,
        }
        return tuple(name for name in FORMATS if fits[name])

    def mark(self, label: int, mark: Mark | None, *, through: bool) -> Redrawn:
        """Take a mark of an object.

        Args:
            label: from 1 to the number of `COLOURS`.
            mark: None for one outside the image.
            through: carry the object to other slices.
        """
        own = self._object(label)
        own.goes_through = through
        return own.add(mark, runs=True)

    def undo(self, label: int) -> Redrawn:
        """Take an object's last mark back."""
        return self._object(label).undo()

    def clear(self, label: int) -> None:
        """Forget an object."""
        self._object(label).reset()

    def seed(self, labels: npt.NDArray[np.uint8]) -> None:
        """Begin with masks that the page has: (D, H, W), bit n - 1 is label n."""
        for number in range(1, len(COLOURS) + 1):
            mask = labels & (1 << (number - 1)) != 0
            if mask.any():
                self._object(number).bring_back(mask)

    def saved(
        self, format_name: str, objects: tuple[SegmentedObject, ...], model: str, note: str
    ) -> bytes:
        """The objects as a file; where they overlap the higher label covers the lower.

        Args:
            format_name: of `formats`.
            objects: those that are saved, lower labels first.
            model: its name.
            note: what the user must know of it.

        Raises:
            InputError: no object, or a format that cannot hold it.
        """
        if format_name not in self.formats:
            raise InputError(f"format {format_name!r:.40}: expected {', '.join(self.formats)}")
        if not objects:
            raise InputError("no object yet: mark one")
        labels = np.zeros(self.image.shape, label_dtype(len(COLOURS)))
        confidence = []
        for one in objects:
            own = self._object(one.label)
            labels[own.mask()] = one.label
            confidence.append(own.confidence())
        with with_sources(self.image, self._upload) as image:
            found = Segmentation(image, labels, objects, np.array(confidence), model, note=note)
            return content_of(found, format_name)

    def _object(self, label: int) -> PageObject:
        for other, one in self._objects.items():
            if other != label:
                one.rest()
        if label not in self._objects:
            self._objects[label] = PageObject(self._shared, self._rules, self._plain)
        return self._objects[label]


def read_named(fields: Mapping[str, Any]) -> tuple[SegmentedObject, ...]:
    """The objects that a request names, lower labels first.

    Raises:
        InputError: another form.
    """
    given = fields.get("objects")
    if not isinstance(given, list) or len(given) > len(COLOURS):
        raise InputError(f"objects: expected a list of at most {len(COLOURS)}")
    found = {}
    for one in given:
        label, name = (one.get("label"), one.get("name")) if isinstance(one, dict) else (0, "")
        if type(label) is not int or not 1 <= label <= len(COLOURS) or not isinstance(name, str):
            raise InputError("objects: expected a label and a name each")
        printable = "".join(char for char in name if char.isprintable())[:_LONGEST_NAME].strip()
        name = printable or f"object {label}"
        found[label] = SegmentedObject(label, name, COLOURS[label - 1])
    return tuple(found[label] for label in sorted(found))


def shown_nifti(image: Volume) -> bytes:
    """The image as the model sees it, as a NIfTI-1 file for the page to show.

    Grey volumes are uint8, colours RGB. Without a place in a patient, columns run to the left and
    rows to the back, so that slices stand upright; so do single ones, wherever they lie. These are
    RGBA and turned by half a circle: of them NiiVue makes flat textures, without turning them.
    """
    pixels, (depth, height, width) = image.pixels, image.shape
    if image.geometry is not None and image.is_volume:
        affine = np.array(image.geometry.affine, float)
    else:
        dz, dy, dx = image.spacing_mm or (1.0, 1.0, 1.0)
        affine = np.diag([-dx, -dy, dz, 1.0])
    if not image.is_volume:
        rgb = image.slice_rgb(0)
        pixels = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])[None, ::-1, ::-1]
    channels = 1 if pixels.ndim == 3 else pixels.shape[-1]
    code = {1: 2, 3: 128, 4: 2304}[channels]
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, width, height, depth, 1, 1, 1, 1)
    struct.pack_into("<hh", head, 70, code, 8 * channels)
    struct.pack_into("<8f", head, 76, 1, *steps, 1, 1, 1, 1)
    struct.pack_into("<fff", head, 108, 352, 1, 0)
    struct.pack_into("<B", head, 123, 2)  # millimetres
    struct.pack_into("<ff", head, 124, 255, 0)  # white and black
    struct.pack_into("<hh", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, *affine[:3].ravel())
    head[344:348] = b"n+1\0"
    return b"".join((head, np.ascontiguousarray(pixels).data))


def inflated(body: bytes | bytearray, size: int) -> bytes:
    """A gzip stream that holds so many bytes, and no more than these are ever made.

    Raises:
        InputError: another number, or no gzip.
    """
    stream = zlib.decompressobj(wbits=31)
    try:
        out = stream.decompress(body, size + 1)
    except zlib.error as error:
        raise InputError("the masks are no gzip stream") from error
    if len(out) != size or not stream.eof:
        raise InputError(f"masks of {len(out)} bytes: expected {size}")
    return out
