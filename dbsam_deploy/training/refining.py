"""The objective of the phase `refine`: all of SAM's masks for clicks, boxes and corrections."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.imaging import FloatArray
from ..extras import require
from ..model import DbSam
from ..verification.cases import deepest_point
from .clicks import KINDS
from .live_decoder import GivenPrompts, LiveDecoder
from .objectives import Batch, Losses, object_losses
from .recipe import Refine


class RefineObjective(nn.Module):
    """Dice + cross-entropy of the single mask, and of the best of the three of `multimask`.

    Args:
        model: neck, prompt encoder and decoder are trained.
        phase: weights of the parts.

    Raises:
        EngineError: MONAI is not installed.
    """

    def __init__(self, model: DbSam, phase: Refine) -> None:
        super().__init__()
        self.model = model
        self._decode = LiveDecoder(model)
        self._weights = phase.multimask_weight, phase.iou_weight
        require("monai.losses", extra="train", what_for="training")

    def forward(self, batch: Batch) -> Losses:
        """Loss of one batch.

        Args:
            batch: `features` (B, C, G, G), `kind` (B,), `boxes` (B, N, 4) and `clicks` (B, N, 2)
                in the model frame, `labels` (B, N) of the clicks, `masks` (B, N, 4G, 4G) of 0, 1.

        Returns:
            `loss`, and of it `mask_loss` and `iou_loss`; `dice`, the mean over objects.
        """
        embeddings = self.model.image_encoder.neck(batch["features"])
        parts = [self._of_image(embeddings[i : i + 1], batch, i) for i in range(len(embeddings))]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _of_image(self, embeddings: Tensor, batch: Batch, index: int) -> Losses:
        truth = batch["masks"][index].float()[:, None]
        prompt = self._prompt(embeddings, batch, index)
        logits, iou = self._decode(embeddings, prompt)
        wide = truth.expand_as(logits)
        losses = object_losses(logits.flatten(0, 1)[:, None], wide.flatten(0, 1)[:, None])
        losses = losses.view(len(logits), -1)
        with torch.no_grad():
            dice, true_iou = _overlaps(logits, truth)
        of_three, of_iou = self._weights
        iou_loss = F.mse_loss(iou, true_iou)
        mask_loss = (losses[:, 0] + of_three * losses[:, 1:].amin(1)).mean()
        return {
            "loss": mask_loss + of_iou * iou_loss,
            "mask_loss": mask_loss.detach(),
            "iou_loss": iou_loss.detach(),
            "dice": dice[:, 0].mean(),
        }

    def _prompt(self, embeddings: Tensor, batch: Batch, index: int) -> GivenPrompts:
        kind = KINDS[int(batch["kind"][index])]
        boxes = batch["boxes"][index]
        clicks = batch["clicks"][index][:, None], batch["labels"][index][:, None]
        if kind == "box":
            return GivenPrompts(boxes)
        if kind == "click":
            return GivenPrompts(points=clicks)
        if kind == "box_click":
            return GivenPrompts(boxes, clicks)
        with torch.no_grad():
            first = self._decode(embeddings, GivenPrompts(boxes))[0][:, :1]
        found = (first[:, 0] > 0).cpu().numpy()
        step = self.model.config.frame.frame_side // found.shape[-1]
        places, labels = correct(found, batch["masks"][index].cpu().numpy() > 0)
        points = torch.from_numpy(places * step).to(boxes.device)[:, None]
        told = points, torch.from_numpy(labels).to(boxes.device)[:, None]
        return GivenPrompts(boxes, told, first)


def correct(
    found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Where a reader would click: into the larger of what is missing and what is too much.

    Args:
        found: (N, H, W) bool, the answers.
        truth: (N, H, W) bool.

    Returns:
        x, y (N, 2) float32 and labels (N,) int64: 1 inside the object, 0 outside. Where nothing is
        wrong, inside the object, or where there is none, label -1, which means no point.
    """
    places, labels = np.zeros((len(found), 2), np.float32), np.full(len(found), -1, np.int64)
    for i, (answer, mask) in enumerate(zip(found, truth, strict=True)):
        missing, surplus = mask & ~answer, answer & ~mask
        is_inside = bool(missing.sum() >= surplus.sum())
        wrong = missing if is_inside else surplus
        where = wrong if wrong.any() else mask
        if where.any():
            places[i], labels[i] = deepest_point(where), int(is_inside)
    return places, labels


def _overlaps(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU (N, M) of logits (N, M, H, W) with masks (N, 1, H, W)."""
    found = (logits > 0).float()
    overlap = (found * truth).sum((2, 3))
    total = found.sum((2, 3)) + truth.sum((2, 3))
    return 2 * overlap / total.clamp(min=1), overlap / (total - overlap).clamp(min=1)
