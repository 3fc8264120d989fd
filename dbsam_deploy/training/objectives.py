"""What training minimises, as modules: a batch in, a loss and its parts out.

Each is one `forward` over everything that is trained, as data-parallel wrappers need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import require
from ..model import DbSam
from .crops import CropEncoder

if TYPE_CHECKING:
    from monai.losses import DiceCELoss

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
"""Scalars by name; `loss` is the one that is minimised."""


class EmbeddingObjective(nn.Module):
    """Mean squared error between the student's and the teacher's embeddings, over their variance.

    Args:
        model: the student.
        crop_size: side of the window in px, 0 for whole frames.
        variance: of the teacher's embeddings; a constant, so that the mean over batches of any
            size and on any number of processes is the same.
    """

    def __init__(self, model: DbSam, crop_size: int, variance: float) -> None:
        super().__init__()
        self.model = model
        self._variance = variance
        self._crops = CropEncoder(model, crop_size) if crop_size else None

    def forward(self, batch: Batch) -> Losses:
        """Loss of one batch.

        Args:
            batch: `pixels` (B, 3, C, C), `corners` (B, 2), `embeddings` (B, 256, C/16, C/16).

        Returns:
            `loss` (0: equal, 1: as good as the teacher's mean) and `cosine`, the mean over tokens.
        """
        target = batch["embeddings"].float()
        if self._crops is None:
            encoded = self.model.encode(batch["pixels"])
        else:
            encoded = self._crops(batch["pixels"], batch["corners"])
        encoded = encoded.float()
        loss = F.mse_loss(encoded, target) / self._variance
        cosine = F.cosine_similarity(encoded.detach(), target, dim=1).mean()
        return {"loss": loss, "cosine": cosine}


class MaskObjective(nn.Module):
    """Dice + binary cross-entropy on the low-resolution logits of mask token 0.

    The loss is MONAI's `DiceCELoss(include_background, sigmoid, squared_pred)`, as in the official
    code, in a version (≥ 1.3) whose cross-entropy of a single channel is the binary one; in 1.1 it
    was 0 for every input.

    Args:
        model: what is trained.
        iou_weight: weight of the squared error of `iou_predictions` against the true IoU.

    Raises:
        EngineError: MONAI is not installed.
    """

    def __init__(self, model: DbSam, iou_weight: float) -> None:
        super().__init__()
        self.model = model
        self.iou_weight = iou_weight
        self._mask_loss = mask_loss()

    def forward(self, batch: Batch) -> Losses:
        """Loss of one batch.

        Args:
            batch: `pixels` (B, 3, S, S), `boxes` (B, N, 4) in the model frame, `masks`
                (B, N, 4G, 4G) of 0 and 1.

        Returns:
            `loss`, and of it `mask_loss` and `iou_loss`; `dice`, the mean over objects.
        """
        logits, iou = self.model(batch["pixels"], batch["boxes"])
        logits = logits.float().flatten(0, 1)
        truth = batch["masks"].float().flatten(0, 1)[:, None]
        mask_loss_ = self._mask_loss(logits, truth)
        with torch.no_grad():
            found = (logits > 0).float()
            overlap = (found * truth).sum((1, 2, 3))
            total = found.sum((1, 2, 3)) + truth.sum((1, 2, 3))
            dice = 2 * overlap / total.clamp(min=1)
            true_iou = overlap / (total - overlap).clamp(min=1)
        iou_loss = F.mse_loss(iou.float().flatten(), true_iou)
        loss = mask_loss_ + self.iou_weight * iou_loss
        return {
            "loss": loss,
            "mask_loss": mask_loss_.detach(),
            "iou_loss": iou_loss.detach(),
            "dice": dice.mean(),
        }


def mask_loss() -> DiceCELoss:
    """The loss of `MaskObjective`.

    Raises:
        EngineError: MONAI is not installed.
    """
    require("monai.losses", extra="train", what_for="training")
    from monai.losses import DiceCELoss

    return DiceCELoss(include_background=True, sigmoid=True, squared_pred=True)


def object_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """`mask_loss` of each object alone, which MONAI's does not offer.

    Args:
        logits: (N, 1, H, W) float32.
        truth: (N, 1, H, W) of 0 and 1.

    Returns:
        (N,); their mean is `mask_loss`.
    """
    from monai.losses import DiceLoss

    dice = DiceLoss(include_background=True, sigmoid=True, squared_pred=True, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    found: Tensor = dice(logits, truth).flatten(1).mean(1) + entropy.flatten(1).mean(1)
    return found


def set_trained(model: DbSam, how: str) -> list[str]:
    """Set which parameters are trained.

    Args:
        model: changed in place.
        how: `paper`, `as_coded`, `none` or `trunk`, see `dbsam_deploy.training.recipe.Phase`.

    Returns:
        Names of the trained parameters.
    """
    fixed: tuple[str, ...] = ()
    if how in ("paper", "as_coded"):
        fixed = ("image_encoder.pos_embed", "image_encoder.patch_embed.", "image_encoder.blocks.")
    if how == "paper":
        fixed = (*fixed, "prompt_encoder.")
    if how == "trunk":
        names = [name for name, _ in model.image_encoder.named_children() if name != "neck"]
        fixed = ("image_encoder.pos_embed", *(f"image_encoder.{name}." for name in names))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed) if fixed else True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def calibrate_batch_norm(branch: nn.Module, batches: list[Tensor]) -> None:
    """Set BatchNorm statistics from data once; training then runs with them fixed.

    The official code synchronises BatchNorm over processes (GPU only) at one image each; fixed
    statistics give the same gradients on any number of processes.

    Args:
        branch: the convolution branch, changed in place and left in evaluation mode.
        batches: (B, 3, H, W) pixels; the branch takes windows of any size.
    """
    norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for pixels in batches:
            branch(pixels)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    branch.eval()
