"""One phase of training: steps, resume points, validation, logs; on one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.errors import InputError
from ..model import DbSam
from ..model.fitting import StateDict
from .datasets import Example, Steps, loader
from .recipe import Optimizer, Phase, Refine
from .state import TrainingState, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = dict[str, float]
Validate = Callable[[DbSam], float]
"""Mean Dice of a model on cases it is not trained on."""


@dataclass(frozen=True)
class Outlet:
    """Where a phase reports and what it may use.

    Attributes:
        state_file: resume point, written by the main process.
        key: see `recipe_key`.
        checkpoint_every: steps between resume points.
        micro_batch: images in one forward pass of one process.
        workers: loader processes.
        on_step: called on the main process with phase, step (from 1) and metrics.
        on_validation: the same with the validation's Dice.
    """

    state_file: Path
    key: str
    checkpoint_every: int
    micro_batch: int
    workers: int
    on_step: Callable[[str, int, Metrics], None]
    on_validation: Callable[[str, int, float], None]


def learning_rate(phase: Phase, step: int) -> float:
    """Linear warm-up to the peak, then peak × (1 - progress)^power, 0 after the last step."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return float(phase.learning_rate * max(0.0, 1 - progress) ** phase.poly_power)


def build_optimizer(model: DbSam, settings: Optimizer, phase: Phase) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained.

    Norms, biases and position tables are not decayed.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or "pos" in name.rsplit(".", 1)[-1]
            (plain if small else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=phase.learning_rate, betas=(settings.beta1, settings.beta2))


@dataclass(frozen=True)
class PhaseRun:
    """One phase with all it needs.

    Attributes:
        name: the phase's name.
        phase: see `Phase`.
        model: what is trained and validated, in place.
        objective: batch → losses, see `dbsam_deploy.training.objectives`; holds `model`.
        examples: training examples by global index.
        optimizer: AdamW's settings.
        accelerator: one process or many, and the autocast dtype.
        outlet: see `Outlet`.
        validate: None without validation cases.
    """

    name: str
    phase: Phase
    model: DbSam
    objective: nn.Module
    examples: Dataset[Example]
    optimizer: Optimizer
    accelerator: Accelerator
    outlet: Outlet
    validate: Validate | None


def run_phase(run: PhaseRun, start: TrainingState) -> TrainingState:
    """Train from `start` to the end of the phase.

    Args:
        run: see `PhaseRun`.
        start: this phase's resume point; its weights are in the model already.

    Returns:
        The state at the end; with `patience` its model is the best one, of `refine` the mean one.

    Raises:
        InputError: batch, processes and micro-batch do not divide, patience without validation, or
            a loss that is not finite.
    """
    phase, accelerator = run.phase, run.accelerator
    accumulate = _accumulation(run)
    adamw = build_optimizer(run.model, run.optimizer, phase)
    if start.optimizer:
        adamw.load_state_dict(start.optimizer)
    accelerator.gradient_accumulation_steps = accumulate
    objective, optimizer = accelerator.prepare(run.objective, adamw)
    batches = _batches(run, start.position.step)
    state = replace(start, start_model=start.start_model or _trained(run))
    for step in range(start.position.step, phase.steps):
        rate = learning_rate(phase, step)
        for group in adamw.param_groups:
            group["lr"] = rate
        began = time.perf_counter()
        metrics = _step(
            objective, optimizer, batches, accumulate, run.optimizer.clip_norm, accelerator
        )
        metrics |= {"learning_rate": rate, "seconds": time.perf_counter() - began}
        state = replace(state, mean_model=_averaged(run, state.mean_model, step))
        state, stop = _after_step(run, state, metrics, adamw)
        if stop:
            break
    if phase.patience and state.best_model:
        run.model.load_state_dict(state.best_model)
    if isinstance(phase, Refine):
        run.model.load_state_dict(_blended(state, phase.blend), strict=False)
    accelerator.free_memory(objective, optimizer)
    return replace(state, model=_copy(run.model), mean_model={}, start_model={})


def _averaged(run: PhaseRun, mean: StateDict, step: int) -> StateDict:
    """The running mean of the trained weights after a step, changed in place; {} without one.

    It begins as a plain mean, so that the first steps do not stay in it.
    """
    if not isinstance(run.phase, Refine):
        return {}
    decay = min(run.phase.ema, (step + 1) / (step + 10))
    for name, now in _trained(run).items():
        mean.setdefault(name, now.clone()).lerp_(now, 1 - decay)
    return mean


def _trained(run: PhaseRun) -> StateDict:
    """What `refine` trains, as it is now, float32; {} for other phases."""
    if not isinstance(run.phase, Refine):
        return {}
    parameters = run.model.named_parameters()
    return {n: p.detach().float().cpu().clone() for n, p in parameters if p.requires_grad}


def _blended(state: TrainingState, blend: float) -> StateDict:
    """Between what a phase began with (0) and the mean of what it went through (1)."""
    return {n: first.lerp(state.mean_model[n], blend) for n, first in state.start_model.items()}


def _batches(run: PhaseRun, start: int) -> Iterator[Example]:
    steps = Steps(
        start,
        run.phase.steps,
        batch=run.phase.batch,
        micro_batch=run.outlet.micro_batch,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
    )
    return iter(loader(run.examples, steps, run.outlet.workers))


def _after_step(
    run: PhaseRun, state: TrainingState, metrics: Metrics, adamw: torch.optim.AdamW
) -> tuple[TrainingState, bool]:
    """Report, validate and save where it is due; the new state, and whether the phase ends."""
    phase, outlet, accelerator = run.phase, run.outlet, run.accelerator
    step = state.position.step + 1
    losses = (*state.position.losses, metrics["loss"])
    state = replace(state, position=replace(state.position, step=step, losses=losses))
    last = step == phase.steps
    if accelerator.is_main_process:
        outlet.on_step(run.name, step, metrics)
    if phase.validate_every and run.validate and (step % phase.validate_every == 0 or last):
        state = _validated(run, state, run.validate)
    stop = last or bool(phase.patience and state.position.waited >= phase.patience)
    if stop or step % outlet.checkpoint_every == 0:
        state = replace(state, model=_copy(run.model), optimizer=adamw.state_dict())
        if accelerator.is_main_process:
            save_state(outlet.state_file, outlet.key, state)
        accelerator.wait_for_everyone()
    return state, stop


def _accumulation(run: PhaseRun) -> int:
    """Micro-batches of a process in one step."""
    phase, outlet, world = run.phase, run.outlet, run.accelerator.num_processes
    share = world * outlet.micro_batch
    if phase.batch % share:
        raise InputError(
            f"a batch of {phase.batch} images cannot be split into {world} processes × "
            f"micro-batches of {outlet.micro_batch}; choose --micro-batch so that it divides"
        )
    if phase.patience and not (run.validate and phase.validate_every):
        raise InputError(
            "the recipe stops early (patience > 0) but nothing is validated: give validation "
            "cases (--split) and validate_every, or set patience = 0"
        )
    return phase.batch // share


def _step(
    objective: nn.Module,
    optimizer: Any,
    batches: Iterator[Example],
    accumulate: int,
    clip_norm: float,
    accelerator: Accelerator,
) -> Metrics:
    """One optimiser step; the mean of every metric over its images, on all processes."""
    sums: dict[str, Tensor] = {}
    for _ in range(accumulate):
        batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
        with accelerator.accumulate(objective):
            losses = objective(batch)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        for key, value in losses.items():
            sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach().float()
    names = sorted(sums)
    means = torch.stack([sums[name] for name in names]) / accumulate
    values = accelerator.reduce(means, reduction="mean").tolist()
    metrics = dict(zip(names, values, strict=True))
    if not all(torch.isfinite(torch.tensor(values))):
        raise InputError(
            f"the loss is not finite ({metrics}): lower the learning rate, or train with "
            'precision = "no"'
        )
    return metrics


def _validated(run: PhaseRun, state: TrainingState, validate: Validate) -> TrainingState:
    """Validate on the main process; every process gets its verdict."""
    from accelerate.utils import broadcast_object_list

    main = run.accelerator.is_main_process
    found = [validate(run.model) if main else 0.0]
    dice = float(broadcast_object_list(found)[0])
    position = state.position
    if main:
        run.outlet.on_validation(run.name, position.step, dice)
    if dice > position.best_dice:
        better = replace(position, best_dice=dice, waited=0)
        return replace(state, position=better, best_model=_copy(run.model))
    return replace(state, position=replace(position, waited=position.waited + 1))


def _copy(model: DbSam) -> StateDict:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
