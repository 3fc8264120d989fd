"""Training on windows of the model frame, with the weights of the whole frame.

A 512 px window costs a tenth of a 1024 px frame (global attention grows with the square of its
tokens), and at equal scale it teaches the same features. A skeleton of the window's size runs with
the model's own parameters; only the position tables are cut to the window.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.contract import PATCH_SIZE
from ..core.errors import InputError
from ..model import DbSam

_POSITION = "image_encoder.pos_embed"


class _Encode(nn.Module):
    """`DbSam.encode` as a forward, for `functional_call`."""

    def __init__(self, model: DbSam) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode(image)


class CropEncoder:
    """Encodes windows of a model's frame with that model's parameters; gradients reach them.

    Args:
        model: the whole-frame model; its parameters are read at every call.
        crop_size: side of the window in px of the model frame.

    Raises:
        InputError: the window is no multiple of the patch size or larger than the frame.
    """

    def __init__(self, model: DbSam, crop_size: int) -> None:
        frame = model.config.image_size
        if crop_size % PATCH_SIZE or not 0 < crop_size <= frame:
            raise InputError(
                f"crop_size {crop_size}: expected a multiple of {PATCH_SIZE} up to the model "
                f"frame's {frame}"
            )
        with torch.device("meta"):
            skeleton = DbSam(replace(model.config, image_size=crop_size))
        self.grid = crop_size // PATCH_SIZE
        self._model = model
        self._skeleton = _Encode(skeleton.train(model.training))
        self._shapes = {k: v.shape for k, v in skeleton.image_encoder.state_dict().items()}

    def __call__(self, crops: Tensor, corners: Tensor) -> Tensor:
        """Encode windows.

        Args:
            crops: (B, 3, C, C) float32, cut from model frames.
            corners: (B, 2) int64, row and column of each window's first token in the frame's grid.

        Returns:
            image_embeddings (B, 256, C/16, C/16).
        """
        tensors = {}
        for name, tensor in self._model.image_encoder.state_dict(keep_vars=True).items():
            key = f"image_encoder.{name}"
            if key == _POSITION:
                tensor = self._position(tensor, corners)
            elif ".attn.rel_pos_" in name:
                # tables are centred on distance 0
                keep = self._shapes[name][0]
                start = (tensor.shape[0] - keep) // 2
                tensor = tensor[start : start + keep]
            tensors[f"model.{key}"] = tensor
        self._skeleton.train(self._model.training)
        encoded: Tensor = functional_call(self._skeleton, tensors, (crops,))
        return encoded

    def _position(self, table: Tensor, corners: Tensor) -> Tensor:
        rows = [table[0, r : r + self.grid, c : c + self.grid] for r, c in corners.tolist()]
        return torch.stack(rows)
