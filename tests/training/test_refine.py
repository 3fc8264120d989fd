"""The phase `refine`: clicks, features that are kept, the loss of all masks, and a run of it."""

import importlib.util
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.references import check_close, small_model

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing, preprocess
from dbsam_deploy.model.checkpoint import (
    read_checkpoint,
    read_training_state,
    write_checkpoint,
)
from dbsam_deploy.model.weights import LoadedModel, fresh_model
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.train import TrainOptions, train
from dbsam_deploy.training.augmentation import Augmentation
from dbsam_deploy.training.bank import Draws
from dbsam_deploy.training.clicks import KINDS, draw_clicks, draw_kind
from dbsam_deploy.training.feature_bank import features_by, open_feature_bank
from dbsam_deploy.training.objectives import MaskObjective, set_trained
from dbsam_deploy.training.prompts import Growth, draw_prompts
from dbsam_deploy.training.recipe import PromptShares, load_training_recipe
from dbsam_deploy.training.refining import RefineObjective, correct
from dbsam_deploy.training.samples import Mixture, Sample
from dbsam_deploy.training.synthetic_images import Synthetic

needs_monai = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("accelerate", "monai"))),
    reason="accelerate and monai, of the extra `train`, are not installed",
)
REFINE = load_training_recipe("db_sam_tiny").refine


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_kinds_come_as_often_as_their_shares() -> None:
    shares = PromptShares(box=0.0, click=3.0, box_click=1.0, correction=0.0)
    generator = rng()
    found = [KINDS[draw_kind(shares, generator)] for _ in range(400)]
    assert set(found) == {"click", "box_click"}
    assert found.count("click") == pytest.approx(300, abs=40)


def test_a_click_lies_where_its_label_says() -> None:
    generator = rng()
    labels = set()
    for index in range(6):
        sample = Synthetic(3).sample(index)
        prompts = draw_prompts(sample, 4, Growth(45, tight=0.2, even=0.4), generator)
        for kind in (KINDS.index("click"), KINDS.index("box_click")):
            boxes, clicks, told = draw_clicks(kind, prompts.masks, prompts.boxes, generator)
            for mask, box, (x, y), label in zip(prompts.masks, boxes, clicks, told, strict=True):
                assert mask[int(y), int(x)] == bool(label)
                held = box[0] <= x <= box[2] and box[1] <= y <= box[3]
                assert label or held  # what is too much lies in the box
                labels.add((int(label), bool(held)))
    assert labels == {(1, True), (1, False), (0, True)}


def test_boxes_are_tight_or_even_as_often_as_is_said() -> None:
    labels = np.zeros((1024, 1024), np.int32)
    labels[400:600, 300:700] = 1
    sample = Sample("s", np.zeros((1024, 1024, 3), np.uint8), labels)
    growth, generator = Growth(45, tight=0.25, even=0.25), rng()
    moves = []
    for _ in range(200):
        box = draw_prompts(sample, 1, growth, generator).boxes[0]
        moves.append((box - (300, 400, 700, 600)) * (-1, -1, 1, 1))
    grown = np.array(moves)
    assert grown.min() >= 0
    assert 40 < grown.max() <= 45
    tight = (grown == 0).all(1)
    even = ~tight & (np.ptp(grown, axis=1) < 1e-3)
    assert tight.mean() == pytest.approx(0.25, abs=0.1)
    assert even.mean() == pytest.approx(0.25, abs=0.1)


def test_objects_that_look_alike_stand_in_one_box() -> None:
    labels = np.zeros((64, 64), np.int32)
    labels[10:20, 10:20], labels[40:50, 40:50], labels[10:20, 40:50] = 1, 2, 3
    image = np.repeat((np.array([0, 100, 104, 250])[labels])[..., None], 3, 2).astype(np.uint8)
    sample = Sample("s", image, labels)
    found = draw_prompts(sample, 3, Growth(0), rng(), together=1.0)
    shown = {
        tuple(box): sorted({*labels[mask]})
        for box, mask in zip(found.boxes, found.masks, strict=True)
    }
    assert shown == {(10, 10, 50, 50): [1, 2], (40, 10, 50, 20): [3]}


def test_a_correction_goes_to_the_larger_mistake() -> None:
    truth = np.zeros((4, 20, 20), bool)
    truth[:3, 4:14, 4:14] = True
    found = truth.copy()
    found[0, 4:14, 10:14] = False  # missing, and a little too much
    found[0, 0:2, 0:2] = True
    found[1, 0:3] = True  # too much
    places, labels = correct(found, truth)
    assert labels.tolist() == [1, 0, 1, -1]  # nothing wrong: inside; no object: no point
    assert places[0, 0] > 10
    assert places[1, 1] < 3
    assert truth[2, int(places[2, 1]), int(places[2, 0])]


def test_kept_features_are_the_encoders(tmp_path) -> None:
    model = small_model("db_sam_tiny", 128).eval()
    how = Preprocessing(128, "medsam")
    loaded = LoadedModel(model, how, {"sha256": "0", "trained": True})
    draws = Draws(Mixture([(Synthetic(1), 1.0)]), Augmentation(), seed=0)
    bank = open_feature_bank(tmp_path, loaded, draws, 2)
    counted = []
    bank.fill(range(2), features_by(loaded, draws, nullcontext), lambda: counted.append(1))
    assert len(counted) == 2
    sample, features = bank.read(1)
    with torch.no_grad():
        pixels = torch.from_numpy(preprocess(sample.image, how))
        neck = model.image_encoder.neck(torch.from_numpy(features)[None])
        check_close(neck.numpy(), model.encode(pixels).numpy(), "float16")
    assert sample.labels.max() > 0
    with torch.no_grad():
        model.image_encoder.neck[0].weight += 1  # what learns is not what was kept
    assert open_feature_bank(tmp_path, loaded, draws, 2) == bank
    with torch.no_grad():
        model.image_encoder.pos_embed += 1
    assert open_feature_bank(tmp_path, loaded, draws, 2) != bank
    bank.path(0).write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete it and start again"):
        bank.read(0)


def test_an_encoder_without_a_neck_is_refused() -> None:
    with pytest.raises(InputError, match="TinyVit: expected a ViT encoder"):
        small_model("lite_medsam", 128).trunk(torch.zeros(1, 3, 128, 128))


def batch_of(model, kind: str):
    torch.manual_seed(0)
    return {
        "features": model.trunk(torch.randn(1, 3, 128, 128)).detach(),
        "kind": torch.tensor([KINDS.index(kind)]),
        "boxes": torch.tensor([[[8.0, 8, 90, 80], [20, 30, 60, 70]]]),
        "clicks": torch.tensor([[[40.0, 40], [30, 50]]]),
        "labels": torch.tensor([[1, 1]]),
        "masks": (torch.rand(1, 2, 32, 32) > 0.6).float(),
    }


@needs_monai
def test_a_box_is_learned_as_in_tuning() -> None:
    model = small_model("db_sam_tiny", 128).eval()
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 128, 128)
    batch = batch_of(model, "box") | {"pixels": pixels}
    batch["features"] = model.trunk(pixels).detach()
    phase = replace(REFINE, multimask_weight=0.0, iou_weight=0.0)
    with torch.no_grad():
        ours, theirs = RefineObjective(model, phase)(batch), MaskObjective(model, 0.0)(batch)
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-5)
    assert ours["dice"].item() == pytest.approx(theirs["dice"].item(), rel=1e-5)


@needs_monai
@pytest.mark.parametrize("kind", KINDS)
def test_of_three_masks_the_best_alone_learns(kind) -> None:
    model = small_model("db_sam_tiny", 128).eval()
    batch = batch_of(model, kind)
    weighed = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        phase = replace(REFINE, multimask_weight=weight, iou_weight=0.0)
        RefineObjective(model, phase)(batch)["loss"].backward()
        tokens = model.mask_decoder.output_hypernetworks_mlps
        weighed.append([sum(p.grad.abs().sum() for p in t.parameters()).item() for t in tokens])
    assert weighed[0][0] > 0
    assert weighed[0][1:] == [0, 0, 0]
    assert 1 <= sum(value > 0 for value in weighed[1][1:]) <= 2  # two objects


def test_the_trunk_stays_and_the_neck_learns() -> None:
    names = set_trained(small_model("db_sam_tiny", 128), "trunk")
    roots = {name.split(".")[0] for name in names}
    assert roots == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert {n.split(".")[1] for n in names if n.startswith("image_encoder.")} == {"neck"}


def write_recipe(folder: Path, **refine: object) -> Path:
    text = (resource_dir("export") / "training" / "db_sam_tiny.toml").read_text()
    values = {"image_size": 128, "precision": '"no"', "checkpoint_every": 2}
    values |= {"real": 0.0, "synthetic": 1.0, "objects": 2, "batch": 2, "views": 2, "steps": 4}
    for key, value in (values | refine).items():
        text = re.sub(rf"(?m)^{key} = [^\s]+", f"{key} = {value}", text)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


@needs_monai
def test_a_run_changes_neck_and_decoder_alone_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch
) -> None:
    start = tmp_path / "start.safetensors"
    write_checkpoint(start, fresh_model("db_sam_tiny", 128, None).model.state_dict(), {})
    recipe, phases = str(write_recipe(tmp_path)), ("refine",)
    options = TrainOptions(
        recipe, checkpoint=start, output=tmp_path / "out", cpu=True, phases=phases
    )
    result = train(options)
    assert len(result.losses) == 4

    def stop_in_the_fourth_step(self, phase, step, metrics) -> None:
        if step == 4:
            raise KeyboardInterrupt

    killed = replace(options, output=tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr("dbsam_deploy.training.journal.Journal.step", stop_in_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            train(killed)
    resumed = train(killed)
    assert resumed.losses == result.losses
    ours, theirs = (read_checkpoint(one.checkpoint).tensors for one in (resumed, result))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = read_checkpoint(start).tensors
    moved = {name for name in theirs if not torch.equal(before[name], theirs[name])}
    assert any(name.startswith("mask_decoder.") for name in moved)
    last = read_training_state(tmp_path / "out" / "state.pt")["model"]
    assert any(not torch.equal(last[n].half(), theirs[n]) for n in moved)  # a mean, not the last
    assert {n.split(".")[1] for n in moved if n.startswith("image_encoder.")} == {"neck"}


@needs_monai
def test_it_ends_between_where_it_began_and_its_mean(tmp_path) -> None:
    start = tmp_path / "start.safetensors"
    write_checkpoint(start, fresh_model("db_sam_tiny", 128, None).model.state_dict(), {})
    ends = []
    for blend in (0.5, 1.0):
        recipe = str(write_recipe(tmp_path, blend=blend, steps=2))
        options = TrainOptions(recipe, checkpoint=start, cpu=True, phases=("refine",))
        result = train(replace(options, output=tmp_path / f"{blend}"))
        ends.append(read_checkpoint(result.checkpoint).tensors)
    before, name = read_checkpoint(start).tensors, "mask_decoder.iou_token.weight"
    half, whole = (end[name].float() - before[name].float() for end in ends)
    assert whole.abs().max() > 1e-4
    rounding = 2e-3 * before[name].abs().max().item()  # of float16
    torch.testing.assert_close(half, whole / 2, rtol=0, atol=rounding)


def test_refining_without_weights_is_refused(tmp_path) -> None:
    options = TrainOptions(str(write_recipe(tmp_path)), output=tmp_path / "out", phases=("refine",))
    with pytest.raises(InputError, match="refine goes on from weights"):
        train(options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"freeze": '"none"'}, 'freeze must be "trunk"'),
        ({"ema": 1.0}, "ema = 1.0, expected 0–1"),
        ({"views": 0}, "views above 0"),
        ({"blend": 1.5}, "blend = 1.5"),
        ({"click": -0.5}, "shares that are not all 0"),
        ({"tight_boxes": 1.5}, "tight_boxes = 1.5"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, text, tmp_path) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        load_training_recipe(str(write_recipe(tmp_path, **change)))


def test_a_phase_that_the_recipe_does_not_have_is_refused() -> None:
    recipe = load_training_recipe("db_sam")
    assert recipe.only(()) == recipe
    with pytest.raises(InputError, match="phase 'refine': recipe db_sam has tune"):
        recipe.only(("refine",))
