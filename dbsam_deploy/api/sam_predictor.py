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

from ..core.errors import InputError
from ..core.imaging import upscale_logits
from ..images.volumes import Volume
from ..prediction.results import Result
from .loading import load
from .model import Model

SamAnswer = tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class SamPredictor:
    """A `Model` with the calls and answers of `segment_anything.SamPredictor`.

    Args:
        sam_model: an opened model.
    """

    def __init__(self, sam_model: Model) -> None:
        self.model = sam_model
        self._image: Volume | None = None

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image to predict on."""
        return self._image is not None

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
        if self._image is None:
            raise InputError("no image: call set_image before predict")
        result: Result = self.model.predict(
            self._image,
            point_coords=point_coords,
            point_labels=point_labels,
            box=box,
            mask_input=mask_input,
            multimask_output=multimask_output,
        )
        masks, ious, logits = result
        if return_logits:
            how = self.model.preprocessing
            if how is None:
                raise InputError("return_logits: a server's model gives low-resolution logits only")
            size = (masks.shape[1], masks.shape[2])
            masks = np.stack([upscale_logits(one, size, how) for one in logits])
        return masks, ious, logits


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
    db_sam=_build("db_sam"),
    db_sam_tiny=_build("db_sam_tiny"),
    sam_vit_b=_build("sam_vit_b"),
    medsam_vit_b=_build("medsam_vit_b"),
    lite_medsam=_build("lite_medsam"),
)
"""Name → function of a checkpoint; `vit_b` tells the variant by the checkpoint's keys."""
