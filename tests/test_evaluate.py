"""The command line on real graphs: figures out, files written, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import loaded

from dbsam_deploy import evaluate as command
from dbsam_deploy.artefact import Artefact
from dbsam_deploy.cli import run
from dbsam_deploy.evaluation import build_protocol, evaluate, find_cases, read_case
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.environment import ServerEnvironment
from dbsam_deploy.serving.repository import Repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.sessions import engine_session
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.cases import bundled_examples

ROOT = Path(__file__).resolve().parent.parent
NUCLEI = "Microscopy_nuclei_HE_01d44a26f668.npz"
HEART = "MR_cardiac_LV_SC-HYP-38.npz"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks with one real file each."""
    for task, name in (("nuclei", NUCLEI), ("MR_cardiac_LV", HEART)):
        (tmp_path / "data" / task).mkdir(parents=True)
        shutil.copy(bundled_examples() / name, tmp_path / "data" / task / name)
    return tmp_path / "data"


class Command:
    """Runs `main` as the shell would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> str:
        status, out, err = self.run(*words)
        assert (status, err) == (0, "")
        return out

    def run(self, *words: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        status = run(command.main, [str(word) for word in words])
        out, err = self.capsys.readouterr()
        return status, out, err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_an_artefact_with_every_file(
    shell: Command, data: Path, tiny_artefact: Artefact, tmp_path: Path
) -> None:
    out = shell(
        "--data", data, "--artefact", tiny_artefact.folder, "--max-slices", 2,
        "--output", tmp_path / "out", "--paper",
    )  # fmt: skip
    names = ("objects.csv", "cases.csv", "tasks.csv", "evaluation.json", "evaluation.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    for name in names:
        assert f"wrote {tmp_path / 'out' / name}" in out
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    cases = [read_case(file) for file in find_cases(data)]
    expected = evaluate(predictor, cases, build_protocol("objects"), max_slices=2)
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert body["summary"]["objects"]["score"]["dsc"] == expected.object_mean
    assert body["summary"]["tasks"]["score"]["nsd"] == expected.summary.tasks.score.nsd
    assert body["model"]["backend"] == "onnxruntime-cpu"
    assert body["model"]["trained"] is False
    assert f"{100 * expected.object_mean:.2f}" in out
    for words in ("NOTE: test graphs", "limit of 2", "Left Ventricle MR", "2 files"):
        assert words in out


def test_pytorch_on_one_subset_without_files(shell: Command, data: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(
        json.dumps({"train": [f"nuclei/{NUCLEI}"], "validation": [f"MR_cardiac_LV/{HEART}"]})
    )
    out = shell(
        "--data", data, "--split", split, "--subset", "validation", "--max-slices", 1,
        "--backend", "pytorch", "--variant", "db_sam_tiny", "--image-size", 64,
        "--protocol", "medsam", "--box-growth-px", 0, 20, "--nsd-mm", "--seed", 5,
    )  # fmt: skip
    assert "1 files, protocol medsam" in out
    assert "pytorch-cpu" in out
    assert "nuclei" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "split.json"]


def test_the_report_names_the_runtime(
    shell: Command, data: Path, tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engines(OnnxRuntimeSession):
        def __init__(self, artefact: Artefact) -> None:
            super().__init__(artefact)
            self.backend = "tensorrt-rtx"

    monkeypatch.setattr(engine_session, "TensorrtRtxSession", Engines)
    words = ("--backend", "tensorrt-rtx", "--artefact", tiny_artefact.folder)
    out = shell("--data", data, "--max-slices", 1, *words)
    assert "model: tiny_test fp32, tensorrt-rtx, sam at" in out


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["objects", "medsam"])
def test_a_running_server_gives_the_same_figures(
    shell: Command,
    data: Path,
    tiny_artefact: Artefact,
    triton: TritonServer,
    tmp_path: Path,
    protocol: str,
) -> None:
    common = ("--data", data, "--max-slices", 2, "--protocol", protocol)
    shell(*common, "--artefact", tiny_artefact.folder, "--output", tmp_path / "local")
    out = shell(
        *common, "--backend", "triton", "--url", triton.grpc_url, "--output", tmp_path / "served"
    )
    assert triton.grpc_url in out
    local, served = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["objects"]
        for name in ("local", "served")
    )
    # medsam asks the prompt decoder, whose test graph is another model
    assert len(local) == len(served)
    if protocol == "objects":
        assert local == served
    else:
        assert [item["box"] for item in local] == [item["box"] for item in served]
        assert any(item["score"]["dsc"] > 0 for item in served)


@pytest.mark.triton
def test_a_server_of_its_own(
    shell: Command,
    data: Path,
    tiny_repository: Repository,
    server_environment: ServerEnvironment,
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_repository.folder, tmp_path / "build" / "model_repository")
    out = shell(
        "--data", data, "--max-slices", 1, "--backend", "triton",
        "--repository", tmp_path / "build" / "model_repository",
        "--server-env", server_environment.folder,
    )  # fmt: skip
    assert "tiny_test fp32, triton-grpc, sam at 128 pixels" in out
    assert "NOTE: test graphs" in out
    assert (tmp_path / "build" / "triton-server.log").is_file()


def bad_files(data: Path) -> None:
    image = np.arange(6000).astype(np.uint8).reshape(40, 50, 3)
    labels = np.ones((40, 50), np.uint8)
    dead_pixel = np.where(np.arange(2000).reshape(40, 50) == 30, np.nan, 1.0)
    files: dict[str, dict[str, Any]] = {
        "empty": {"imgs": image, "gts": 0 * labels},
        "nogts": {"imgs": image},
        "pickled": {"imgs": image, "gts": np.array([{}])},
        "nan": {"imgs": dead_pixel, "gts": labels},
        "size": {"imgs": image, "gts": labels[:, :40]},
    }
    for name, arrays in files.items():
        (data.parent / name / "task").mkdir(parents=True)
        np.savez(data.parent / name / "task" / f"{name}.npz", **arrays)
    (data.parent / "split.json").write_text('{"train": ["nuclei/gone.npz"]}')
    (data.parent / "nothing").mkdir()


MISTAKES = [
    ("--data {root}/missing", "no such folder"),
    ("--data {root}/nothing", "no .npz files"),
    ("--data {root}/empty {model}", "task/empty.npz: gts is 0 everywhere"),
    ("--data {root}/nogts {model}", "task/nogts.npz: no array `gts`"),
    ("--data {root}/pickled {model}", "task/pickled.npz: gts holds pickled"),
    ("--data {root}/nan {model}", "task/nan.npz holds NaN"),
    ("--data {root}/size {model}", "task/size.npz: gts uint8(40, 40)"),
    ("--data {data} --backend tensorrt {model}", "no TensorRT engine of"),
    ("--data {data} --backend tensorrt --device cpu", "runs on cuda"),
    ("--data {data} --artefact {root}/nothing", "python -m dbsam_deploy.export"),
    ("--data {data} --protocol other", "invalid choice: 'other'"),
    ("--data {data} --box-growth-px 9 5", "box growth 9 to 5 px"),
    ("--data {data} --max-slices 0", "--max-slices 0"),
    ("--data {data} --seed -1", "seed -1"),
    ("--data {data} --nsd-mm", "medsam"),
    ("--data {data} --subset train", "go together"),
    ("--data {data} --split {root}/split.json --subset x", "no subset 'x'"),
    ("--data {data} --split {root}/split.json --subset train", "gone.npz"),
    ("--data {data} --url localhost:1", "--backend triton"),
    (
        "--data {data} --backend triton --url localhost:1 --repository x",
        "drop --repository",
    ),
    ("--data {data} --backend triton --variant db_sam", "--variant"),
    ("--data {data} --output {root}/split.json", "cannot be written"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_line(
    shell: Command, data: Path, tiny_artefact: Artefact, words: str, message: str
) -> None:
    bad_files(data)
    places = {
        "root": data.parent,
        "data": data,
        "model": f"--artefact {tiny_artefact.folder}",
    }
    status, _, err = shell.run(*words.format(**places).split())
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_server_that_is_not_there(shell: Command, data: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    status, _, err = shell.run("--data", data, "--backend", "triton", "--url", "localhost:1")
    assert status == 1
    assert "no Triton server answers on localhost:1" in err
    assert err.count("\n") == 1


def test_the_library_needs_neither_plots_nor_pages() -> None:
    heavy = {"matplotlib", "jinja2", "monai", "scipy", "torch"}
    assert loaded(heavy, "import dbsam_deploy.evaluation") == set()
