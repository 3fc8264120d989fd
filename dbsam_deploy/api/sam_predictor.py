"""segment-anything's names on this library's models, so that its code runs by another import.

from dbsam_deploy import SamPredictor, sam_model_registry

sam = sam_model_registry["vit_b"](checkpoint="medsam_vit_b.pth")
predictor = SamPredictor(sam)
predictor.set_image(image)
masks, scores, logits = predictor.predict(box=box, multimask_output=False)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalogue import VARIANT_NAMES
from ..core.contract import BOXES, MASK_INPUT, POINT_COORDS
from ..core.errors import InputError
from ..core.imaging import FloatArray, Preprocessing, to_image_frame, to_model_frame, upscale_logits
from ..extras import require
from ..images.arrays import as_array
from ..images.volumes import Volume
from ..prediction.results import Result
from .loading import load
from .model import Model

SamAnswer = tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class SamTransform:
    """Prompts of the image → the model's frame, by the names of SAM's `ResizeLongestSide`.

    Coordinates only: `set_image` takes images as they are.

    Args:
        how: the model's preprocessing; in mode `medsam` both axes are stretched on their own.
    """

    def __init__(self, how: Preprocessing) -> None:
        self.target_length = how.frame_side
        self._how = how

    def apply_coords(self, coords: Any, original_size: tuple[int, ...]) -> FloatArray:
        """(..., 2) x, y in pixels of an image of `original_size` (H, W) → model frame, float32."""
        size = (original_size[0], original_size[1])
        return to_model_frame(as_array("coords", coords), size, self._how)

    def apply_boxes(self, boxes: Any, original_size: tuple[int, ...]) -> FloatArray:
        """Boxes, (N, 4) or (4,) → (N, 4) in the model frame."""
        corners = as_array("boxes", boxes).reshape(-1, 2, 2)
        return self.apply_coords(corners, original_size).reshape(-1, 4)

    def apply_coords_torch(self, coords: Any, original_size: tuple[int, ...]) -> Any:
        """`apply_coords` of a tensor, as a tensor on its device."""
        return _tensor(self.apply_coords(coords, original_size), coords.device)

    def apply_boxes_torch(self, boxes: Any, original_size: tuple[int, ...]) -> Any:
        """`apply_boxes` of a tensor, as a tensor on its device."""
        return _tensor(self.apply_boxes(boxes, original_size), boxes.device)


class SamPredictor:
    """A `Model` with the calls and answers of `segment_anything.SamPredictor`.

    Args:
        sam_model: an opened model.
        adapt_points: see `Model.predict`.
    """

    def __init__(self, sam_model: Model, *, adapt_points: bool = True) -> None:
        self.model, self._adapt_points = sam_model, adapt_points
        self._image: Volume | None = None

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image to predict on."""
        return self._image is not None

    @property
    def device(self) -> Any:
        """The model's, a `torch.device`."""
        return _torch().device(self.model.device)

    @property
    def transform(self) -> SamTransform:
        """Takes prompts to the frame of `predict_torch`."""
        return SamTransform(self._how("transform"))

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the image that was set."""
        height, width = self._set_image().shape[1:3]
        return height, width

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that it fills in the model's frame."""
        return self._how("input_size").content_size(self.original_size)

    @property
    def features(self) -> Any:
        """Its embedding, a (1, 256, G, G) tensor on `device`; None before `set_image`."""
        if self._image is None:
            return None
        return _tensor(self.model.embedding(self._image), self.device)

    def get_image_embedding(self) -> Any:
        """`features`, which must be there."""
        self._set_image()
        return self.features

    def _set_image(self) -> Volume:
        if self._image is None:
            raise InputError("no image: call set_image before predict")
        return self._image

    def _how(self, name: str) -> Preprocessing:
        how = self.model.preprocessing
        if how is None:
            raise InputError(f"{name}: only a server's own code knows its model's frame")
        return how

    def set_image(self, image: npt.NDArray[Any], image_format: str = "RGB") -> None:
        """Take and encode an image; see `Model.set_image`."""
        self._image = None
        self.model.set_image(image, image_format)
        self._image = self.model.image  # another predictor of this model may set its own

    def reset_image(self) -> None:
        """Forget the image."""
        self._image = None

    def predict(
        self,
        point_coords: npt.NDArray[Any] | None = None,
        point_labels: npt.NDArray[Any] | None = None,
        box: npt.NDArray[Any] | None = None,
        mask_input: npt.NDArray[Any] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> SamAnswer:
        """Masks of one object of the image that was set.

        Args:
            point_coords: (P, 2) x, y in pixels of the image.
            point_labels: (P,) 1 inside, 0 outside.
            box: (4,) or (1, 4) x0, y0, x1, y1.
            mask_input: (1, 4G, 4G) logits of an earlier answer.
            multimask_output: three masks instead of one.
            return_logits: logits at full size in place of masks.

        Returns:
            masks (C, H, W) bool, or float32 logits; IoU (C,); logits (C, 4G, 4G).

        Raises:
            InputError: no image was set, or a prompt is not usable.
        """
        result: Result = self.model.predict(
            self._set_image(),
            point_coords=point_coords,
            point_labels=point_labels,
            box=box,
            mask_input=mask_input,
            multimask_output=multimask_output,
            adapt_points=self._adapt_points,
        )
        masks, ious, logits = result
        return self._full_size(logits) if return_logits else masks, ious, logits

    def predict_torch(
        self,
        point_coords: Any,
        point_labels: Any,
        boxes: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Masks of B objects at once, from tensors, with prompts in the model's frame.

        Args:
            point_coords: (B, P, 2) x, y from `transform.apply_coords_torch`, or None.
            point_labels: (B, P) 1 inside, 0 outside, or None.
            boxes: (B, 4) from `transform.apply_boxes_torch`.
            mask_input: (B, 1, 4G, 4G) logits of an earlier answer.
            multimask_output: three masks each instead of one.
            return_logits: logits at full size in place of masks.

        Returns:
            Tensors on `device`: masks (B, C, H, W) bool, or float32 logits; IoU (B, C); logits
            (B, C, 4G, 4G).

        Raises:
            InputError: no image was set, or a prompt is not usable.
        """
        image, size, how = self._set_image(), self.original_size, self._how("predict_torch")
        placed = [
            None if value is None else to_image_frame(as_array(name, value), size, how)
            for name, value in ((POINT_COORDS, point_coords), (BOXES, boxes))
        ]
        result = self.model.predict(
            image,
            points=placed[0],
            labels=point_labels,
            boxes=placed[1],
            mask_input=None if mask_input is None else as_array(MASK_INPUT, mask_input)[:, 0],
            multimask=multimask_output,
            adapt_points=self._adapt_points,
        )
        logits = result.logits
        if logits is None:
            raise InputError("predict_torch: this model gives no logits")
        masks = self._full_size(logits) if return_logits else result.masks.astype(bool)
        masks_t, ious_t, logits_t = (
            _tensor(array, self.device) for array in (masks, result.ious, logits)
        )
        return masks_t, ious_t, logits_t

    def _full_size(self, logits: FloatArray) -> FloatArray:
        """(..., 4G, 4G) → (..., H, W)."""
        size, how = self.original_size, self._how("return_logits")
        flat = [upscale_logits(one, size, how) for one in logits.reshape(-1, *logits.shape[-2:])]
        return np.stack(flat).reshape(*logits.shape[:-2], *size)


def _torch() -> Any:
    return require("torch", extra="export", what_for="SamPredictor with tensors")


def _tensor(array: npt.NDArray[Any], device: Any) -> Any:
    return _torch().as_tensor(np.ascontiguousarray(array), device=device)


def _build(variant: str | None) -> Callable[..., Model]:
    def build(checkpoint: str | Path | None = None, *, device: str | None = None) -> Model:
        """Open a weights file in PyTorch, by default on the CPU."""
        return load(checkpoint, backend="pytorch", variant=variant, device=device)

    return build


class _Registry(dict[str, Callable[..., Model]]):
    def __missing__(self, name: str) -> Callable[..., Model]:
        raise InputError(f"sam_model_registry[{name!r}]: expected one of {', '.join(self)}")


sam_model_registry: dict[str, Callable[..., Model]] = _Registry(
    vit_b=_build(None),
    vit_l=_build("sam_vit_l"),
    vit_h=_build("sam_vit_h"),
    vit_t=_build("mobile_sam"),
    **{name: _build(name) for name in VARIANT_NAMES},
)
"""Name → function of a checkpoint: SAM's and MobileSAM's own names, and all variants.

`vit_b` tells the variant by the checkpoint's keys.
"""
