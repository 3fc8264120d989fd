"""What a fixed encoder makes of augmented labelled images up to its neck, kept on disk.

The encoder is what a training step costs; once its features are kept, every visit of an image draws
new objects, boxes and clicks on it and runs only what comes after.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from ..core.errors import InputError
from ..core.imaging import FloatArray, preprocess
from ..model.weights import LoadedModel
from .bank import Autocast, Draws, Item, Make, NumberedFiles
from .samples import LabelMap, Sample

_STREAM = 4
"""Separates these draws from the other phases', which have the same seed."""


class FeatureBank(NumberedFiles):
    """Samples with the encoder's features."""

    def read(self, index: int) -> tuple[Sample, FloatArray]:
        """A sample with labels, and its features (C, G, G) float32, see `DbSam.trunk`.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self.path(index)
        image, labels, features = self.arrays(index, "image", "labels", "features")
        if image.ndim != 3 or labels.shape != image.shape[:2] or features.ndim != 3:
            raise InputError(
                f"{path}: image {image.shape}, labels {labels.shape}, features {features.shape}; "
                "expected (H, W, 3), (H, W) and (C, G, G); delete it and start again"
            )
        name = f"{path.parent.name}/{path.stem}"
        return Sample(name, image, labels.astype(np.int32)), features.astype(np.float32)


def open_feature_bank(root: Path, encoder: LoadedModel, draws: Draws, count: int) -> FeatureBank:
    """The bank of the first samples, a folder in `root` that is named by what it is made of.

    The encoder is told by what its trunk computes with, so that a resumed run, whose neck has
    learned, finds the bank that it began.
    """
    digest = hashlib.sha256()
    for name, tensor in encoder.model.image_encoder.state_dict().items():
        if not name.startswith("neck."):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    digest.update(json.dumps(draws.described).encode())
    folder = root / f"features-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return FeatureBank(folder, count)


def features_by(encoder: LoadedModel, draws: Draws, autocast: Autocast) -> Make:
    """What fills a bank.

    Args:
        encoder: runs where its parameters are.
        draws: of labelled images.
        autocast: precision of the encoder's pass.

    Returns:
        Number → a sample's `image` and `labels`, and its `features` (C, G, G) float16, which raises
        an InputError for an encoder without a neck, see `DbSam.trunk`.
    """
    device = next(encoder.model.parameters()).device

    def make(index: int) -> Item:
        sample = draws.sample(_STREAM, index)
        pixels = torch.from_numpy(preprocess(sample.image, encoder.preprocessing))
        with torch.no_grad(), autocast():
            features = encoder.model.trunk(pixels.to(device))[0]
        half = features.cpu().to(torch.float16).numpy()
        return {"image": sample.image, "labels": _labels(sample), "features": half}

    return make


def _labels(sample: Sample) -> LabelMap:
    if sample.labels is None:
        raise InputError(f"{sample.name} has no labels; expected a labelled source")
    return sample.labels
