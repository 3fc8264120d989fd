"""Windows, losses, frozen parts, examples and the teacher's bank, each against plain PyTorch."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.references import TOLERANCES, check_close, small_model
from torch import nn

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing, preprocess
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.training.augmentation import Augmentation
from dbsam_deploy.training.bank import Banks, Draws, embeddings_by, open_bank
from dbsam_deploy.training.crops import CropEncoder
from dbsam_deploy.training.datasets import EmbeddingExamples, MaskExamples, Steps, to_mask_grid
from dbsam_deploy.training.objectives import (
    EmbeddingObjective,
    MaskObjective,
    calibrate_batch_norm,
    set_trained,
)
from dbsam_deploy.training.prompts import Growth
from dbsam_deploy.training.samples import LabelledSlices, Mixture
from dbsam_deploy.training.synthetic_images import Synthetic
from dbsam_deploy.verification.cases import bundled_examples

STILL = Augmentation(
    **{
        name: 0.0
        for name in (
            *("flip", "quarter_turn", "affine", "elastic", "invert", "gamma", "contrast"),
            *("histogram_shift", "bias_field", "noise", "blur", "low_resolution", "colour"),
            "grey",
        )
    }
)
"""No augmentation."""


@pytest.fixture
def model():
    return small_model("db_sam_tiny", 128)


def test_a_window_of_the_whole_frame_is_the_frame(model) -> None:
    image = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        window = CropEncoder(model, 128)(image, torch.zeros(2, 2, dtype=torch.int64))
        check_close(window.numpy(), model.encode(image).numpy(), "float32")


def test_windows_use_their_own_positions_and_gradients_reach_the_model(model) -> None:
    encoder = CropEncoder(model, 64)
    crops = torch.randn(1, 3, 64, 64).repeat(2, 1, 1, 1)
    out = encoder(crops, torch.tensor([[0, 0], [4, 3]]))
    assert out.shape == (2, 256, 4, 4)
    assert not torch.allclose(out[0], out[1])
    out[1].sum().backward()
    position = model.image_encoder.pos_embed.grad[0].abs().sum(-1)
    assert (position[4:8, 3:7] > 0).all()
    assert position[:4].sum() == 0
    table = model.image_encoder.blocks[1].attn.rel_pos_h  # global: 2·8 - 1 distances
    used = table.grad.abs().sum(1) > 0
    assert used.tolist() == [False] * 4 + [True] * 7 + [False] * 4


@pytest.mark.parametrize("size", [0, 24, 144])
def test_a_window_that_does_not_fit_the_grid_is_refused(model, size) -> None:
    with pytest.raises(InputError, match="crop_size"):
        CropEncoder(model, size)


def test_mask_loss_is_dice_plus_binary_cross_entropy(model) -> None:
    """Guards against MONAI releases whose cross-entropy of one channel is 0."""
    objective = MaskObjective(model, iou_weight=0.0)
    pixels, boxes = torch.randn(2, 3, 128, 128), torch.tensor([[[8.0, 8, 90, 80]]]).repeat(2, 3, 1)
    truth = (torch.rand(2, 3, 32, 32) > 0.6).float()
    with torch.no_grad():
        found = objective({"pixels": pixels, "boxes": boxes, "masks": truth})
        logits = model(pixels, boxes)[0][:, :, 0]
    p = logits.sigmoid()
    overlap, squares = (p * truth).sum((2, 3)), (p**2).sum((2, 3)) + truth.sum((2, 3))
    dice = 1 - (2 * overlap + 1e-5) / (squares + 1e-5)
    expected = dice.mean() + F.binary_cross_entropy_with_logits(logits, truth)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    hard = (logits > 0).float()
    score = 2 * (hard * truth).sum((2, 3)) / (hard.sum((2, 3)) + truth.sum((2, 3)))
    assert found["dice"].item() == pytest.approx(score.mean().item(), rel=1e-5)


def test_iou_loss_counts_by_its_weight(model) -> None:
    batch = {
        "pixels": torch.randn(1, 3, 128, 128),
        "boxes": torch.tensor([[[8.0, 8, 90, 80]]]),
        "masks": (torch.rand(1, 1, 32, 32) > 0.5).float(),
    }
    with torch.no_grad():
        found = MaskObjective(model, iou_weight=3.0)(batch)
    parts = found["mask_loss"] + 3 * found["iou_loss"]
    assert found["loss"].item() == pytest.approx(parts.item(), rel=1e-6)
    assert found["iou_loss"] > 0


def test_embedding_loss_is_0_for_equal_and_1_for_the_mean(model) -> None:
    pixels, corners = torch.randn(2, 3, 128, 128), torch.zeros(2, 2, dtype=torch.int64)
    with torch.no_grad():
        target = model.encode(pixels)
        variance = target.var(unbiased=False).item()
        batch = {"pixels": pixels, "corners": corners, "embeddings": target}
        same = EmbeddingObjective(model, 128, variance)(batch)
        noise = torch.randn_like(target)
        batch["embeddings"] = target + noise
        other = EmbeddingObjective(model, 0, variance)(batch)
    assert same["loss"].item() < TOLERANCES["float32"].relative
    assert same["cosine"].item() == pytest.approx(1, abs=1e-5)
    assert other["loss"].item() == pytest.approx(noise.pow(2).mean().item() / variance, rel=1e-4)


def test_freezing_follows_the_paper_and_the_code(model) -> None:
    everything = set(set_trained(model, "none"))
    as_coded, paper = set(set_trained(model, "as_coded")), set(set_trained(model, "paper"))
    vit = {n for n in everything if re_vit(n)}
    assert everything - as_coded == vit
    assert {n for n in as_coded - paper if not n.startswith("prompt_encoder.")} == set()
    assert as_coded - paper
    trained = {n.split(".")[0] for n in paper}
    assert trained == {"image_encoder", "mask_decoder"}
    assert {n.split(".")[1] for n in paper if n.startswith("image_encoder.")} == {"adapter", "neck"}


def re_vit(name: str) -> bool:
    return name.startswith(
        ("image_encoder.blocks.", "image_encoder.patch_embed.", "image_encoder.pos_embed")
    )


def test_calibration_makes_batch_norm_normalise_its_data(model) -> None:
    branch = model.image_encoder.adapter.spatial_prior_module
    batches = [torch.randn(3, 3, 64, 64) * 5 + 2 for _ in range(3)]
    calibrate_batch_norm(branch, batches)
    assert not branch.training
    first = next(m for m in branch.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.momentum == 0.01
    inputs = []
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for pixels in batches:
            branch(pixels)
    values = torch.cat(inputs).transpose(0, 1).flatten(1)
    torch.testing.assert_close(first.running_mean, values.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.running_var, values.var(1), rtol=5e-2, atol=1e-3)


def test_steps_share_every_image_once_among_processes_and_micro_batches() -> None:
    whole = list(Steps(2, 5, batch=8, micro_batch=8, rank=0, world=1))
    assert whole == [list(range(16, 24)), list(range(24, 32)), list(range(32, 40))]
    parts = [Steps(2, 5, batch=8, micro_batch=2, rank=rank, world=2) for rank in range(2)]
    assert len(parts[0]) == len(list(parts[0])) == 6
    seen = [i for part in parts for indices in part for i in indices]
    assert sorted(seen) == list(range(16, 40))


@pytest.mark.parametrize("shape", [(100, 60), (33, 128), (256, 256)])
def test_masks_and_boxes_land_on_the_same_place(shape) -> None:
    how = Preprocessing(256)
    mask = np.zeros(shape, bool)
    height, width = shape
    mask[height // 4 : height // 2, width // 3 : width // 2 + 2] = True
    grid = to_mask_grid(mask, how)
    assert grid.shape == (64, 64)
    assert set(np.unique(grid)) == {0.0, 1.0}
    rows, columns = np.flatnonzero(grid.any(1)), np.flatnonzero(grid.any(0))
    scale = 64 / max(shape)
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = np.array((width // 3, height // 4, width // 2 + 2, height // 2)) * scale
    assert np.abs(np.array(found) - expected).max() <= 1


def test_mask_examples_are_a_function_of_seed_and_index() -> None:
    def examples(seed):
        return MaskExamples(
            Mixture([(LabelledSlices(bundled_examples()), 1.0), (Synthetic(seed), 1.0)]),
            Augmentation(),
            objects=5,
            growth=Growth(20),
            preprocessing=Preprocessing(128),
            seed=seed,
        )

    first, again, other = examples(3)[7], examples(3)[7], examples(4)[7]
    assert first["pixels"].shape == (3, 128, 128)
    assert first["boxes"].shape == (5, 4)
    assert first["masks"].shape == (5, 32, 32)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["pixels"], other["pixels"])
    inside = (first["boxes"] >= 0) & (first["boxes"] <= 128)
    assert inside.all()


@pytest.fixture
def bank(model, tmp_path):
    teacher = LoadedModel(model, Preprocessing(128), {"sha256": "0"})
    draws = Draws(Mixture([(LabelledSlices(bundled_examples()), 1.0)]), STILL, seed=0)
    made = open_bank(tmp_path, teacher, draws, 3)
    assert fill_three(made, teacher, draws) == 3
    return made, teacher, draws


def fill_three(made, teacher, draws) -> int:
    """Fill a bank's three places; returns how many it says it has filled."""
    calls = []
    made.fill(range(3), embeddings_by(teacher, draws, nullcontext), lambda: calls.append(1))
    return len(calls)


def test_the_bank_holds_the_teachers_embeddings_and_is_not_made_twice(bank) -> None:
    made, teacher, draws = bank
    for index in range(3):
        image, embeddings = made.read(index)
        with torch.no_grad():
            expected = teacher.model.encode(
                torch.from_numpy(preprocess(image, teacher.preprocessing))
            )
        check_close(embeddings, expected[0].numpy(), "float16")
    stamp = made.path(1).stat().st_mtime_ns
    fill_three(made, teacher, draws)
    assert made.path(1).stat().st_mtime_ns == stamp
    other = open_bank(made.folder.parent, teacher, replace(draws, seed=1), 3)
    assert other.folder != made.folder


def test_windows_of_the_bank_show_the_same_place_as_their_embeddings(bank) -> None:
    made, _, _ = bank
    how = Preprocessing(128)
    examples = EmbeddingExamples(Banks((made,)), 64, preprocessing=how, seed=0)
    corners = set()
    for index in range(12):
        item = examples[index]
        row, column = item["corners"].tolist()
        corners.add((row, column))
        matches = [
            np.array_equal(
                made.read(i)[1][:, row : row + 4, column : column + 4], item["embeddings"].numpy()
            )
            for i in range(3)
        ]
        assert any(matches)
        image, _ = made.read(matches.index(True))
        whole = preprocess(image, how)[0][
            :, 16 * row : 16 * row + 64, 16 * column : 16 * column + 64
        ]
        # brightness and contrast may differ, the pattern of a channel may not; 0 is padding
        content = whole[0] != 0
        correlation = np.corrcoef(whole[0][content], item["pixels"].numpy()[0][content])[0, 1]
        assert correlation > 0.98
    assert len(corners) > 1


@pytest.mark.parametrize("damage", ["missing", "cut", "pickled", "shape"])
def test_a_damaged_bank_file_is_named(bank, damage) -> None:
    made, _, _ = bank
    path: Path = made.path(2)
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:100])
        case "pickled":
            np.savez(path, image=np.array([{}], object), embeddings=np.zeros(3))
        case "shape":
            np.savez(path, image=np.zeros((4, 4), np.uint8), embeddings=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"000002\.npz"):
        made.read(2)
