"""What is served agrees with what is predicted, and engines reach it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from support.engines import STAND_IN_GPU, put_engines
from support.manifests import reseal

from dbsam_deploy.artefact import MANIFEST_NAME, Artefact, load_artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import PassedGate, engine_folder, read_records, sign
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.serving.choice import choose_repository, refresh_repository
from dbsam_deploy.serving.repository import (
    REPOSITORY_NAME,
    build_repository,
    load_repository,
)

BESIDE = Path("build/model_repository_fp16")
FILL = "python -m dbsam_deploy.serving.repository --artefact build/fp16 --output " + str(BESIDE)


@pytest.fixture
def artefact(tiny_artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """The export `build/fp16` of the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_artefact.folder, "build/fp16")
    return load_artefact(Path("build/fp16"))


def verified(artefact: Artefact) -> Artefact:
    put_engines(artefact, TENSORRT)
    records = read_records(artefact, TENSORRT)
    plans = {graph: record.plan.sha256 for graph, record in records.items()}
    sign(engine_folder(artefact, TENSORRT), records, PassedGate(STAND_IN_GPU, {}, {}, plans))
    return artefact


def edit_configuration() -> None:
    with (BESIDE / "dbsam_encoder" / "config.pbtxt").open("a") as stream:
        stream.write("# tuned\n")


def test_the_repository_of_the_newest_export_is_filled_once(artefact, make_artefact):
    said: list[str] = []
    first = choose_repository(None, None, said.append)
    assert said == ["", "filled build/model_repository_fp16 from build/fp16"]
    edit_configuration()  # it holds the export still, so the operator's change stays
    assert choose_repository(None, None, said.append) == first
    assert choose_repository(None, Path("build/fp16"), said.append) == first
    assert said == ["", "filled build/model_repository_fp16 from build/fp16", ""]


def test_a_repository_of_another_version_is_filled_anew(artefact):
    current = build_repository(artefact, BESIDE)
    older = BESIDE / "dbsam_interactive" / "1" / "dbsam_runtime" / "contract.py"
    older.write_text(older.read_text() + "# of an earlier version\n")
    body = json.loads((BESIDE / REPOSITORY_NAME).read_text())
    body["files"][older.relative_to(BESIDE).as_posix()] = sha256_of(older)
    reseal(BESIDE / REPOSITORY_NAME, files=body["files"])
    said: list[str] = []
    assert choose_repository(None, None, said.append) == current
    assert said == ["", "filled build/model_repository_fp16 from build/fp16"]
    assert "earlier version" not in older.read_text()


def test_a_newer_export_does_not_change_what_the_earlier_one_is_served_from(
    artefact, make_artefact
):
    earlier = build_repository(artefact, BESIDE)
    make_artefact(Path("build/lite"), 64)
    said: list[str] = []
    found = choose_repository(None, None, said.append)
    assert found.folder == Path("build/model_repository_lite")
    assert found.preprocessing.image_size == 64
    assert said == [
        "build/lite is the newest export; --artefact takes another: build/fp16",
        "filled build/model_repository_lite from build/lite",
    ]
    assert load_repository(BESIDE) == earlier
    os.utime(Path("build/lite") / MANIFEST_NAME, (1, 1))
    assert choose_repository(None, None, said.append) == earlier


def test_a_tuned_repository_of_another_export_is_not_replaced(artefact, make_artefact):
    build_repository(make_artefact(Path("other"), 64), BESIDE)
    edit_configuration()
    with pytest.raises(InputError, match=r"config.pbtxt was edited: to serve it name it with --re"):
        choose_repository(None, None, print)
    assert load_repository(BESIDE).preprocessing.image_size == 64


def test_a_repository_is_served_as_it_is(artefact, make_artefact):
    other = build_repository(make_artefact(Path("other"), 64), Path("elsewhere"))
    assert choose_repository(Path("elsewhere"), None, print) == other
    with pytest.raises(InputError, match="drop one of them"):
        choose_repository(Path("elsewhere"), Path("build/fp16"), print)


def test_a_machine_without_exports_serves_what_was_copied_to_it(artefact):
    shutil.move("build/fp16", "away")
    with pytest.raises(InputError, match="no export below build/: run"):
        choose_repository(None, None, print)
    made = build_repository(load_artefact(Path("away")), BESIDE)
    assert choose_repository(None, None, print) == made
    newer = build_repository(load_artefact(Path("away")), Path("build/model_repository"))
    os.utime(BESIDE / REPOSITORY_NAME, (1, 1))
    said: list[str] = []
    assert choose_repository(None, None, said.append) == newer
    assert said == [
        "build/model_repository is the newest repository; --repository takes another: "
        "build/model_repository_fp16"
    ]


def test_verified_engines_reach_the_repository(artefact):
    build_repository(artefact, BESIDE)
    verified(artefact)
    assert refresh_repository(artefact, TENSORRT) == f"{BESIDE} now serves these engines"
    assert set(load_repository(BESIDE).platforms.values()) == {"tensorrt"}
    again = choose_repository(None, None, lambda text: None)
    assert again == load_repository(BESIDE)


def test_serve_finds_engines_that_came_with_their_folder(artefact):
    build_repository(artefact, BESIDE)
    verified(artefact)
    said: list[str] = []
    found = choose_repository(None, None, said.append)
    assert set(found.platforms.values()) == {"tensorrt"}
    assert said[-1] == "filled build/model_repository_fp16 from build/fp16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: shutil.rmtree(BESIDE), f"no repository in {BESIDE} .*; to fill one: {FILL}"),
        (lambda a: edit_configuration(), rf"its \w+/config.pbtxt was edited; .*: {FILL}"),
        (
            lambda a: (BESIDE / "dbsam_decoder/1/model.onnx").write_bytes(b""),
            f"is unchanged .*model.onnx was changed after .*: {FILL}",
        ),
        (
            lambda a: (BESIDE / REPOSITORY_NAME).write_text("{}"),
            f"is unchanged .*: {FILL}",
        ),
    ],
)
def test_a_repository_that_is_not_refreshed_says_why_and_how(artefact, change, message):
    build_repository(artefact, BESIDE)
    verified(artefact)
    change(artefact)
    line = refresh_repository(artefact, TENSORRT)
    assert "\n" not in line
    assert re.search(message, line), line
    assert not list(BESIDE.rglob("*.plan"))


def test_the_repository_of_another_export_is_left_alone(artefact, make_artefact):
    other = build_repository(make_artefact(Path("other"), 64), BESIDE)
    line = refresh_repository(verified(artefact), TENSORRT)
    assert line.startswith(f"{BESIDE} was filled from another export and is unchanged")
    assert line.endswith(FILL)
    assert load_repository(BESIDE) == other


def test_engines_that_a_server_does_not_run_leave_it_alone(artefact):
    build_repository(artefact, BESIDE)
    put_engines(artefact, TENSORRT)
    line = refresh_repository(artefact, TENSORRT)
    assert line.endswith("dbsam_deploy.engine verify --artefact build/fp16 --engine tensorrt")
    put_engines(artefact, TENSORRT_RTX)
    line = refresh_repository(artefact, TENSORRT_RTX)
    assert "runs TensorRT engines, not TensorRT-RTX's" in line
    assert line.endswith("dbsam_deploy.engine build --artefact build/fp16 --engine tensorrt")
    assert set(load_repository(BESIDE).platforms.values()) == {"onnxruntime"}
