"""`python -m dbsam_deploy.train`: a recipe and images → trained weights.

The composition root of training: the only module that knows the order of its phases.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import check_before, run
from .options.train_options import TrainOptions, parse_words

if __name__ == "__main__":  # --help and a mistyped option need no PyTorch
    check_before(parse_words, "train", extra="train")

import torch
from rich.console import Console

from .core.errors import InputError
from .evaluation import build_protocol, evaluate, find_cases, read_cases
from .extras import require
from .files.atomic import write_atomically, writing_to
from .files.locks import one_writer
from .machine.hardware import installed_versions
from .model import DbSam, variant_config
from .model.checkpoint import write_checkpoint
from .model.weights import LoadedModel, fresh_model, load_model
from .prediction.predictor import Predictor
from .sessions.pytorch_session import PytorchSession
from .sessions.weights_choice import WeightsChoice
from .training.datasets import Example
from .training.journal import Journal
from .training.loop import Outlet, PhaseRun, Validate, run_phase
from .training.material import Material, gather
from .training.objectives import EmbeddingObjective, MaskObjective, set_trained
from .training.preparation import (
    BankKeeper,
    calibrate,
    prepare_banks,
    prepare_examples,
    prepare_features,
)
from .training.recipe import (
    Phase,
    Refine,
    TrainingRecipe,
    load_training_recipe,
)
from .training.refining import RefineObjective
from .training.state import Position, TrainingState, load_state, recipe_key

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import Dataset

STATE_NAME, MODEL_NAME, SUMMARY_NAME = "state.pt", "model.safetensors", "summary.json"
VALIDATION_SLICES = 3
"""Slices of a validation file; a full evaluation is `python -m dbsam_deploy.evaluate`."""


@dataclass(frozen=True)
class Trained:
    """Result of a training: the file of weights, and the loss of every step."""

    checkpoint: Path
    losses: tuple[float, ...]


@dataclass(frozen=True)
class _Run:
    """What every step of one training shares."""

    recipe: TrainingRecipe
    options: TrainOptions
    material: Material
    loaded: LoadedModel
    accelerator: Accelerator
    console: Console
    validate: Validate | None


def train(options: TrainOptions, console: Console | None = None) -> Trained:
    """Run a recipe, or the rest of it.

    Raises:
        InputError, CheckpointError: a user's mistake.
        EngineError: a package that training needs is not installed.
    """
    recipe = load_training_recipe(options.recipe)
    recipe = _with_options(recipe, options.teacher, options.freeze).only(options.phases)
    accelerator = _accelerator(recipe, options)
    console = console or Console(stderr=True, quiet=not accelerator.is_main_process)
    material = gather(
        [phase for _, phase in recipe.phases()],
        seed=recipe.seed,
        data=options.data,
        split=options.split,
        unlabelled=options.unlabelled,
        reading=options.reading,
    )
    loaded = _start_model(recipe, options)
    for line in (*material.lines(), f"start: {loaded.weights['note']}"):
        console.print(line, highlight=False, soft_wrap=True)
    loaded.model.to(accelerator.device)
    session = _Run(recipe, options, material, loaded, accelerator, console, _validation(options))
    with _only_writer(session), writing_to(options.output):
        state = _train_phases(session)
        return _publish(session, state)


def _only_writer(run: _Run) -> AbstractContextManager[None]:
    """The lock of the output, which the main process holds for all processes of this training."""
    if not run.accelerator.is_main_process:
        return nullcontext()
    return one_writer(run.options.output, wait=run.options.wait, say=run.console.print)


def _train_phases(run: _Run) -> TrainingState:
    recipe, options, loaded = run.recipe, run.options, run.loaded
    key = recipe_key(recipe, json.dumps([loaded.weights["sha256"], run.material.describe()]))
    state_file = options.output / STATE_NAME
    state = load_state(state_file, key) if state_file.is_file() else None
    with Journal(options.output, recipe, state, run.console, run.accelerator) as journal:
        if state is not None:
            loaded.model.load_state_dict(state.model)
            journal.note(f"resuming {state.position.phase} after step {state.position.step}")
        outlet = Outlet(
            state_file=state_file,
            key=key,
            checkpoint_every=recipe.checkpoint_every,
            micro_batch=options.micro_batch,
            workers=options.workers,
            on_step=journal.step,
            on_validation=journal.validation,
        )
        names = [name for name, _ in recipe.phases()]
        first = names.index(state.position.phase) if state else 0
        for name, phase in recipe.phases()[first:]:
            state = _train_phase(run, name, phase, state, outlet, journal)
    if state is None:
        raise RuntimeError("a recipe without phases")
    return state


def _train_phase(
    run: _Run,
    name: str,
    phase: Phase,
    state: TrainingState | None,
    outlet: Outlet,
    journal: Journal,
) -> TrainingState:
    model, accelerator = run.loaded.model, run.accelerator
    examples, objective = _lessons(run, name, phase, journal)
    if state is None and not run.loaded.weights["trained"]:
        calibrate(model, examples, accelerator.device)
    if state is None or state.position.phase != name:
        losses = state.position.losses if state else ()
        state = TrainingState(Position(name, losses=losses), {}, {}, {})
    set_trained(model, phase.freeze)
    phase_run = PhaseRun(
        name=name,
        phase=phase,
        model=model.eval(),
        objective=objective,
        examples=examples,
        optimizer=run.recipe.optimizer,
        accelerator=accelerator,
        outlet=outlet,
        validate=run.validate if name == "tune" else None,
    )
    return run_phase(phase_run, state)


def _lessons(
    run: _Run, name: str, phase: Phase, journal: Journal
) -> tuple[Dataset[Example], torch.nn.Module]:
    """Examples of a phase and what is minimised on them."""
    recipe, model = run.recipe, run.loaded.model
    keeper = BankKeeper(run.options.output, run.accelerator, journal.counter)
    if isinstance(phase, Refine):
        features = prepare_features(recipe, phase, run.material, run.loaded, keeper)
        return features, RefineObjective(model, phase)
    if name == "tune":
        images = prepare_examples(recipe, phase, run.material, None, run.loaded.preprocessing)
        return images, MaskObjective(model, phase.iou_weight)
    teacher = load_model(variant=recipe.teacher, checkpoint=run.options.teacher_weights)
    teacher.model.to(run.accelerator.device)
    banks = prepare_banks(recipe, phase, run.material, teacher, keeper)
    windows = prepare_examples(recipe, phase, run.material, banks, run.loaded.preprocessing)
    return windows, EmbeddingObjective(model, phase.crop_size, banks.variance())


def _with_options(
    recipe: TrainingRecipe, teacher: str | None, freeze: str | None
) -> TrainingRecipe:
    """The recipe with what the command line changes in it."""
    if freeze is not None and recipe.tune is not None:
        recipe = replace(recipe, tune=replace(recipe.tune, freeze=freeze))
    if teacher is None or teacher == recipe.teacher:
        return recipe
    if teacher == "none":
        return replace(recipe, teacher="", distill=None)
    if recipe.distill is None:
        raise InputError(
            f"--teacher {teacher}: recipe {recipe.name} has no [distill] table; add one"
        )
    return replace(recipe, teacher=teacher)


def _accelerator(recipe: TrainingRecipe, options: TrainOptions) -> Accelerator:
    require("accelerate", extra="train", what_for="training")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if options.micro_batch < 1 or options.workers < 0:
        raise InputError("--micro-batch must be at least 1 and --workers at least 0")
    # an earlier training in this process may have had another precision; the process group stays
    AcceleratorState._reset_state()
    # mask tokens 1–3 and the prompt encoder's point labels take no part in a box's single mask
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=recipe.precision, cpu=options.cpu or None, kwargs_handlers=[unused]
    )


def _start_model(recipe: TrainingRecipe, options: TrainOptions) -> LoadedModel:
    if options.checkpoint is None and recipe.phases()[0][0] == "refine":
        raise InputError(
            f"recipe {recipe.name}: refine goes on from weights; name them with --checkpoint, or "
            "run the phases before it"
        )
    if variant_config(recipe.variant).hiera is not None:
        raise InputError(f"variant {recipe.variant}: SAM 2 is not trained here, only deployed")
    if options.checkpoint is None:
        return fresh_model(recipe.variant, recipe.image_size, options.decoder_weights)
    return load_model(
        variant=recipe.variant,
        image_size=recipe.image_size,
        **vars(WeightsChoice.of(options)),
    )


def _validation(options: TrainOptions) -> Validate | None:
    if options.data is None or options.split is None:
        return None
    files = find_cases(
        options.data, split=options.split, subset="validation", reading=options.reading
    )
    protocol = build_protocol("objects")

    def validate(model: DbSam) -> float:
        config = model.config
        session = PytorchSession(model, device=next(model.parameters()).device.type)
        result = evaluate(
            Predictor(session, config.frame),
            read_cases(files),
            protocol,
            max_slices=VALIDATION_SLICES,
            with_nsd=False,
            intervals=False,
        )
        return result.object_mean

    return validate


def _publish(run: _Run, state: TrainingState) -> Trained:
    """Write the weights and a summary, on the main process."""
    recipe, losses = run.recipe, state.position.losses
    path = run.options.output / MODEL_NAME
    if run.accelerator.is_main_process:
        about = {"variant": recipe.variant, "recipe": recipe.name, "seed": str(recipe.seed)}
        write_checkpoint(path, run.loaded.model.state_dict(), about)
        summary: dict[str, Any] = {
            **about,
            "processes": run.accelerator.num_processes,
            "steps": {name: phase.steps for name, phase in recipe.phases()},
            "loss_first_20": list(losses[:20]),
            "loss_last_20": list(losses[-20:]),
            "best_validation_dice": state.position.best_dice if run.validate else None,
            "versions": installed_versions(),
        }
        with write_atomically(run.options.output / SUMMARY_NAME) as stream:
            stream.write(json.dumps(summary, indent=2).encode() + b"\n")
        run.console.print(
            f"{path} is ready for --checkpoint of every command", highlight=False, soft_wrap=True
        )
    run.accelerator.wait_for_everyone()
    return Trained(path, losses)


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = TrainOptions(**vars(parse_words(argv)))
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
