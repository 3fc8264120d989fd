"""Training as a user runs it, on the smallest model: learning, resuming, determinism, processes."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.ports import free_port

from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import CheckpointError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.train import STATE_NAME, TrainOptions, main, train
from dbsam_deploy.training.loop import learning_rate
from dbsam_deploy.training.preparation import BankKeeper, prepare_banks
from dbsam_deploy.training.recipe import load_training_recipe
from dbsam_deploy.verification.cases import bundled_examples

# Not `importorskip`, which loads them where tests are only collected: monai takes seconds.
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("accelerate", "monai"))),
    reason="accelerate and monai, of the extra `train`, are not installed",
)

STEPS = 4


def write_recipe(folder: Path, *, steps: int = STEPS, **tune: object) -> Path:
    """The shipped recipe at 128 px with a few tiny steps on float32 and without a teacher."""
    text = (resource_dir("export") / "training" / "db_sam_tiny.toml").read_text()
    head, tune_text = text.split("[tune]")
    head = head[: head.index("[distill]")]
    tune_text = tune_text[: tune_text.index("[refine]")]
    values = {
        "steps": steps,
        "batch": 2,
        "warmup_steps": 1,
        "objects": 2,
        "validate_every": 0,
        "learning_rate": 1e-3,
    } | tune
    for key, value in values.items():
        shown = f'"{value}"' if isinstance(value, str) else value
        tune_text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {shown}", tune_text)
    for key, value in {
        "image_size": 128,
        "precision": '"no"',
        "teacher": '""',
        "bank_images": 0,
        "checkpoint_every": 2,
    }.items():
        head = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", head)
    path = folder / "tiny.toml"
    path.write_text(f"{head}[tune]{tune_text}")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("train")
    options = TrainOptions(
        str(write_recipe(folder)), data=bundled_examples(), output=folder / "out", cpu=True
    )
    return options, train(options)


def test_a_run_writes_weights_that_load_and_differ_from_the_start(trained, tmp_path) -> None:
    options, result = trained
    found = read_checkpoint(result.checkpoint)
    loaded = load_model(variant="db_sam_tiny", checkpoint=result.checkpoint, image_size=128)
    assert all(torch.isfinite(t).all() for t in loaded.model.state_dict().values())
    assert {t.dtype for t in found.tensors.values() if t.is_floating_point()} == {torch.float16}
    again = train(
        replace(
            options,
            output=tmp_path / "none",
            recipe=str(write_recipe(tmp_path, steps=1, learning_rate=1e-12)),
        )
    )
    start = read_checkpoint(again.checkpoint).tensors
    moved = {k for k, v in found.tensors.items() if not torch.equal(v, start[k])}
    assert any(k.startswith("image_encoder.adapter.") for k in moved)
    assert any(k.startswith("mask_decoder.") for k in moved)


def test_logs_hold_every_step(trained) -> None:
    options, result = trained
    with (options.output / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in rows] == pytest.approx(result.losses)
    summary = json.loads((options.output / "summary.json").read_text())
    assert summary["loss_first_20"] == pytest.approx(result.losses)
    assert list((options.output / "tensorboard").glob("events.*"))


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(trained, tmp_path) -> None:
    options, result = trained
    again = train(replace(options, output=tmp_path / "again"))
    assert again.losses == result.losses
    recipe = Path(options.recipe)
    other = recipe.with_name("other.toml")
    text = recipe.read_text().replace("seed = 0", "seed = 1")
    other.write_text(text.replace(f"\nsteps = {STEPS}\n", "\nsteps = 1\n"))
    third = train(replace(options, recipe=str(other), output=tmp_path / "other"))
    assert len(third.losses) == 1
    assert third.losses[0] != result.losses[0]


def test_a_killed_run_goes_on_from_its_resume_point(trained, monkeypatch, tmp_path) -> None:
    options, result = trained
    output = tmp_path / "killed"
    journal = "dbsam_deploy.training.journal.Journal.step"

    def stop_in_the_third_step(self, phase, step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, stop_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            train(replace(options, output=output))
    assert (output / STATE_NAME).is_file()
    assert not (output / "model.safetensors").exists()
    seen = []
    monkeypatch.setattr(journal, lambda self, phase, step, metrics: seen.append(step))
    resumed = train(replace(options, output=output))
    assert seen == [3, 4]
    assert resumed.losses == result.losses
    ours = read_checkpoint(resumed.checkpoint).tensors
    theirs = read_checkpoint(result.checkpoint).tensors
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle", "other recipe"])
def test_a_corrupt_resume_file_ends_in_one_line_that_names_it(trained, tmp_path, damage) -> None:
    options, _ = trained
    source = (options.output / STATE_NAME).read_bytes()
    path = tmp_path / STATE_NAME
    match damage:
        case "cut":
            path.write_bytes(source[: len(source) // 2])
        case "garbage":
            path.write_bytes(np.random.default_rng().bytes(1000))
        case "pickle":
            torch.save({"format": Path("/")}, path)
        case "other recipe":
            path.write_bytes(source)
    recipe = options.recipe
    if damage == "other recipe":
        recipe = str(tmp_path / "tiny.toml")
        write_recipe(tmp_path, steps=7)
    with pytest.raises(CheckpointError) as caught:
        train(replace(options, recipe=recipe, output=tmp_path))
    assert STATE_NAME in caught.value.message
    assert "\n" not in caught.value.message


def test_losses_fall_and_validation_stops_early(tmp_path) -> None:
    names = sorted(path.name for path in bundled_examples().glob("*.npz"))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": names[1:], "validation": names[:1]}))
    recipe = write_recipe(
        tmp_path, steps=40, validate_every=1, patience=2, learning_rate=1e-12, synthetic=0.0
    )
    options = TrainOptions(
        str(recipe), data=bundled_examples(), split=split, output=tmp_path / "out", cpu=True
    )
    stopped = train(options)
    assert len(stopped.losses) == 3  # a first Dice, then two that are no better
    write_recipe(tmp_path, steps=8, learning_rate=1e-3)
    learned = train(replace(options, output=tmp_path / "learned"))
    assert np.mean(learned.losses[-4:]) < 0.9 * np.mean(learned.losses[:4])


TWO = """
import os, sys
import accelerate, monai.losses, torch._dynamo, torch.utils.tensorboard
from dbsam_deploy.train import main
children = []
for rank in "01":
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        os._exit(main(sys.argv[1:]))
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""Two processes with what a launcher tells its own; what they import is loaded once."""


@pytest.mark.parametrize("launcher", ["ours", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_give_the_loss_curve_of_one(trained, tmp_path, launcher) -> None:
    options, result = trained
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    begin = ("-c", TWO) if launcher == "ours" else (*torchrun, "-m", "dbsam_deploy.train")
    command = [
        *(sys.executable, *begin, "--recipe", options.recipe, "--cpu"),
        *("--data", str(options.data), "--output", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["processes"] == 2
    # the same images in halves: sums in another order
    assert summary["loss_first_20"] == pytest.approx(result.losses, rel=1e-5)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    phase = replace(
        load_training_recipe("db_sam").tune,
        steps=100, warmup_steps=10, learning_rate=2.0, poly_power=2.0,
    )  # fmt: skip
    rates = [learning_rate(phase, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--recipe", "none"], "expected one of"),
        (["--recipe", "db_sam"], "name them with --data"),
        (["--recipe", "db_sam", "--data", "/nowhere"], "no such file or folder"),
        (["--recipe", "db_sam", "--teacher", "lite_medsam"], "no [distill] table"),
        (["--recipe", "db_sam", "--micro-batch", "0"], "--micro-batch"),
        (
            ["--recipe", "db_sam", "--weights", "ema"],
            "--weights is of a weights file: name it with --checkpoint",
        ),
        (["--recipe", "db_sam", "--key", "a"], "--key is of a weights file"),
        (["--recipe", "db_sam", "--adapter", "a"], "--adapter is of a weights file"),
        (
            ["--recipe", "db_sam", "--checkpoint", "a", "--decoder-weights", "a"],
            "brings its own decoder",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, text, capsys, tmp_path) -> None:
    assert run(main, [*arguments, "--output", str(tmp_path), "--cpu"]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1


def test_a_batch_that_does_not_divide_is_refused(trained, tmp_path) -> None:
    options, _ = trained
    with pytest.raises(InputError, match="batch of 2 images"):
        train(replace(options, micro_batch=3, output=tmp_path))


def test_sam2_is_not_trained_here(tmp_path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text()
    assert 'variant = "db_sam_tiny"' in text
    path.write_text(text.replace('variant = "db_sam_tiny"', 'variant = "sam2_hiera_tiny"'))
    options = TrainOptions(str(path), data=bundled_examples(), output=tmp_path / "out", cpu=True)
    with pytest.raises(InputError, match="SAM 2 is not trained here"):
        train(options)


def test_sam2_teaches_no_other_model() -> None:
    recipe = SimpleNamespace(teacher="sam2_hiera_tiny")
    teacher = SimpleNamespace(preprocessing=Preprocessing(1024, "sam2", high_res=True))
    with pytest.raises(InputError, match="SAM 2's embedding is one of three parts"):
        prepare_banks(recipe, None, None, teacher, BankKeeper(Path("bank"), None, None))
