"""One opened model, wherever it runs, and what a program asks of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from ..core.errors import InputError, ServingError
from ..core.imaging import FloatArray, Preprocessing
from ..core.points import NATIVE, POINTS, SILENT_SERVER, PointRules
from ..images.arrays import ImageLike, ReadOptions, as_volume
from ..images.intensity import Window
from ..images.volumes import Volume
from ..outputs.segmentation import Segmentation
from ..prediction.predictor import Predictor, Promptable, ServedPredictor
from ..prediction.prompts import Prompts, check_prompts
from ..prediction.results import Result
from ..prediction.segment import Progress, segment
from ..prediction.turns import Turns
from ..volumes.embeddings import SharedPredictor
from ..volumes.label_map import AboutModel
from ..volumes.session import VolumePredictor
from ..volumes.study import result_of, segment_study
from ..volumes.study_prompts import StudyPrompts, from_prompts
from .arguments import SamNames, own_boxes, prompts_of, renamed

_OF_SET_IMAGE: Any = object()
"""No image was named; not None, which is what OpenCV gives for a file that it cannot read."""


class Model:
    """An opened model; a context manager that frees what it holds.

    Calls of several threads wait for each other, and share the image of `set_image`.

    Attributes:
        name: variant and precision, or the server, in words.
        backend: the runtime.
        preprocessing: how images enter the model; None where only the server knows.
        predictor: what is asked in the end.
        image: that of `set_image`; None before, and after one that was not usable.
    """

    def __init__(
        self,
        predictor: Promptable,
        *,
        name: str,
        backend: str,
        preprocessing: Preprocessing | None = None,
        weights: dict[str, Any] | None = None,
        note: str | None = "",
        reopen: Callable[[str], Model] | None = None,
    ) -> None:
        self.predictor = predictor
        self.name, self.backend, self._note = name, backend, note
        self.preprocessing = preprocessing
        self.weights = weights or {}
        self._reopen = reopen
        self.image: Volume | None = None
        self._lock = Turns()
        self._shared: SharedPredictor | None = None

    def __repr__(self) -> str:
        return f"Model({self.name} on {self.backend})"

    @property
    def note(self) -> str:
        """What the user must know, for example that the weights are untrained; else empty.

        A server is asked once, when somebody first wants to know.
        """
        if self._note is None and isinstance(self.predictor, ServedPredictor):
            try:
                self._note = self.predictor.client.note()
            except (InputError, ServingError) as error:  # a proxy may keep it to itself
                return f"the server does not say whether its weights are trained ({error.message})"
        return self._note or ""

    @note.setter
    def note(self, text: str) -> None:
        self._note = text

    @property
    def points(self) -> PointRules | None:
        """How prompts with points are answered; None where a server does not say it."""
        found: PointRules | None = getattr(self.predictor, "points", NATIVE)
        return found

    @property
    def points_note(self) -> str:
        """What the user must know of it: for example that the export does not say it."""
        if self.points is None:
            return SILENT_SERVER
        return str(self.weights.get(POINTS, {}).get("note", ""))

    @property
    def weights_key(self) -> str:
        """What tells its answers from those of other weights; of a server, nothing."""
        rules = self.predictor.points if isinstance(self.predictor, Predictor) else ""
        return f"{self.weights.get('sha256', '')} {rules}"

    def describe(self) -> str:
        """Name, runtime and preprocessing in one line."""
        how = self.preprocessing
        text = f"{self.name} on {self.backend}"
        return text if how is None else f"{text}, {how.mode} at {how.image_size} pixels"

    def set_image(
        self,
        image: ImageLike,
        image_format: str = "RGB",
        **reading: Unpack[ReadOptions],
    ) -> None:
        """Take an image for the `predict` calls that name none, and encode it.

        Args:
            image: see `predict`; of one slice.
            image_format: `RGB`, or `BGR` for colours as OpenCV reads them.
            **reading: `window`, `series` and `volume`, see `predict`.

        Raises:
            InputError: not one image, or another format.
        """
        self.image = None  # never answer for the one before
        if image_format not in ("RGB", "BGR"):
            raise InputError(f"image_format {image_format!r}: expected RGB or BGR")
        read = as_volume(image, **reading)
        if read.is_volume:
            raise InputError(f"{read.path} has {read.shape[0]} slices: expected one image")
        if image_format == "BGR" and read.pixels.ndim == 4:
            read = dataclasses.replace(read, pixels=np.ascontiguousarray(read.pixels[..., ::-1]))
        with self._lock:
            self.predictor.set_image(read.slice_rgb(0))
            self.image = read

    def predict(
        self,
        image: ImageLike = _OF_SET_IMAGE,
        *,
        boxes: Any = None,
        points: Any = None,
        labels: Any = None,
        mask_input: Any = None,
        multimask: bool = False,
        adapt_points: bool = True,
        boxes_3d: Any = None,
        slice_index: int | None = None,
        window: Window | str | None = None,
        series: str | int | None = None,
        volume: int | None = None,
        **sam: Unpack[SamNames],
    ) -> Result:
        """Masks of an image, each prompt's own, with their IoU and logits.

        An image that comes back is not encoded again. Coordinates are pixels of the stored image:
        x to the right, y down, from the top-left pixel's top-left corner.

        Args:
            image: path, PIL image, NumPy array, list, torch tensor or `Volume`, see `as_volume`;
                without it that of `set_image`.
            boxes: (N, 4) or (4,) x0, y0, x1, y1, one object each; without any prompt the boxes that
                the image's own file holds.
            points: (P, 2) x, y of one object, or (N, P, 2) of N.
            labels: of the points, 1 inside and 0 outside; without it all are inside.
            mask_input: (N, 4G, 4G) or (4G, 4G), an earlier result's `logits[:, m]`.
            multimask: three alternatives for each prompt.
            adapt_points: answer points as `points` says; else as the decoder does.
            boxes_3d: (N, 6) x0, y0, z0, x1, y1, z1 in a volume: slices z0 … z1 - 1.
            slice_index: which slice of a volume.
            window: (level, width) that maps stored values to 0–255, or "file", see `read_image`.
            series: of a DICOM folder, see `read_image`.
            volume: which one of a 4D NIfTI file, from 0.
            sam: SAM's names of the same, see `SamNames`.

        Raises:
            InputError: no image or prompt, or one that is not usable.
            ServingError: a server that does not answer.
        """
        boxes, points, labels = renamed(sam, boxes, points, labels)
        prompts = prompts_of(boxes, points, labels, mask_input, boxes_3d)
        three = bool(multimask or sam.get("multimask_output"))
        prompts = dataclasses.replace(prompts, multimask=three, slice_index=slice_index)
        prompts = dataclasses.replace(prompts, adapt_points=adapt_points)
        taken = self._taken(image, window=window, series=series, volume=volume)
        return self.run(taken, prompts, keep_masks=True)

    def volume(
        self,
        image: ImageLike,
        *,
        encode_ahead: bool = True,
        **reading: Unpack[ReadOptions],
    ) -> VolumePredictor:
        """A session on a volume: prompts on its slices, carried to the others, and taken back.

        Sessions of one model share its embeddings: 512 MiB in memory, then a scratch file.

        Args:
            image: see `predict`; of any number of slices.
            encode_ahead: encode slices in a thread, outwards from the last prompted one, while no
                prompt waits.
            **reading: `window`, `series` and `volume`, see `predict`.

        Raises:
            InputError: an image that is not usable.
        """
        read = as_volume(image, **reading)
        with self._lock:
            if self._shared is None:
                self._shared = SharedPredictor(self.predictor, turns=self._lock)
        return VolumePredictor(
            self._shared, read, about=AboutModel(self.name, self.note), encode_ahead=encode_ahead
        )

    def _taken(self, image: ImageLike, **how: Any) -> Volume:
        if image is not _OF_SET_IMAGE:
            return as_volume(image, **how)
        if self.image is None:
            raise InputError("no image: give one, or call set_image before")
        if given := [name for name, value in how.items() if value is not None]:
            raise InputError(f"{given[0]} goes with an image: give it to set_image")
        return self.image

    def segment(
        self,
        image: ImageLike,
        *,
        boxes: Any = None,
        points: Any = None,
        labels: Any = None,
        boxes_3d: Any = None,
        multimask: bool = False,
        slice_index: int | None = None,
        propagate: bool = True,
        progress: Progress | None = None,
        **reading: Unpack[ReadOptions],
    ) -> Result:
        """One label map of an image or volume; memory does not grow with the number of prompts.

        Args:
            image: see `predict`.
            boxes: see `predict`.
            points: see `predict`.
            labels: see `predict`.
            boxes_3d: (N, 6) x0, y0, z0, x1, y1, z1 in a volume: slices z0 … z1 - 1.
            multimask: three alternatives for each prompt, of which the best is kept.
            slice_index: which slice of a volume, for all but 3D boxes.
            propagate: find the object of a 3D box on its middle slice and carry it to the others,
                mask by mask; else the same 2D box is put on each slice.
            progress: called with slices done and slices in all.
            **reading: `window`, `series` and `volume`, see `predict`.

        Raises:
            InputError: no prompt, or an image or prompt that is not usable.
            ServingError: a server that does not answer.
        """
        prompts = prompts_of(boxes, points, labels, None, boxes_3d)
        prompts = dataclasses.replace(prompts, multimask=multimask, slice_index=slice_index)
        read = as_volume(image, **reading)
        return self.run(read, prompts, progress, propagate=propagate)

    def run(
        self,
        volume: Volume,
        prompts: Prompts,
        progress: Progress | None = None,
        *,
        keep_masks: bool = False,
        propagate: bool = True,
    ) -> Result:
        """Segment a volume that was read, with prompts that were made; see `segment`."""
        if not prompts.given:
            prompts = own_boxes(prompts, volume)
        if prompts.boxes_3d is not None and propagate:
            prompts = check_prompts(prompts, volume)
            spec = from_prompts(prompts, propagate=True)
            return result_of(self.study(volume, spec, progress=progress), prompts)
        told = {} if progress is None else {"progress": progress}
        with self._lock:  # the predictor holds one image at a time
            result = segment(self.predictor, volume, prompts, **told, keep_masks=keep_masks)
        notes = filter(None, [self.note, self.points_note if prompts.has_adapted_points else ""])
        return dataclasses.replace(result, note="; ".join(notes))

    def study(
        self,
        volume: Volume,
        spec: StudyPrompts,
        *,
        fractions: bool = False,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
        checkpoint: Path | None = None,
    ) -> Segmentation:
        """Named objects, carried through a volume; see `volumes.study.segment_study`."""
        told: dict[str, Any] = {"progress": progress, "say": say}
        return segment_study(
            self.predictor,
            volume,
            spec,
            about=AboutModel(self.describe(), self.note, self.weights_key),
            fractions=fractions,
            checkpoint=checkpoint,
            turns=self._lock,  # of each slice, so that other calls go between
            **{name: call for name, call in told.items() if call is not None},
        )

    def embedding(self, image: ImageLike = _OF_SET_IMAGE) -> FloatArray:
        """The encoder's output for an image, (1, 256, G, G); computed if it is not kept.

        Args:
            image: see `predict`; of one slice. Without it that of `set_image`.

        Raises:
            InputError: no image, several slices, or a server's model, which keeps its own.
        """
        if not isinstance(self.predictor, Predictor):
            raise InputError(f"{self.name} keeps its embeddings: they are not sent")
        read = self._taken(image)
        if read.is_volume:
            raise InputError(f"{read.path} has {read.shape[0]} slices: expected one image")
        with self._lock:
            self.predictor.set_image(read.slice_rgb(0))
            return self.predictor.image_embeddings

    @property
    def device(self) -> str:
        """Where tensors for it belong, `cpu` or `cuda`; a server takes them from the CPU."""
        return "cuda" if self.backend.endswith("-cuda") else "cpu"

    def eval(self) -> Self:
        """This model, as in SAM's code; it is never in training."""
        return self

    def to(self, device: Any) -> Self:
        """This model on another device (`cpu` or `cuda`), as in SAM's code; opens it anew.

        Raises:
            InputError: a server's model, or a device that its backend does not have.
            EngineError: the device is not there.
        """
        name, _, number = str(device).partition(":")
        if number not in ("", "0"):
            raise InputError(f"device {device}: expected cpu or cuda, which is the first GPU")
        if self._reopen is None:
            raise InputError(f"{self.name}: where a server's model runs is the server's business")
        if name not in {"cpu", "cuda"} & {*self.backend.split("-")}:  # openvino-cpu-float32
            opened = self._reopen(name)
            self._close_volumes()
            self.__dict__.update(opened.__dict__)
        return self

    def close(self) -> None:
        """Close the connection to a server, and drop the embeddings of volumes."""
        self._close_volumes()
        if isinstance(self.predictor, ServedPredictor):
            self.predictor.client.close()

    def _close_volumes(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
