"""What the benchmarks share: db_sam_tiny at 256×256 as an fp32 export, its PyTorch model, an image.

Those of the kernels share a GPU's ceilings and the way to compare variants instead.

On the CPU everything runs on one thread: on a shared machine with few cores the share of time that
a second thread gets is the largest source of noise (docs/adr/002-benchmark-ratios.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.references import check_close
from timing import gpu as gpu_benchmarking

from dbsam_deploy.artefact import Artefact, graph_file, load_artefact, write_artefact
from dbsam_deploy.core.imaging import preprocess
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.recipe import Gate, load_recipe
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.validation import measuring

VARIANT, PRECISION, IMAGE_SIZE, THREADS = "db_sam_tiny", "fp32", 256, 1
EXAMPLE = "Microscopy_nuclei_HE_01d44a26f668.npz"


@dataclass(frozen=True)
class Case:
    """One image and its prompts.

    Attributes:
        image: (256, 320, 3) uint8 RGB.
        boxes: (7, 4) float32 x0, y0, x1, y1 in the image frame, one around each nucleus.
    """

    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """The export under test beside the model it was made from."""

    artefact: Artefact
    onnxruntime: OnnxRuntimeSession
    pytorch: PytorchSession
    gate: Gate

    @property
    def facts(self) -> dict[str, str | float]:
        """What stands in every row."""
        return {"model": f"{VARIANT} {PRECISION} {IMAGE_SIZE} px", "batch": 1}


@pytest.fixture(scope="session")
def case() -> Case:
    with np.load(resource_dir("export") / "examples" / EXAMPLE, allow_pickle=False) as arrays:
        image, labels, ids = arrays["imgs"][0], arrays["gts"][0], arrays["label_ids"]
    boxes = []
    for label in ids:
        rows, columns = np.nonzero(labels == label)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return Case(image, np.array(boxes, np.float32))


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("benchmark_export")
    recipe = load_recipe(PRECISION)
    loaded = load_model(variant=VARIANT, image_size=IMAGE_SIZE)
    paths = [
        export_graph(loaded.model, name, recipe, folder).path for name in ("encoder", "decoder")
    ]
    graphs = {path.stem: graph_file(path, folder) for path in paths}
    write_artefact(
        Artefact(folder, VARIANT, PRECISION, loaded.preprocessing, graphs, loaded.weights)
    )
    artefact = load_artefact(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield Subject(
        artefact,
        OnnxRuntimeSession(artefact, threads=THREADS),
        PytorchSession(loaded.model),
        recipe.gate,
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pixels(case: Case, subject: Subject) -> npt.NDArray[np.float32]:
    """The case in the model frame, (1, 3, 256, 256) float32."""
    return preprocess(case.image, subject.artefact.preprocessing)


@pytest.fixture(scope="session")
def reference_masks(case: Case, subject: Subject) -> npt.NDArray[np.uint8]:
    """The PyTorch model's masks of the case, (7, 256, 320) uint8."""
    predictor = Predictor(subject.pytorch, subject.artefact.preprocessing)
    predictor.set_image(case.image)
    return predictor.predict_boxes(case.boxes).masks[:, 0]


@pytest.fixture(scope="session")
def check_masks(subject: Subject, reference_masks: npt.NDArray[np.uint8]):
    """`check_masks(masks)`: hold (N, 256, 320) masks against the gate; returns the row's facts.

    What they are compared with are PyTorch's of the case's seven boxes, unless others are given.
    """

    def check(
        masks: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8] = reference_masks
    ) -> dict[str, str | float]:
        assert masks.shape == expected.shape
        assert expected.any()
        dice = [_dice(ours, theirs) for ours, theirs in zip(masks, expected, strict=True)]
        assert np.mean(dice) >= subject.gate.mask_agreement_mean, dice
        assert np.percentile(dice, 5) >= subject.gate.mask_agreement_p5, dice
        return {**subject.facts, "agreement": float(np.mean(dice)), "boxes": len(masks)}

    return check


def _dice(ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> float:
    total = int(ours.sum()) + int(theirs.sum())
    return 2 * int((ours & theirs).sum()) / total if total else 1.0


@dataclass(frozen=True)
class Gpu:
    """What a benchmark on the GPU measures with, and against."""

    stopwatch: measuring.Stopwatch
    ceilings: measuring.Ceilings
    reference: Callable[[], object]
    cache_bytes: int


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    stopwatch = measuring.CudaStopwatch()
    return Gpu(
        stopwatch,
        measuring.measure_ceilings(stopwatch),
        gpu_benchmarking.gpu_reference_workload(),
        measuring.cache_bytes(),
    )


@pytest.fixture
def compare_kernel(benchmark_ratio, gpu: Gpu):
    """`compare_kernel(variants, draw, reference, work, facts)`: check all variants, time them.

    `draw()` returns fresh random inputs; `variants["ours"]` is what the row is about; `reference`
    gets the inputs in float32. Ours is held to the kernels' tolerance, unless `bound` names another
    one; the peers round between their operators and are held to that of graphs.
    """

    def run(variants, draw, reference, work: measuring.Demand, facts, *, bound: str = "") -> None:
        torch.compiler.reset()  # else the variants of earlier benchmarks count as recompilations
        count = measuring.sets_needed(work.bytes, gpu.cache_bytes)
        with torch.inference_mode():
            sets = [draw() for _ in range(count)]
            graphs, missing = gpu_benchmarking.capture_all(variants, sets)
        dtype = str(sets[0][0].dtype).removeprefix("torch.")

        def check(_) -> dict[str, str | float]:
            for name, graph in graphs.items():
                for inputs, outputs in zip(sets, graph(), strict=True):
                    with torch.inference_mode():
                        expected = reference(*(tensor.float() for tensor in inputs))
                    for found, truth in zip(outputs, measuring.as_tuple(expected), strict=True):
                        allowed = (bound or f"{dtype} kernel") if name == "ours" else dtype
                        check_close(found.float().cpu().numpy(), truth.cpu().numpy(), allowed, name)
            seconds = measuring.take_turns(graphs, gpu.stopwatch)
            each = {name: time / count for name, time in seconds.items()}
            row = measuring.row_facts(each, "ours", work, gpu.ceilings)
            return {"dtype": dtype, **facts, **row, **missing}

        ours = gpu_benchmarking.synchronized(graphs["ours"])
        benchmark_ratio(ours, check, reference=gpu.reference)

    return run
