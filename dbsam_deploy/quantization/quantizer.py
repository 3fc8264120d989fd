"""What an export does between a graph's ONNX file and its fusions, if its recipe quantises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import onnx
from rich.progress import Progress

from ..cli import say_on_stderr
from ..core.contract import IMAGE, graph_specs
from ..core.errors import InputError
from ..core.imaging import FloatArray, Preprocessing, preprocess
from ..files import onnx_files
from ..files.atomic import sha256_of, write_atomically
from ..files.manifests import seal_of
from ..graphs.precision import DTYPES
from ..model.held import HeldModel
from ..model.weights import LoadedModel
from ..recipe import Quantization, Recipe, calibration_plan
from ..sessions.pytorch_session import PytorchSession
from .calibration_images import CalibrationSet, choose_images, read_images
from .held_back import make_views
from .layers import find_layers
from .modelopt_tool import check_modelopt
from .qdq import Calibrated, calibrate, describe, quantize_graph
from .sweep import Judge, Sweep, accepts, check_groups, groups_of, sweep

_DAMAGED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, RecursionError),
    *(BadZipFile, ZlibError),
)
"""What reading a damaged record or its codes raises."""


def calibration_images(
    recipe: Recipe, path: Path | None, budget: float | None
) -> CalibrationSet | None:
    """The images that the recipe needs, chosen before any long work.

    Arguments are those of `recipe.calibration_plan`.

    Raises:
        InputError: see `calibration_plan` and `choose_images`.
    """
    plan = calibration_plan(recipe, path, budget)
    return None if plan is None or path is None else choose_images(path, plan)


def check_quantisable(loaded: LoadedModel | HeldModel, recipe: Recipe) -> None:
    """Refuse an encoder whose float graph has its weights in a second file, and SAM 2's.

    Raises:
        InputError: it has, or is, and the recipe quantises.
    """
    if recipe.quantization is None:
        return
    if loaded.preprocessing.high_res:
        raise InputError(
            f"{recipe.precision} quantises, which was not measured for {loaded.model.config.name} "
            "and its three features: export it with --precision fp16"
        )
    count = sum(parameter.numel() for parameter in loaded.model.image_encoder.parameters())
    if count * DTYPES[recipe.dtype].itemsize > onnx_files.ONE_FILE_BYTES:
        raise InputError(
            f"{loaded.model.config.name} has {count / 1e6:.0f} M weights in its encoder, and "
            f"{recipe.precision} quantises graphs of at most 2 GiB: export it with --precision fp16"
        )


@dataclass(frozen=True)
class Quantizer:
    """Quantises the graphs that a recipe names, each in its own file.

    Attributes:
        plan: the recipe's table, None for a recipe that quantises nothing.
        images: for the ranges, None if the plan needs none.
        how: preprocessing of the images.
        budget: see `options.export_options.ExportOptions`.
        loaded: the model, as the reference of a sweep.
        recipe: the whole recipe, for the sweep's gate.
        bars: where progress is shown, started by the caller.
    """

    SCRATCH: ClassVar[str] = "quantize"
    """Folder beside the graphs with what must not be published: ranges, facts, a sweep's state."""

    plan: Quantization | None
    images: CalibrationSet | None
    how: Preprocessing
    budget: float | None
    loaded: LoadedModel | HeldModel
    recipe: Recipe
    bars: Progress

    @classmethod
    def of(
        cls,
        loaded: LoadedModel | HeldModel,
        recipe: Recipe,
        images: CalibrationSet | None,
        budget: float | None,
        bars: Progress,
    ) -> Quantizer:
        """For a recipe, see the attributes.

        Raises:
            InputError: images for another graph than the encoder, whose inputs are the only images;
                or a recipe that modelopt cannot follow, or a model too large for one file, or
                SAM 2's.
            EngineError: modelopt is wanted and not installed.
        """
        plan = recipe.quantization
        if plan is not None and plan.tool == "modelopt":
            check_modelopt(plan)
        if plan is not None and not set(plan.graphs) <= set(graph_specs(loaded.preprocessing)):
            raise InputError(f"recipe {recipe.precision}: graphs {plan.graphs} are not all known")
        if plan is not None and plan.calibration is not None and plan.graphs != ("encoder",):
            raise InputError(
                f"recipe {recipe.precision}: graphs = {list(plan.graphs)}; ranges can be found for "
                'the encoder alone, whose input is an image: graphs = ["encoder"]'
            )
        check_quantisable(loaded, recipe)
        return cls(plan, images, loaded.preprocessing, budget, loaded, recipe, bars)

    @property
    def key(self) -> str:
        """Whatever of this changes the result beyond the recipe."""
        return repr((self.images.manifest() if self.images else None, self.budget))

    def run(self, name: str, path: Path) -> tuple[str, ...]:
        """Quantise a graph in its file, if the plan names it.

        Args:
            name: of the graph.
            path: its file, in standard operators.

        Returns:
            Paths of the modules that are quantised now.
        """
        if self.plan is None or name not in self.plan.graphs:
            return ()
        scratch = path.parent / self.SCRATCH
        scratch.mkdir(exist_ok=True)
        float_bytes = path.stat().st_size
        calibrated = self._calibrate(path, scratch)
        exclude = () if self.budget is None else self._choose(calibrated, scratch).exclude
        quantized = quantize_graph(calibrated, self.plan, path, exclude=exclude)
        facts = {**describe(quantized, self.plan), "float_bytes": float_bytes}
        if self.budget is not None:
            facts["left_out"] = list(exclude)
        with write_atomically(scratch / f"{name}.json") as stream:
            stream.write(json.dumps(facts).encode())
        return quantized.modules

    def sweep(self, path: Path, scratch: Path) -> Sweep:
        """Find the layers to leave out of a float encoder, which is not changed.

        Args:
            path: the encoder.
            scratch: folder for the sweep's state.

        Raises:
            InputError: no plan, no budget or no images.
        """
        if self.plan is None or self.budget is None:
            raise InputError("a sweep needs a recipe that quantises, and a budget")
        return self._choose(self._calibrate(path, scratch), scratch)

    def _calibrate(self, path: Path, scratch: Path) -> Calibrated:
        """Ranges of a float graph; those of an interrupted run are taken over."""
        if self.plan is None:
            raise InputError(f"recipe {self.recipe.precision} quantises nothing")
        if self.images is None:
            return calibrate(path, self.plan, self._feeds, scratch)
        state, graph = scratch / "ranges.json", sha256_of(path)
        key = [graph, repr(self.plan), repr(self.how), self.images.manifest()]
        if (known := self._known(state, key, path.parent)) is not None:
            return known
        calibrated = calibrate(path, self.plan, self._feeds, scratch, progress=self._bar())
        codes_file = f"codes-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz"
        with write_atomically(scratch / codes_file) as stream:
            np.savez(stream, allow_pickle=False, **calibrated.codes)
        body = {
            "codes": codes_file,
            "codes_sha256": sha256_of(scratch / codes_file),
            "key": key,
            "graph": str(calibrated.path.relative_to(path.parent)),
            "sha256": sha256_of(calibrated.path),
            "thresholds": calibrated.thresholds,
            "lowest": calibrated.lowest,
        }
        with write_atomically(state) as stream:
            stream.write(json.dumps({**body, "seal": seal_of(body)}).encode())
        return calibrated

    def _known(self, state: Path, key: list[Any], folder: Path) -> Calibrated | None:
        """What an interrupted run calibrated, if it is intact and from the same `key`."""
        if self.plan is None or not state.is_file():
            return None
        try:
            known = json.loads(state.read_text())
            if known.pop("seal") != seal_of(known):
                raise ValueError("its seal does not fit")
            found, codes_file = folder / known["graph"], state.parent / known["codes"]
            if known["key"] != key or not found.is_file() or sha256_of(found) != known["sha256"]:
                return None
            if sha256_of(codes_file) != known["codes_sha256"]:
                raise ValueError(f"{codes_file.name} has changed")
            layers = find_layers(onnx.load(found), self.plan.operators)
            ranges = known["thresholds"], known["lowest"]
            with np.load(codes_file, allow_pickle=False) as codes:
                return Calibrated(found, layers, *ranges, dict(codes), self._feeds)
        except _DAMAGED as error:
            say_on_stderr(f"{state} is damaged ({error}); the ranges are found anew")
            return None

    def _choose(self, calibrated: Calibrated, scratch: Path) -> Sweep:
        if self.plan is None or self.images is None or self.budget is None:
            raise InputError("a sweep needs calibration images and a budget")
        groups = groups_of(calibrated.layers, self.plan)
        check_groups(groups)
        budget, gate, chosen = self.budget, self.recipe.gate, self.images
        step = self._bar("held-back images")
        session = PytorchSession(self.loaded.model)
        views = list(
            make_views(chosen.folder, chosen.held_back, session, self.how, self.recipe.parity)
        )
        judge = Judge(calibrated, self.plan, views, scratch)

        return sweep(
            groups, judge, lambda m: accepts(m, budget, gate), budget=budget, progress=step
        )

    def _bar(self, text: str = "") -> Callable[[str, int, int], None]:
        """A bar that is moved by (text, done, total); without a text it shows when first moved."""
        task = self.bars.add_task(text, total=None, visible=bool(text), start=bool(text))

        def step(text: str, done: int, total: int) -> None:
            self.bars.start_task(task)  # its clock, once
            self.bars.update(task, description=text, completed=done, total=total, visible=True)

        return step

    def describe(self, folder: Path) -> dict[str, Any]:
        """Facts for the manifest, after `run` for every graph in `folder`."""
        if self.plan is None:
            return {}
        files = {name: folder / self.SCRATCH / f"{name}.json" for name in self.plan.graphs}
        facts: dict[str, Any] = {n: json.loads(file.read_text()) for n, file in files.items()}
        return {
            "graphs": facts,
            "calibration": self.images.manifest() if self.images else None,
            "budget": self.budget,
        }

    def _feeds(self) -> Iterator[dict[str, FloatArray]]:
        if self.images is not None:
            found = read_images(self.images.folder, self.images.images)
            total = len(self.images.images)
            for _, pixels in self.bars.track(found, total=total, description="calibrating"):
                yield {IMAGE: preprocess(pixels, self.how)}
