"""What tests and benchmarks share: the table of tolerances with its reasons, small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dbsam_deploy.core.contract import Geometry
from dbsam_deploy.core.imaging import ByteArray, FloatArray
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import LabelledCase
from dbsam_deploy.evaluation.boxes import fill_box
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.model import DbSam, variant_config
from dbsam_deploy.validation.tolerances import KERNELS, Tolerance, share_of_bound

TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(
        5e-5,
        "rounding 6e-8, grown by ~1e3 additions a layer in another order over 12 blocks; measured "
        "9e-6 for the tiny encoder",
    ),
    "float16": Tolerance(
        2e-2,
        "rounding 5e-4 in every layer of 12 blocks; measured 5e-3 for the tiny encoder",
    ),
    "bfloat16": Tolerance(
        8e-2,
        "rounding 4e-3, eight times float16's; measured 2e-2 for small random encoders",
    ),
    **{f"{dtype} kernel": bound for dtype, bound in KERNELS.items()},
}


def check_close(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], dtype: str, what: str = "output"
) -> None:
    """Compare with the reference by the table's bound for `dtype`.

    Raises:
        AccuracyError: another shape, a value that is not finite, or a larger error.
    """
    share_of_bound(found, expected, TOLERANCES[dtype], f"{what} ({dtype})")


def small_model(variant: str, image_size: int, *, embed_dim: int = 32, depth: int = 8) -> DbSam:
    """A variant's full graph at a small width with random weights of ordinary size.

    Every table and statistic is random (fresh ones are zero or one), so that a graph that drops or
    swaps one is found out.

    Args:
        variant: a name in `dbsam_deploy.model.VARIANTS`.
        image_size: side S of the model frame.
        embed_dim: ViT width, split over two heads.
        depth: ViT blocks; with 8 every stage has one in windows before the global one.
    """
    config = variant_config(variant, image_size=image_size)
    adapter = config.adapter
    if adapter is not None:
        stem = (4,) * len(adapter.stem_channels)
        adapter = replace(adapter, stem_channels=stem, num_heads=2, fusion_reduction=2)
    config = replace(config, embed_dim=embed_dim, num_heads=2, depth=depth, adapter=adapter)
    if config.tiny_vit is not None:
        thin = replace(
            config.tiny_vit, embed_dims=(8, 16, 16, 32), depths=(1, 1, 2, 1), num_heads=(0, 2, 2, 4)
        )
        config = replace(config, tiny_vit=thin)
    if config.efficient_vit is not None:
        thin = replace(
            config.efficient_vit,
            widths=(8, 8, 16, 16, 32),
            depths=(1, 1, 1, 1, 2),
            head_dim=2,
            neck_depth=1,
            frame_size=2 * image_size,
        )
        config = replace(config, efficient_vit=thin)
    model = DbSam(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    # Predicted IoUs are near 1, as of trained weights: an error has no scale beside a lone near 0.
    nn.init.constant_(model.mask_decoder.iou_prediction_head.layers[-1].bias, 1)
    return model


def prompt_feed(
    rng: np.random.Generator, *, box: bool, points: int, size: Geometry
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of `prompt_decoder`: two images with three prompt sets each, as `Predictor` lays them.

    Args:
        rng: source of all numbers.
        box: whether each set ends with a box's corners, else with "not a point".
        points: labelled points in each set.
        size: the model's sizes.
    """
    tokens, grid = points + (2 if box else 1), size.grid
    labels = rng.integers(0, 2, (2, 3, tokens)).astype(np.int32)
    labels[..., points:] = [2, 3] if box else [-1]
    masks = (2, 3, 1, size.mask_side, size.mask_side)
    return {
        "image_embeddings": rng.standard_normal((2, 256, grid, grid)).astype(np.float32),
        "point_coords": (rng.random((2, 3, tokens, 2)) * size.image_size).astype(np.float32),
        "point_labels": labels,
        "mask_input": rng.standard_normal(masks).astype(np.float32),
        "has_mask_input": np.array([[0, 1, 0], [1, 1, 0]], np.float32),
    }


def labelled_squares(depth: int, side: int, *places: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """(depth, side, side) label map: label i + 1 is a square at (row, column, side) of `places`."""
    labels = np.zeros((depth, side, side), np.uint8)
    for label, (row, column, length) in enumerate(places, start=1):
        labels[:, row : row + length, column : column + length] = label
    return labels


def labelled_case(
    labels: npt.NDArray[Any],
    name: str = "task/case.npz",
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    boxes: FloatArray | None = None,
) -> LabelledCase:
    """A case to evaluate whose objects are white on black; no file is written.

    Args:
        labels: (D, H, W) whole numbers.
        name: task and file.
        spacing_mm: the file's own, along (z, y, x).
        boxes: the file's own prompts.
    """
    pixels = np.where(labels > 0, 255, 0).astype(np.uint8)
    volume = Volume(Path(name), "npz", pixels, "as stored", boxes, spacing_mm=spacing_mm)
    task = name.rpartition("/")[0]
    return LabelledCase(task, name, volume, labels, {1: "first", 2: "second"})


def as_prediction(masks: npt.NDArray[Any], logits: FloatArray | None = None) -> Prediction:
    """(N, H, W) masks as a model's answer; (N, 4G, 4G) logits follow the masks unless given."""
    if logits is None:
        logits = np.where(masks, 1.0, -1.0).astype(np.float32)
    ious = np.ones((len(masks), 1), np.float32)
    return Prediction(masks[:, None].astype(np.uint8), ious, logits[:, None])


def repeat_box(image: ByteArray, boxes: FloatArray) -> Prediction:
    """A model that gives its prompt back."""
    size = (image.shape[0], image.shape[1])
    return as_prediction(np.stack([fill_box(box, size, inclusive=False) for box in boxes]))


def bright_in_box(image: ByteArray, boxes: FloatArray) -> Prediction:
    """A perfect model for `labelled_case`: what is white inside the box."""
    size, white = (image.shape[0], image.shape[1]), image[..., 0] > 127
    return as_prediction(np.stack([fill_box(b, size, inclusive=True) & white for b in boxes]))
