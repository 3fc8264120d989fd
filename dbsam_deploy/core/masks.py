"""What a model answers for the prompts of one image, wherever it ran."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError
from .imaging import ByteArray, FloatArray


@dataclass(frozen=True, eq=False)
class Prediction:
    """Masks of N prompts of one image, from a model in this process or from a server.

    Attributes:
        masks: (N, M, H, W) uint8 in the image frame, 1 inside; M is 1, or 3 with multimask.
        ious: (N, M) float32, the decoder's own estimate of each mask's IoU.
        logits: (N, M, 4G, 4G) float32 on the mask grid, usable as a later `mask_input`; None where
            they were not asked for.
    """

    masks: ByteArray
    ious: FloatArray
    logits: FloatArray | None = None

    def known_logits(self) -> FloatArray:
        """The logits, where they are needed.

        Raises:
            InputError: they were not asked for.
        """
        if self.logits is None:
            raise InputError("these masks came without logits: ask the model for them too")
        return self.logits
