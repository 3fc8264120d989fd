"""What the other commands write is whole when they are killed, refused by a disk or run twice.

Exports have tests of their own. Here the work between the writes is played; locks, writers and
their order are the commands' own.
"""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.faults import Faults, Killed, injected, no_waiting
from support.references import bright_in_box, labelled_case, labelled_squares

from dbsam_deploy import engine, plugins, sensitivity
from dbsam_deploy import evaluate as evaluation
from dbsam_deploy import train as training
from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.engines import build as engine_build
from dbsam_deploy.engines.build import EngineOptions, Request
from dbsam_deploy.engines.kinds import TENSORRT
from dbsam_deploy.engines.manifest import engine_folder, read_plan, read_records
from dbsam_deploy.engines.process import Builder
from dbsam_deploy.evaluation import build_protocol, evaluate, page
from dbsam_deploy.files.atomic import sha256_of, write_atomically
from dbsam_deploy.files.locks import LOCK_NAME, one_writer
from dbsam_deploy.kernels import plugin_build
from dbsam_deploy.options.sensitivity_options import SensitivityOptions
from dbsam_deploy.options.train_options import TrainOptions
from dbsam_deploy.training.state import Position, TrainingState, save_state

Hashes = dict[str, str]


@dataclass(frozen=True)
class Command:
    """One command with its output.

    Attributes:
        place: the folder that it locks.
        run: makes what it is named, and waits for others or refuses them.
        check: whether what a reader takes is one whole result; by default every file is.
    """

    place: Path
    run: Callable[..., Any]
    check: Callable[[], None] = lambda: None

    def hashes(self) -> Hashes:
        """Every file below the place."""
        files = (path for path in self.place.rglob("*") if path.is_file())
        return {path.relative_to(self.place).as_posix(): sha256_of(path) for path in files}


def words(arguments: list[str], wait: bool) -> list[str]:
    return arguments if wait else [*arguments, "--no-wait"]


@pytest.fixture
def engines(make_artefact, tmp_path, monkeypatch) -> Command:
    artefact = make_artefact(tmp_path / "build" / "fp32", 64)
    builder = Builder(TENSORRT, "11.4.0.106", "13", ("sm_90",), None)
    levels = {"a": 2, "b": 4}

    def run_job(job, folder, graph):
        with write_atomically(Path(job.plan)) as stream:
            stream.write(f"{graph} {job.flags.optimization_level}".encode())
        Path(job.layers).write_text(json.dumps({"Layers": [{"Name": "a", "LayerType": "gemm"}]}))
        Path(job.timing_cache).write_text("timings")

    def check_options(options: EngineOptions) -> Request:
        return Request(EngineOptions(targets=("sm_90",), flags=options.flags), builder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_build, "run_job", run_job)
    monkeypatch.setattr(engine, "check_options", check_options)

    def run(name: str, wait: bool = True) -> None:
        level = ["--optimization-level", str(levels[name])]
        engine.main(words(["build", "--artefact", str(artefact.folder), *level], wait))

    def check() -> None:
        records, folder = read_records(artefact, TENSORRT), engine_folder(artefact, TENSORRT)
        assert len({record.flags.optimization_level for record in records.values()}) == 1
        for record in records.values():
            read_plan(folder, record)
        load_artefact(artefact.folder)

    return Command(artefact.folder.parent, run, check)


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Command:
    place = tmp_path / "plugins"

    def build(output: Path, **options: Any) -> plugin_build.PluginLibrary:
        cmake = output / "cmake-0"
        cmake.mkdir(parents=True, exist_ok=True)
        said = "tensorrt=11.4.0 cuda=13.0 architectures=90"
        with write_atomically(cmake / "x.so") as stream:
            stream.write(f"{building[-1]}\0dbsam_plugins_build: {said}\0".encode())
        return plugin_build._publish(cmake / "x.so", output)

    building: list[str] = []
    monkeypatch.setattr(plugins, "build_plugins", build)

    def run(name: str, wait: bool = True) -> None:
        building.append(name)
        plugins.main(words(["build", "--output", str(place)], wait))

    def check() -> None:
        plugin_build.read_library(place / plugin_build.LIBRARY_NAME)

    return Command(place, run, check)


@dataclass(frozen=True)
class Found:
    """What stands for a sweep's result."""

    weights: str


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Command:
    place, chosen = tmp_path / "sweep", ["a"]

    class Quantizer:
        SCRATCH = sensitivity.Quantizer.SCRATCH

        @classmethod
        def of(cls, *arguments: Any) -> Quantizer:
            return cls()

        def sweep(self, graph: Path, scratch: Path) -> Found:
            return Found(graph.read_text())

    def export_graph(model: Any, name: str, recipe: Any, folder: Path) -> None:
        with write_atomically(folder / f"{name}.onnx") as stream:
            stream.write(chosen[-1].encode())

    @dataclass(frozen=True)
    class Recipe:
        quantization: object = True

    def load_model(**options: Any) -> SimpleNamespace:
        return SimpleNamespace(weights={"sha256": chosen[-1]}, model=SimpleNamespace(config=0))

    monkeypatch.setattr(sensitivity, "Quantizer", Quantizer)
    for name in ("calibration_plan", "choose_images", "check_quantisable"):
        monkeypatch.setattr(sensitivity, name, lambda *arguments: object())
    monkeypatch.setattr(sensitivity, "load_model", load_model)
    monkeypatch.setattr(sensitivity, "plot", lambda found: f"<svg>{found.weights}</svg>")
    monkeypatch.setattr(sensitivity, "_csv", lambda found: f"{found.weights}\n")
    stages = sensitivity.SweepStages(lambda precision: Recipe(), export_graph)

    def run(name: str, wait: bool = True) -> None:
        chosen.append(name)
        options = SensitivityOptions("int8", tmp_path, output=place, wait=wait)
        sensitivity.find_exclusions(options, Console(file=io.StringIO()), stages=stages)

    return Command(place, run)


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Command:
    place, chosen = tmp_path / "train", ["a"]
    recipe = SimpleNamespace(
        variant="db_sam_tiny", name="toy", seed=0, phases=lambda: [("tune", Position("tune"))]
    )
    recipe.phases = lambda: [("tune", SimpleNamespace(steps=1))]
    recipe.only = lambda phases: recipe
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=1, device="cpu", wait_for_everyone=lambda: None
    )

    def start(*arguments: Any) -> SimpleNamespace:
        torch.manual_seed(ord(chosen[-1]))
        model = torch.nn.Linear(40, 40)
        return SimpleNamespace(model=model, weights={"note": "", "sha256": chosen[-1]})

    def train_phases(run: Any) -> TrainingState:
        state = TrainingState(
            Position("tune", 1, losses=(1.0,)), run.loaded.model.state_dict(), {}, {}
        )
        save_state(run.options.output / training.STATE_NAME, "key", state)
        return state

    material = SimpleNamespace(lines=list, describe=str)
    for name, stand_in in {
        "load_training_recipe": lambda name: recipe,
        "_with_options": lambda recipe, *more: recipe,
        "_accelerator": lambda *arguments: accelerator,
        "gather": lambda *arguments, **options: material,
        "_start_model": start,
        "_validation": lambda options: None,
        "_train_phases": train_phases,
        "installed_versions": dict,
    }.items():
        monkeypatch.setattr(training, name, stand_in)

    def run(name: str, wait: bool = True) -> None:
        chosen.append(name)
        options = TrainOptions("toy", output=place, wait=wait)
        training.train(options, Console(file=io.StringIO()))

    return Command(place, run)


@pytest.fixture
def evaluated(tmp_path, monkeypatch) -> Command:
    place = tmp_path / "evaluation"
    squares = {"a": (4, 4, 20), "b": (8, 30, 16)}
    results = {
        name: evaluate(
            bright_in_box,
            [labelled_case(labelled_squares(1, 64, square), f"task/{name}.npz")],
            build_protocol("objects"),
            with_nsd=False,
            intervals=False,
        )
        for name, square in squares.items()
    }
    chosen = ["a"]

    @contextmanager
    def opened(*arguments: Any) -> Iterator[Any]:
        yield SimpleNamespace(predictor=None, note=""), {"name": chosen[-1]}

    for name, stand_in in {
        "find_cases": lambda *arguments, **options: [],
        "open_evaluated": opened,
        "_check_files": lambda files: [],
        "check_libraries": lambda: None,
        "load_library": lambda name: None,
        "evaluate": lambda *arguments, **options: results[chosen[-1]],
        "print_result": lambda *arguments: None,
    }.items():
        monkeypatch.setattr(evaluation, name, stand_in)
    monkeypatch.setattr(page, "task_plot", lambda result: "<svg></svg>")

    def run(name: str, wait: bool = True) -> None:
        chosen.append(name)
        evaluation.main(["--data", str(tmp_path), "--output", str(place)])

    return Command(place, run)


@pytest.fixture(params=["engines", "compiled", "sweep", "trained", "evaluated"])
def command(request) -> Command:
    """Each command, with results `a` and `b`."""
    return request.getfixturevalue(request.param)


def made(command: Command, name: str) -> Hashes:
    """What a run that nothing disturbs leaves, beside an earlier one's."""
    with no_waiting():
        command.run(name)
    command.check()
    return command.hashes()


def faults_of(command: Command, every: int) -> tuple[Hashes, Hashes, list[int]]:
    """Results `a` and `b` beside each other, and the calls that can fail while `b` replaces `a`."""
    command.place.mkdir(parents=True, exist_ok=True)
    made(command, "a")
    with injected(Faults()) as faults:
        command.run("b")
    points, b = faults.points(), command.hashes()
    return made(command, "a"), b, points if len(points) < 26 else points[::every]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_it_leaves_whole_files_and_the_next_run_the_same_ones(command, every):
    a, b, points = faults_of(command, every)
    for at in points:
        with injected(Faults(at)), pytest.raises(Killed):
            command.run("b")
        command.check()
        found = command.hashes()
        for name in a.keys() | b.keys():
            if not name.startswith((".", "scratch/", "cmake-")):
                assert found.get(name, a.get(name)) in (a.get(name), b.get(name)), (at, name)
        assert made(command, "b") == b
        assert made(command, "a") == a


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_what_was_there_stays(command, every):
    a, b, points = faults_of(command, every)
    refusals: list[str] = []
    for at in points:
        with injected(Faults(at, errno.ENOSPC, lasting=True)):
            try:
                command.run("b")
            except InputError as error:
                refusals.append(error.message)
        command.check()
        assert made(command, "b") == b
        assert made(command, "a") == a
    assert refusals
    assert all(os.strerror(errno.ENOSPC) in line and "\n" not in line for line in refusals)


def test_of_two_at_once_the_second_waits(command):
    a = made(command, "a")
    with one_writer(command.place):
        thread = threading.Thread(target=command.run, args=("b",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        found = command.hashes()
        del found[LOCK_NAME]
        assert found == a
    thread.join(30)
    assert not thread.is_alive()
    command.check()
    assert command.hashes() == made(command, "b")


def test_without_waiting_the_second_is_refused(command):
    if command.place.name == "evaluation":
        pytest.skip("it writes for a moment, after hours of work, and waits")
    made(command, "a")
    with (
        one_writer(command.place),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"),
    ):
        command.run("b", wait=False)


def test_a_disk_that_is_full_inside_pytorchs_writer_says_so(tmp_path):
    """PyTorch hides it behind an error of its own."""
    state = TrainingState(Position("tune"), {"w": torch.zeros(100_000)}, {}, {})
    path = tmp_path / "state.pt"
    save_state(path, "key", state)
    before = path.read_bytes()
    with injected(Faults()) as faults:
        save_state(path, "key", state)
    inside = [at for at, name in enumerate(faults.calls, 1) if name == "stream write"]
    assert len(inside) > 1
    for at in inside:
        with (
            injected(Faults(at, errno.ENOSPC, lasting=True)),
            pytest.raises(OSError, match="No space left on device"),
        ):
            save_state(path, "key", state)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])
