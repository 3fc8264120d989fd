"""The command line of engines, and engines as a stage of the export."""

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.cuda import CpuGpu, stand_in_device
from support.engines import STAND_IN_GPU, VERSIONS, fake_runtime, put_engines

from dbsam_deploy import engine
from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import AccuracyError, CheckpointError
from dbsam_deploy.engines import build as engine_build
from dbsam_deploy.engines.build import Choice, EngineOptions, Request
from dbsam_deploy.engines.device import Gpu, find_gpu
from dbsam_deploy.engines.kinds import KINDS, TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import read_records
from dbsam_deploy.engines.process import Builder
from dbsam_deploy.export import Stages, export, main
from dbsam_deploy.extras import pip_line
from dbsam_deploy.serving.repository import build_repository, load_repository
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.engine_parity import verify_engines

needs_no_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")


@pytest.fixture
def copied(tiny_artefact, tmp_path):
    shutil.copytree(tiny_artefact.folder, tmp_path / "artefact")
    return load_artefact(tmp_path / "artefact")


@pytest.mark.rtx
@needs_no_gpu
def test_build_and_inspect_on_a_machine_without_a_gpu(copied, capsys):
    build = ["build", "--artefact", str(copied.folder), "--engine", "tensorrt-rtx"]
    assert run(engine.main, [*build, "--target", "sm_86,sm_120"]) == 0
    text = capsys.readouterr()
    assert "building tensorrt-rtx decoder" in text.err
    assert "built, not verified, and refused until then" in text.out
    assert "python -m dbsam_deploy.engine verify --artefact" in text.out
    place = f"model_repository_{copied.folder.name}"
    assert f"{place} is unchanged: a Triton server runs TensorRT engines, not" in text.out
    records = read_records(copied, TENSORRT_RTX)
    assert records["encoder"].targets == ("sm_86", "sm_120")
    assert run(engine.main, ["inspect", "--artefact", str(copied.folder)]) == 0
    text = capsys.readouterr().out
    for piece in ("no NVIDIA GPU", "encoder.plan", "sm_86, sm_120", "not run: no GPU", "unknown"):
        assert piece in text
    assert run(engine.main, ["verify", *build[1:]]) == 2
    assert "engines run on an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--artefact", "FOLDER", "--engine", "trt"], "invalid choice: 'trt'"),
        (["build", "--artefact", "FOLDER", "--target", "ada"], "expected GPUs such as sm_86"),
        (["build", "--artefact", "FOLDER", "--optimization-level", "9"], "invalid choice: 9"),
        (["build", "--artefact", "FOLDER", "--target", "sm_86"], "goes with --engine tensorrt-rtx"),
        (["inspect", "--artefact", "FOLDER"], "has no engines; build them"),
        (["inspect", "--artefact", "FOLDER/nothing"], "no manifest.json in"),
        ([], "the following arguments are required"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(copied, arguments, message, capsys):
    arguments = [part.replace("FOLDER", str(copied.folder)) for part in arguments]
    assert run(engine.main, arguments) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err


def test_verified_engines_reach_the_server(copied, monkeypatch, capsys):
    put_engines(copied, TENSORRT)
    place = copied.folder.parent / f"model_repository_{copied.folder.name}"
    build_repository(copied, place)
    gpu, loaded = CpuGpu(), SimpleNamespace(weights=copied.weights, model=None)
    runtime = fake_runtime(gpu, VERSIONS["tensorrt"])
    monkeypatch.setattr("dbsam_deploy.model.weights.load_model", lambda **options: loaded)
    monkeypatch.setattr(engine, "PytorchSession", lambda model: OnnxRuntimeSession(copied))
    monkeypatch.setattr(engine, "open_device", lambda: stand_in_device(gpu))
    monkeypatch.setattr(engine, "verify_engines", partial(verify_engines, runtime=runtime))
    assert run(engine.main, ["verify", "--artefact", str(copied.folder)]) == 0
    assert capsys.readouterr().out.endswith(f"{place} now serves these engines\n")
    assert set(load_repository(place).platforms.values()) == {"tensorrt"}


def test_verifying_with_other_weights_is_refused(copied, monkeypatch):
    put_engines(copied, TENSORRT)
    artefact = replace(copied, variant="db_sam_tiny", weights={**copied.weights, "sha256": "abc"})
    monkeypatch.setattr(engine, "load_artefact", lambda folder: artefact)
    monkeypatch.setattr(engine, "open_device", lambda: stand_in_device(CpuGpu()))
    arguments = ["verify", "--artefact", str(copied.folder)]
    with pytest.raises(CheckpointError, match=r"was exported from random \(SHA-256 abc\).*--check"):
        engine.main(arguments)


def cells(table: str) -> str:
    """The text of a printed table, column after column of each row, however its cells wrap."""
    rows = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    return " ".join(" ".join(" ".join(column).split()) for column in zip(*rows, strict=True))


def test_what_was_measured_is_shown(copied, capsys):
    from dbsam_deploy.engines.manifest import PassedGate, engine_folder, sign

    put_engines(
        copied,
        TENSORRT,
        layers={"layers": 9, "plugins": 2, "operators": 2, "fused_attention": 1, "attention": 1},
    )
    figures = {
        "default": {"embedding_cosine": 0.99951, "mask_agreement_p5": 0.97},
        "other": {"embedding_cosine": 0.99942, "mask_agreement_p5": 0.98},
    }
    parity = PassedGate(STAND_IN_GPU, figures, {}, {})
    sign(engine_folder(copied, TENSORRT), read_records(copied, TENSORRT), parity)
    assert run(engine.main, ["inspect", "--artefact", str(copied.folder)]) == 0
    text = cells(capsys.readouterr().out)
    assert "sm_86: cosine 0.999420, agreement p5 0.9700" in text
    assert "2 of 2 operators in plugins, 1 of 1 other attentions fused" in text


@pytest.fixture
def published(published_export, tmp_path):
    """A finished export in a folder of its own, with the options that made it."""
    options, made = published_export
    shutil.copytree(options.output, tmp_path / "build")
    # Images in graphs, which engines would have by themselves, is what another export is made for.
    return replace(options, output=tmp_path / "build", imaging="host"), made


def request_for(kind, gpu):
    builder = Builder(kind, VERSIONS[kind.name], "13", ("sm_86",), gpu)
    return Request(EngineOptions(kind, ("sm_86",)), builder)


@pytest.mark.parametrize("gpu", [None, Gpu("Another", "sm_90", "13.0"), STAND_IN_GPU])
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_the_export_builds_engines_and_verifies_them_where_they_run(published, kind, gpu):
    options, _ = published
    done = []

    def build(artefact, request, progress):
        done.append("build")
        assert artefact.folder == options.output / "fp16"
        return read_records(put_engines(artefact, kind), kind)

    def verify(artefact, kind, reference, cases, gate, progress):
        done.append("verify")
        assert (reference.backend, len(cases)) == ("pytorch-cpu", 6)
        assert gate.embedding_cosine == 0.999
        return read_records(artefact, kind)

    choice = Choice(request_for(kind, gpu))
    stages = Stages(
        choose_engines=lambda *asked: choice, build_engines=build, verify_engines=verify
    )
    result = export(options, Console(quiet=True), stages=stages)
    assert done == ["build", *["verify"] * (gpu is STAND_IN_GPU)]
    assert set(result.engines) == set(result.artefact.graphs)
    assert result.engine_note == ""


def test_engines_that_miss_the_gate_are_not_served(published):
    options, made = published

    def build(artefact, *more):
        return read_records(put_engines(artefact, TENSORRT), TENSORRT)

    def missed(*arguments, **options):
        raise AccuracyError("missed")

    choice = Choice(request_for(TENSORRT, STAND_IN_GPU))
    stages = Stages(
        choose_engines=lambda *asked: choice, build_engines=build, verify_engines=missed
    )
    with pytest.raises(AccuracyError):
        export(options, Console(quiet=True), stages=stages)
    repository = load_repository(options.output / "model_repository_fp16")
    assert set(repository.platforms.values()) == {"onnxruntime"}
    noted = Stages(choose_engines=lambda *asked: Choice(None, "a note"))
    again = export(options, Console(quiet=True), stages=noted)
    assert again.engine_note == "a note"
    assert set(again.repository.platforms.values()) == {"onnxruntime"}
    assert again.artefact.graphs == made.artefact.graphs


@needs_no_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "tensorrt"], "TensorRT"),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--target", "sm_90"],
            "does not build for sm_90",
            marks=pytest.mark.rtx,
        ),
        (["--engine", "tensorrt", "--target", "sm_90"], "--target goes with --engine tensorrt-rtx"),
        (["--target", "sm_86"], "--target goes with --engine tensorrt-rtx"),
        (["--engine", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_engines_that_cannot_be_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    def long_work(**options):
        raise AssertionError("the model was loaded first")

    command = ["--precision", "fp16", "--output", str(tmp_path / "build"), *arguments]
    assert run(partial(main, stages=Stages(load_model=long_work)), command) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_the_export_ends_with_one_line_about_it(published, monkeypatch, capsys):
    options, _ = published
    monkeypatch.setattr(engine_build, "find_gpu", lambda: None)
    arguments = ["--precision", "fp16", "--image-size", "256", "--output", str(options.output)]
    assert run(main, arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "engine" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: no engines were built (there is no NVIDIA GPU here); to bui")
    assert pip_line("rtx") in lines[0]
