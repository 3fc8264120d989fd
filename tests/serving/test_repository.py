"""The Triton repository: rendered configurations, self-contained models, safe replacement."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.manifests import reseal

from dbsam_deploy.artefact import graph_file
from dbsam_deploy.core.contract import (
    ensemble_spec,
    prompts_ensemble_spec,
)
from dbsam_deploy.core.errors import InputError, ServingError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.files.locks import one_writer
from dbsam_deploy.resources import resource_dir
from dbsam_deploy.serving import repository as module
from dbsam_deploy.serving.repository import (
    REPOSITORY_NAME,
    build_repository,
    committed_configs,
    find_repositories,
    load_repository,
    main,
    refresh_configs,
    repository_beside,
)
from dbsam_deploy.serving.triton_config import render_configs

MODELS = {
    "dbsam",
    "dbsam_interactive",
    "dbsam_encoder",
    "dbsam_decoder",
    "dbsam_prompts",
    "dbsam_prompt_decoder",
}


def tensors(config: str, kind: str) -> dict[str, tuple[str, list[int]]]:
    """Name → (type, dims) of a configuration's `input` or `output` block."""
    block = re.search(rf"^{kind} \[\n(.*?)^\]", config, re.DOTALL | re.MULTILINE)
    rows = re.findall(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([-\d, ]+) \]', block.group(1))
    return {name: (dtype, [int(d) for d in dims.split(",")]) for name, dtype, dims in rows}


def test_committed_configurations_are_what_the_contract_renders():
    root = resource_dir("triton_models")
    committed = {path.parent.name: path.read_text() for path in root.glob("*/config.pbtxt")}
    assert committed == committed_configs()


def test_check_notices_a_stale_configuration(tmp_path):
    assert len(refresh_configs(tmp_path)) == len(MODELS)
    assert refresh_configs(tmp_path, check=True) == []
    stale = tmp_path / "dbsam_encoder" / "config.pbtxt"
    stale.write_text(stale.read_text().replace("1024", "512"))
    assert refresh_configs(tmp_path, check=True) == [stale]
    assert "512" in stale.read_text()
    assert refresh_configs(tmp_path) == [stale]
    assert "512" not in stale.read_text()


def test_the_check_command_passes_on_the_committed_files(capsys):
    assert (main(["--check"]), capsys.readouterr().out) == (0, "")


@pytest.mark.parametrize(("size", "stride"), [(64, 16), (256, 16), (1024, 16), (256, 4)])
def test_graph_models_drop_the_batch_axis_and_the_rest_keep_every_axis(size, stride):
    platforms = dict.fromkeys(("encoder", "decoder", "prompt_decoder"), "onnxruntime")
    configs = render_configs(Preprocessing(size, embedding_stride=stride), platforms)
    grid = size // stride
    assert tensors(configs["dbsam_encoder"], "input") == {"image": ("FP32", [3, size, size])}
    assert tensors(configs["dbsam_decoder"], "input") == {
        "image_embeddings": ("FP32", [256, grid, grid]),
        "boxes": ("FP32", [-1, 4]),
    }
    assert tensors(configs["dbsam_decoder"], "output")["low_res_masks"] == (
        "FP32",
        [-1, 1, 4 * grid, 4 * grid],
    )
    assert tensors(configs["dbsam"], "input") == {
        "raw_image": ("UINT8", [-1, -1, 3]),
        "boxes": ("FP32", [-1, 4]),
    }
    assert tensors(configs["dbsam"], "output")["masks"] == ("UINT8", [-1, -1, -1])
    assert tensors(configs["dbsam_prompts"], "output")["masks"] == ("UINT8", [-1, 4, -1, -1])
    for name in ("dbsam_encoder", "dbsam_decoder", "dbsam_prompt_decoder"):
        assert "max_batch_size: 1" in configs[name]
        assert "dynamic_batching { }" in configs[name]
    for name in MODELS - {"dbsam_encoder", "dbsam_decoder", "dbsam_prompt_decoder"}:
        assert "max_batch_size: 0" in configs[name]


def test_configurations_avoid_what_the_server_handles_badly():
    for text in committed_configs().values():
        for trap in ("queue_policy", "preferred_batch_size", "KIND_GPU"):
            assert trap not in text


def matching(one: tuple[str, list[int]], other: tuple[str, list[int]]) -> bool:
    """Whether Triton takes one tensor for the other: -1 goes with any size."""
    sizes = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(a == b or -1 in (a, b) for a, b in sizes)


@pytest.mark.parametrize(
    ("name", "ensemble"),
    [("dbsam", ensemble_spec(256)), ("dbsam_prompts", prompts_ensemble_spec(256))],
)
def test_every_ensemble_tensor_is_one_of_the_front_of_its_type_and_shape(name, ensemble):
    configs = committed_configs()
    for kind, names in (("input", ensemble.input_names), ("output", ensemble.output_names)):
        maps = re.findall(rf'{kind}_map \{{ key: "(\w+)" value: "(\w+)" \}}', configs[name])
        assert [mine for _, mine in maps] == names
        front, own = tensors(configs["dbsam_interactive"], kind), tensors(configs[name], kind)
        for theirs, mine in maps:
            assert matching(front[theirs], own[mine])


def test_a_repository_holds_models_code_and_true_hashes(tiny_repository, tiny_artefact):
    root = tiny_repository.folder
    assert {path.name for path in root.iterdir() if path.is_dir()} == MODELS
    assert all((root / name / "1").is_dir() for name in MODELS)
    assert sha256_of(root / "dbsam_encoder/1/model.onnx") == tiny_artefact.graphs["encoder"].sha256
    found = {
        path.relative_to(root).as_posix(): sha256_of(path)
        for path in root.rglob("*")
        if path.is_file() and path.name != REPOSITORY_NAME and path.suffix != ".pyc"
    }
    assert found == tiny_repository.files
    body = json.loads((root / REPOSITORY_NAME).read_text())
    assert body["files"] == found
    assert body["preprocessing"] == {"image_size": 128, "embedding_stride": 16, "mode": "sam"}
    assert (
        'key: "image_size" value { string_value: "128" }'
        in (root / "dbsam_interactive/config.pbtxt").read_text()
    )
    assert load_repository(root) == tiny_repository


def test_the_copied_runtime_needs_nothing_of_this_package(tiny_repository):
    """In a fresh interpreter that can import neither dbsam_deploy nor torch."""
    version = tiny_repository.folder / "dbsam_interactive" / "1"
    code = (
        f"import sys; sys.path.insert(0, {str(version)!r})\n"
        "sys.modules.update({'dbsam_deploy': None, 'torch': None, 'onnx': None})\n"
        "import dbsam_runtime.front\n"
        "print(sorted(name for name in sys.modules if name.startswith('dbsam')))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "dbsam_runtime.front" in result.stdout


def test_replacing_leaves_nothing_of_the_earlier_repository(make_artefact, tmp_path):
    output = tmp_path / "build" / "model_repository"
    build_repository(make_artefact(tmp_path / "a", 128), output)
    (output / "dbsam" / "stray.txt").write_text("from before")
    (output / "old_model").mkdir()
    second = build_repository(make_artefact(tmp_path / "b", 64, "medsam", seed=1), output)
    assert load_repository(output) == second
    assert not (output / "old_model").exists()
    assert not (output / "dbsam" / "stray.txt").exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["model_repository"]
    assert output.stat().st_mode & 0o777 == 0o755


def test_a_failure_keeps_the_earlier_repository(make_artefact, tmp_path, monkeypatch):
    output = tmp_path / "build" / "model_repository"
    first = build_repository(make_artefact(tmp_path / "a", 128), output)
    damaged = make_artefact(tmp_path / "b", 64)
    damaged.path("decoder").write_bytes(b"changed after the export")
    with pytest.raises(ServingError, match="not what the export published"):
        build_repository(damaged, output)
    assert load_repository(output) == first

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "file_hashes", fail)
    with pytest.raises(OSError, match="disk full"):
        build_repository(make_artefact(tmp_path / "c", 64), output)
    assert load_repository(output) == first
    assert sorted(path.name for path in output.parent.iterdir()) == ["model_repository"]


def test_foreign_files_are_never_deleted(tiny_artefact, tmp_path):
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    with pytest.raises(InputError, match="left alone"):
        build_repository(tiny_artefact, thesis.parent)
    with pytest.raises(InputError, match="not a folder"):
        build_repository(tiny_artefact, thesis)
    link = tmp_path / "link"
    link.symlink_to(thesis.parent)
    with pytest.raises(InputError, match="not a folder"):
        build_repository(tiny_artefact, link)
    assert thesis.read_text() == "precious"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert build_repository(tiny_artefact, empty).folder == empty


def test_an_export_without_prompt_decoder_serves_boxes_only(make_artefact, tmp_path):
    artefact = make_artefact(tmp_path / "a", 64)
    graphs = {k: v for k, v in artefact.graphs.items() if k != "prompt_decoder"}
    repository = build_repository(dataclasses.replace(artefact, graphs=graphs), tmp_path / "r")
    assert "prompt_decoder" not in repository.platforms
    assert {p.name for p in (tmp_path / "r").iterdir() if p.is_dir()} == {
        name for name in MODELS if "prompt" not in name
    }
    del graphs["decoder"]
    with pytest.raises(InputError, match="serving needs decoder"):
        build_repository(dataclasses.replace(artefact, graphs=graphs), tmp_path / "r2")


def as_plans(artefact):
    """The same export with `.plan` files in place of the graphs, which stay beside them."""
    graphs = {}
    for name in artefact.graphs:
        plan = artefact.folder / f"{name}.plan"
        plan.write_bytes(f"not a real engine: {name}".encode())
        graphs[name] = graph_file(plan, artefact.folder)
    return dataclasses.replace(artefact, graphs=graphs)


def test_plans_are_served_by_the_tensorrt_platform(make_artefact, tmp_path):
    repository = build_repository(as_plans(make_artefact(tmp_path / "a", 64)), tmp_path / "r")
    assert set(repository.platforms.values()) == {"tensorrt"}
    encoder = (tmp_path / "r/dbsam_encoder/config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in encoder
    assert "graphs: true" in encoder
    front = (tmp_path / "r/dbsam_interactive/config.pbtxt").read_text()
    assert '"image_workers" value { string_value: "4" }' in front, "as many as the encoder's batch"
    assert "onnxruntime" not in encoder
    names = {path.name for path in (tmp_path / "r/dbsam_encoder/1").iterdir()}
    assert names == {"model.plan", "model.onnx"}


def test_another_kind_of_graph_file_is_refused(make_artefact, tmp_path):
    artefact = make_artefact(tmp_path / "a", 64)
    artefact.path("encoder").rename(artefact.folder / "encoder.pt")
    item = dataclasses.replace(artefact.graphs["encoder"], file="encoder.pt")
    broken = dataclasses.replace(artefact, graphs={**artefact.graphs, "encoder": item})
    with pytest.raises(InputError, match=r"expected an \.onnx or a \.plan"):
        build_repository(broken, tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / REPOSITORY_NAME).unlink(), "no repository.json"),
        (lambda r: (r / REPOSITORY_NAME).write_text("[]"), "not a repository"),
        (lambda r: (r / REPOSITORY_NAME).write_text('{"format": 99}'), "another manifest format"),
        (lambda r: (r / "dbsam_decoder/1/model.onnx").unlink(), "not there"),
        (lambda r: (r / "dbsam_decoder/1/model.onnx").write_bytes(b"x"), "was changed"),
        (lambda r: (r / "dbsam_interactive/1/model.py").write_text("import os"), "was changed"),
    ],
)
def test_loading_refuses_what_is_damaged(tiny_artefact, tmp_path, change, message):
    root = tmp_path / "r"
    build_repository(tiny_artefact, root)
    change(root)
    with pytest.raises(InputError, match=message):
        load_repository(root)


def test_loading_refuses_paths_outside_the_repository(tiny_artefact, tmp_path):
    root = tmp_path / "r"
    build_repository(tiny_artefact, root)
    body = json.loads((root / REPOSITORY_NAME).read_text())
    outside = tmp_path / "outside"
    outside.write_text("x")
    body["files"]["../outside"] = sha256_of(outside)
    reseal(root / REPOSITORY_NAME, files=body["files"])
    with pytest.raises(InputError, match=r"a path inside the folder.*export again"):
        load_repository(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plugins": "lib.so"}, "a plugin library that is none of its files"),
        ({"weights": []}, "weights or platforms of another kind"),
        ({"platforms": {"other": "onnxruntime"}}, "weights or platforms of another kind"),
        ({"files": {"dbsam/config.pbtxt": "0" * 63}}, "a path inside the folder and a SHA-256"),
        ({"preprocessing": {"image_size": 100}}, "image size 100"),
    ],
)
def test_a_sealed_manifest_of_nonsense_is_refused(tiny_repository, tmp_path, change, message):
    shutil.copytree(tiny_repository.folder, tmp_path / "r")
    reseal(tmp_path / "r" / REPOSITORY_NAME, **change)
    with pytest.raises(InputError, match=message):
        load_repository(tmp_path / "r")


def edit_mode(root):
    path = root / REPOSITORY_NAME
    path.write_text(path.read_text().replace('"sam"', '"medsam"'))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda r: shutil.copytree(r / "dbsam_encoder/1", r / "dbsam_encoder/2"), "encoder/2'"),
        (lambda r: (r / "dbsam/2").mkdir(), "'dbsam/2'"),
        (lambda r: shutil.copytree(r / "dbsam_encoder", r / "another"), "'another'"),
        (lambda r: (r / "dbsam_encoder/1/weights.bin").touch(), "weights.bin"),
        (lambda r: (r / "dbsam/1/model.onnx").touch(), "'dbsam/1/model.onnx'"),
        (
            lambda r: (r / "dbsam_interactive/1/__pycache__").symlink_to(r),
            "dbsam_interactive/1/__pycache__",
        ),
        (lambda r: (r / "dbsam_encoder/2").symlink_to("1"), "encoder/2'"),
        (edit_mode, "was edited after it was written"),
    ],
)
def test_loading_refuses_what_is_not_listed(tiny_artefact, tmp_path, add, message):
    root = tmp_path / "r"
    build_repository(tiny_artefact, root)
    load_repository(root)
    add(root)
    with pytest.raises(InputError, match=rf"{message}.*export again"):
        load_repository(root)


def test_operators_may_tune_a_configuration(tiny_artefact, tmp_path):
    root = tmp_path / "r"
    build_repository(tiny_artefact, root)
    config = root / "dbsam_encoder" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    assert load_repository(root).variant == "tiny_test"


def test_the_command_builds_from_an_artefact(tiny_artefact, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["--artefact", str(tiny_artefact.folder), "--output", str(output)]) == 0
    assert "fp32" in capsys.readouterr().out
    assert "prompt_decoder" in load_repository(output).platforms
    assert Path(output / "dbsam" / "1").is_dir()


def test_the_command_takes_the_newest_export_and_fills_the_folder_beside_it(
    make_artefact, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for age, name in ((9, "fp16"), (5, "fp32")):
        folder = make_artefact(tmp_path / "build" / name, 64).folder
        os.utime(folder / "manifest.json", (10**9 - age, 10**9 - age))
    assert main([]) == 0
    printed = capsys.readouterr()
    beside = Path("build/model_repository_fp32")
    files = len(load_repository(beside).files)
    assert printed.out == f"{beside}: {files} files, fp32\n"
    assert printed.err.strip().endswith(
        "is the newest export; --artefact takes another: build/fp16"
    )
    with one_writer(beside.parent, name=f".{beside.name}.lock"):
        with pytest.raises(InputError, match="is being written by process"):
            main(["--no-wait"])
        assert main(["--no-wait", "--output", "elsewhere"]) == 0
    capsys.readouterr()
    waits, real = [], module.build_repository
    monkeypatch.setattr(module, "build_repository", lambda *a, wait: waits.append(wait) or real(*a))
    assert main(["--artefact", "build/fp16"]) == 0
    assert waits == [True]
    assert "newest" not in capsys.readouterr().err
    os.utime(beside / REPOSITORY_NAME, (10**9, 10**9))
    older, newer = beside, Path("build/model_repository_fp16")
    assert find_repositories() == find_repositories(Path("build")) == (newer, older)
    assert repository_beside(Path("fp16")) == Path("model_repository_fp16")
    monkeypatch.chdir(tmp_path / "build" / "fp16")
    assert repository_beside(Path()) == tmp_path / newer


def test_the_command_checks_and_refreshes_configurations(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "resource_dir", lambda _: tmp_path)
    paths = [tmp_path / name / "config.pbtxt" for name in committed_configs()]
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [f"stale: {path}" for path in paths]
    assert list(tmp_path.iterdir()) == []
    assert main(["--refresh"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"written: {path}" for path in paths]
    assert main(["--refresh"]) == main(["--check"]) == 0
    assert capsys.readouterr().out == ""
