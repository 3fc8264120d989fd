"""The composition root: publishes what passes, resumes, refuses, leaves nothing half-written."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console
from support.commands import refused
from support.toy_exports import Toy

from dbsam_deploy import export as door
from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import AccuracyError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.engines.kinds import TENSORRT_RTX
from dbsam_deploy.export import Stages, export, main
from dbsam_deploy.extras import pip_line
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.options.export_options import ExportOptions
from dbsam_deploy.recipe import OPTIONAL_FUSIONS, load_recipe
from dbsam_deploy.serving.repository import load_repository
from dbsam_deploy.verification.report import closing_table


@pytest.fixture
def copied(published_export, tmp_path):
    """The session's export in a folder of its own, with the options that made it."""
    options, published = published_export
    shutil.copytree(options.output, tmp_path / "build")
    return replace(options, output=tmp_path / "build"), published


def no_export(*args, **kwargs):
    raise AssertionError("exported again although nothing changed")


def test_everything_published_is_what_the_manifest_says(published_export):
    options, published = published_export
    folder = options.output / "fp16"
    artefact = load_artefact(folder)
    assert artefact == published.artefact
    assert set(artefact.graphs) == set(graph_specs(Geometry(256)))
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json",
        "gate.npz",
        *(f"{g}.onnx" for g in artefact.graphs),
    }
    assert {p.name for p in options.output.iterdir()} == {"fp16", "model_repository_fp16"}
    assert artefact.weights["trained"]
    assert artefact.versions["torch"].startswith("2.13.0")
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    assert figures["images"] == 6
    assert figures["embedding_cosine"] >= 0.999
    assert figures["mask_agreement_p5"] >= 0.95
    assert 2 * figures["empty_masks"] <= figures["objects"]
    repository = load_repository(options.output / "model_repository_fp16")
    served = repository.folder / "dbsam_encoder" / "1" / "model.onnx"
    assert sha256_of(served) == artefact.graphs["encoder"].sha256


def test_the_files_run_and_are_half_precision(published_export):
    _, published = published_export
    for name, spec in graph_specs(Geometry(256)).items():
        session = onnxruntime.InferenceSession(
            str(published.artefact.path(name)), providers=["CPUExecutionProvider"]
        )
        assert [i.name for i in session.get_inputs()] == spec.input_names
    weights = onnx.load(published.artefact.path("encoder")).graph.initializer
    sizes = {t: sum(np.prod(w.dims) for w in weights if w.data_type == t) for t in (1, 10)}
    assert sizes[10] > 1000 * sizes[1]


def test_a_second_run_exports_nothing_again(copied):
    options, published = copied
    stages = Stages(export_graph=no_export, compare=no_export)
    manifest = options.output / "fp16" / "manifest.json"
    os.utime(manifest, (1, 1))
    again = export(options, Console(quiet=True), stages=stages)
    assert manifest.stat().st_mtime > 1  # it is the newest again, which predict takes
    assert again.artefact.graphs == published.artefact.graphs
    assert again.figures == published.figures


def test_a_damaged_file_is_exported_again(copied):
    options, _ = copied
    path = options.output / "fp16" / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    seen = []
    stages = Stages(export_graph=lambda m, name, r, f: seen.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(options, Console(quiet=True), stages=stages)
    assert seen == ["encoder"]


def test_answers_that_no_later_export_is_to_have_are_kept_for_this_one(copied):
    """So that it need not hold PyTorch's model and its own in memory at once."""
    options, published = copied
    known, kept = published.artefact, []

    def copy(model, name, recipe, folder):
        shutil.copy(known.path(name), folder / f"{name}.onnx")

    def compare(references, *rest, **named):
        references.run("encoder", {"image": np.zeros((1, 3, 256, 256), np.float32)})
        kept.append(references.keeps)
        return published.figures

    recipe = replace(load_recipe("fp16"), description="another")
    stages = Stages(lambda precision: recipe, export_graph=copy, compare=compare)
    console = Console(record=True, width=200)
    export(replace(options, keep_references=False), console, stages=stages)
    assert kept == [True]
    assert "not kept" not in console.export_text()
    assert {p.name for p in options.output.iterdir()} == {"fp16", "model_repository_fp16"}


def test_an_interrupted_export_resumes_with_the_finished_graphs(copied):
    """A kill between two graphs keeps the first; the manifest of before stays as it was."""
    options, published = copied
    finished = options.output / "fp16"
    before = (finished / "manifest.json").read_bytes()
    real, calls = published.artefact, []

    def changed_recipe(precision):
        return replace(load_recipe(precision), description="another")

    def fake_export(model, name, recipe, folder):
        if name == "prompt_decoder" and "prompt_decoder" not in calls:
            calls.append(name)
            raise KeyboardInterrupt
        calls.append(name)
        shutil.copy(real.path(name), folder / f"{name}.onnx")

    stages = Stages(
        changed_recipe, export_graph=fake_export, compare=lambda *a, **k: published.figures
    )
    with pytest.raises(KeyboardInterrupt):
        export(options, Console(quiet=True), stages=stages)
    assert (finished / "manifest.json").read_bytes() == before
    export(options, Console(quiet=True), stages=stages)
    assert (finished / "manifest.json").read_bytes() != before
    assert calls == ["encoder", "decoder", "prompt_decoder", "prompt_decoder"]


def test_a_recipe_may_ask_for_a_fusion_that_none_has_by_itself(copied, half_graphs):
    options = replace(copied[0], imaging="graph")
    asked = replace(load_recipe("fp16"), optional_fusions=OPTIONAL_FUSIONS)
    found = []

    def take(model, name, recipe, folder):
        if name != "encoder":
            (finished,) = folder.parent.rglob("encoder.onnx")
            graph = onnx.load(finished).graph
            assert graph.input[0].name == "pixels"
            found.extend(node.op_type for node in graph.node)
            raise KeyboardInterrupt
        shutil.copy(half_graphs / f"{name}.onnx", folder)

    with pytest.raises(KeyboardInterrupt):
        export(options, Console(quiet=True), stages=Stages(lambda _: asked, export_graph=take))
    counts = [found.count(op) for op in ("DepthwiseConvGelu", "WindowedAttention")]
    assert counts == [8, 4]


def copying(published, figures):
    """Stages that take the graphs of a finished export, and these figures for a comparison."""

    def take(model, name, recipe, folder):
        shutil.copy(published.artefact.path(name), folder)

    return Stages(export_graph=take, compare=lambda *arguments, **options: figures)


def test_a_missed_gate_publishes_nothing(copied):
    options, published = copied
    shutil.rmtree(options.output / "fp16")
    shutil.rmtree(options.output / "model_repository_fp16")
    bad = replace(published.figures, mask_agreement_p5=0.9)
    with pytest.raises(AccuracyError, match=r"mask agreement p5 0\.900000 < 0\.95"):
        export(options, Console(quiet=True), stages=copying(published, bad))
    assert not (options.output / "fp16").exists()
    assert not (options.output / "model_repository_fp16").exists()


def test_a_foreign_folder_is_not_replaced(copied):
    options, published = copied
    shutil.rmtree(options.output / "fp16")
    (options.output / "fp16").mkdir()
    (options.output / "fp16" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not an export of this library"):
        export(options, Console(quiet=True), stages=copying(published, published.figures))
    assert (options.output / "fp16" / "thesis.tex").read_text() == "mine"


def test_closing_table_shows_every_stage_and_the_state_of_the_weights(published_export):
    _, published = published_export
    console = Console(record=True, width=110)
    note = f"to build engines: {pip_line('rtx')}"
    closing_table(
        published.artefact,
        published.figures,
        published.repository.folder,
        console,
        engine_note=note,
    )
    text = console.export_text()
    assert f"note: {note}\n" in text  # rich would take the brackets for its own
    for piece in ("encoder", "decoder", "prompt_decoder", "repository", "cosine", "Dice"):
        assert piece in text
    assert f"{published.figures.mask_agreement_mean:.4f}" in text
    assert "untrained" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--precision"),
        ("--precision fp12", "invalid choice: 'fp12'"),
        ("--precision fp32 --variant sam", "invalid choice: 'sam'"),
        ("--precision fp32 --checkpoint none.pth", "none.pth: no such file"),
        ("--precision fp32 --image-size 1000", "multiple of 16"),
        ("--precision fp32 --data nowhere", "nowhere: no such file or folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, arguments.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_what_is_not_quantised_says_so_before_it_asks_for_images(tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(name="medsam2"))
    loaded = LoadedModel(model, Preprocessing(64, high_res=True), {})
    options = ExportOptions(precision="int8", calibration=tmp_path, output=tmp_path / "build")
    with pytest.raises(InputError, match="int8 quantises, which was not measured for medsam2"):
        export(options, stages=Stages(load_model=lambda **choice: loaded))


def test_sams_two_files_are_published_beside_an_export(toy, monkeypatch):
    """What is in them: tests/verification/test_sam_files.py."""
    with pytest.raises(InputError, match="image size 64"):
        toy.run(signature="sam")
    assert not (toy.output / "fp32").exists()
    monkeypatch.setattr(door, "check_sam_files", lambda how, recipe, folder: None)
    published = []
    monkeypatch.setattr(door, "publish_sam_files", lambda made, say: published.append(made.folder))
    toy.run()
    assert published == []
    toy.run(signature="sam")
    assert published == [toy.output / "fp32"]


def test_graphs_resize_images_where_engines_are_built_or_it_is_asked_for(toy, monkeypatch):
    """What they make of images and logits: tests/graphs/test_imaging_graphs.py."""

    def exported(**options):
        toy.run(**options)
        made = load_artefact(toy.output / "fp32")
        in_graph = made.preprocessing.pixels_in_graph
        assert ("mask_bits" in made.graphs) is in_graph
        served = load_repository(toy.output / "model_repository_fp32")
        assert ("mask_bits" in served.platforms) is in_graph
        assert served.preprocessing == made.preprocessing
        return in_graph, made.graphs["encoder"]

    on_host = exported()
    assert on_host == (False, toy.graphs["a"].graphs["encoder"])
    asked, in_graph = exported(imaging="graph")
    assert asked
    assert in_graph != on_host[1]
    assert exported(imaging="host") == on_host
    request = SimpleNamespace(options=SimpleNamespace(kind=TENSORRT_RTX), builder=None)
    monkeypatch.setattr(door, "_engine_stage", lambda *stage: {})
    monkeypatch.setattr(Toy, "stages", with_engines(Toy.stages, request))
    assert exported() == (True, in_graph)
    assert exported(imaging="host") == on_host


def with_engines(stages, request):
    """Stages that would build engines."""

    def of(toy, weights):
        return replace(
            stages(toy, weights),
            choose_engines=lambda *choice: SimpleNamespace(request=request, note=""),
        )

    return of


def test_images_in_the_graph_and_files_in_sams_signature_exclude_each_other(toy):
    with pytest.raises(InputError, match="--imaging graph with --signature sam: files in SAM's"):
        toy.run(signature="sam", imaging="graph")
    assert not toy.output.exists()
