"""The manifest: written whole, read back equal, and refused when anything under it changed."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.manifests import reseal

from dbsam_deploy.artefact import (
    MANIFEST_NAME,
    Artefact,
    export_note,
    find_export,
    find_exports,
    graph_file,
    load_artefact,
    take_graphs,
    write_artefact,
)
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.files.onnx_data import OnnxContent


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    folder = tmp_path / "fp32"
    (folder / "onnx").mkdir(parents=True)
    graphs = {}
    for name in ("encoder", "decoder"):
        path = folder / "onnx" / f"{name}.onnx"
        path.write_bytes(name.encode() * 50)
        graphs[name] = graph_file(path, folder)
    made = Artefact(
        folder=folder,
        variant="db_sam_tiny",
        precision="fp32",
        preprocessing=Preprocessing(256, "medsam"),
        graphs=graphs,
        weights={"source": "somewhere", "sha256": None, "trained": False, "note": "a note"},
        figures={"dice_drop": 0.0001},
        versions={"torch": "2"},
    )
    write_artefact(made)
    return made


def edit(artefact: Artefact, **values: object) -> None:
    reseal(artefact.folder / MANIFEST_NAME, **values)


def entry(**values: object) -> dict[str, object]:
    return {"file": "a", "sha256": "0" * 64, "size_bytes": 1, **values}


def test_round_trip(artefact: Artefact) -> None:
    assert load_artefact(artefact.folder) == artefact
    assert load_artefact(artefact.folder).path("encoder").read_bytes() == b"encoder" * 50


def test_a_graph_that_it_does_not_have_is_named(artefact: Artefact) -> None:
    message = f"{artefact.folder} has the graphs encoder, decoder, not other; export again"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        artefact.path("other")
    edit(artefact, graphs={"other": entry()})
    known = r"graphs \['other'\], expected some of encoder, decoder, prompt_decoder"
    with pytest.raises(InputError, match=known):
        load_artefact(artefact.folder)


def test_graph_file_describes_the_content(artefact: Artefact) -> None:
    item = artefact.graphs["decoder"]
    assert item.file == "onnx/decoder.onnx"
    assert item.size_bytes == 350
    assert item.sha256 == sha256_of(artefact.path("decoder"))
    assert len(item.sha256) == 64
    assert item.sha256 != artefact.graphs["encoder"].sha256


def test_an_artefact_can_be_moved(artefact: Artefact, tmp_path: Path) -> None:
    artefact.folder.rename(tmp_path / "elsewhere")
    moved = load_artefact(tmp_path / "elsewhere")
    assert moved == dataclasses.replace(artefact, folder=tmp_path / "elsewhere")


def test_writing_leaves_no_partial_file(artefact: Artefact) -> None:
    write_artefact(artefact)
    assert sorted(path.name for path in artefact.folder.iterdir()) == [MANIFEST_NAME, "onnx"]


def test_no_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python -m dbsam_deploy\.export"):
        load_artefact(tmp_path)


def test_a_changed_graph_is_refused(artefact: Artefact) -> None:
    artefact.path("decoder").write_bytes(b"decoder" * 49 + b"decodes")
    with pytest.raises(InputError, match="its hash differs"):
        load_artefact(artefact.folder)


def test_a_missing_graph_is_refused(artefact: Artefact) -> None:
    artefact.path("decoder").unlink()
    with pytest.raises(InputError, match="which is not there"):
        load_artefact(artefact.folder)


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_a_graph_outside_the_folder_is_refused(
    artefact: Artefact, tmp_path: Path, way: str
) -> None:
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(b"elsewhere")
    name = {"parent": "../outside.onnx", "absolute": str(outside), "link": "link.onnx"}[way]
    if way == "link":
        (artefact.folder / "link.onnx").symlink_to(outside)
    item = {"file": name, "sha256": sha256_of(outside), "size_bytes": 9}
    edit(artefact, graphs={"encoder": item})
    message = "which is not there" if way == "link" else "a path inside its folder"
    with pytest.raises(InputError, match=message):
        load_artefact(artefact.folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 99}, "another manifest format"),
        ({"surprise": 1}, "not a manifest"),
        ({"folder": "/"}, "not a manifest"),
        ({"graphs": {"encoder": entry(file=5)}}, "a path inside"),
        ({"graphs": {"encoder": entry(file="a\0")}}, "a path inside"),
        ({"graphs": {"encoder": entry(sha256=5)}}, "SHA-256 in hex"),
        ({"graphs": {"encoder": entry(size_bytes=True)}}, "size in bytes"),
        ({"graphs": {"encoder": entry(size_bytes=-1)}}, "size in bytes"),
        ({"graphs": {"another": entry()}}, "some of encoder"),
        ({"graphs": {}}, "some of encoder"),
        ({"weights": None}, "weights: a NoneType, expected dict"),
        ({"weights": {"points": {"first": "search"}}}, "points, past_box: None, expected native"),
        ({"weights": {"points": []}}, "expected the rules of first, past_box"),
        ({"variant": 5}, "variant: a int, expected str"),
        ({"preprocessing": {"image_size": 10**40, "mode": "sam"}}, "from 64 to 2048"),
        ({"graphs": []}, "not a manifest"),
        ({"graphs": {"encoder": {"file": "x"}}}, "not a manifest"),
        ({"preprocessing": {"image_size": "big"}}, "image size .big.: expected a multiple of 16"),
        ({"preprocessing": {"image_size": 250, "mode": "sam"}}, "multiple of 16"),
        ({"preprocessing": {"image_size": 256, "mode": "other"}}, "expected one of"),
    ],
)
def test_another_manifest_is_refused(
    artefact: Artefact, values: dict[str, object], message: str
) -> None:
    edit(artefact, **values)
    with pytest.raises(InputError, match=message):
        load_artefact(artefact.folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"no json", b"\xff\xfe\x00", b"null"])
def test_a_file_that_is_no_manifest_is_refused(artefact: Artefact, content: bytes) -> None:
    (artefact.folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(InputError, match="not a manifest"):
        load_artefact(artefact.folder)


@pytest.mark.parametrize("values", [{"preprocessing": {"mode": "sam"}}, {"variant": "db_sam"}])
def test_an_edited_manifest_is_refused(artefact: Artefact, values: dict[str, object]) -> None:
    path = artefact.folder / MANIFEST_NAME
    body = json.loads(path.read_text())
    for name, value in values.items():
        body[name] = {**body[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"was edited after it was written.*export again"):
        load_artefact(artefact.folder)


def test_a_manifest_without_a_seal_is_refused(artefact: Artefact) -> None:
    path = artefact.folder / MANIFEST_NAME
    body = json.loads(path.read_text())
    del body["seal"]
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"not a manifest.*seal.*export again"):
        load_artefact(artefact.folder)


@pytest.mark.parametrize(
    "name", ["README.md", "onnx/more.onnx", "openvino/1.blob", ".hidden", "empty/", "link", "a\nb"]
)
def test_what_the_manifest_does_not_list_is_refused(artefact: Artefact, name: str) -> None:
    path = artefact.folder / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    elif name == "link":
        path.symlink_to(artefact.path("encoder"))
    else:
        path.touch()
    with pytest.raises(InputError, match=r"does not list .*delete it, or export again") as caught:
        load_artefact(artefact.folder)
    assert "\n" not in caught.value.message


def test_engines_have_manifests_of_their_own(artefact: Artefact) -> None:
    plan = artefact.folder / "engines" / "tensorrt" / "encoder.plan"
    plan.parent.mkdir(parents=True)
    plan.touch()
    assert load_artefact(artefact.folder) == artefact


def test_another_size_is_noticed_before_anything_is_hashed(artefact: Artefact) -> None:
    with artefact.path("encoder").open("ab") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match=f"{2**40} bytes, not 350"):
        load_artefact(artefact.folder)


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    values = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "weights")
    graph = onnx.helper.make_graph([], "g", [], [], [values])
    path = tmp_path / "encoder.onnx"
    onnx.save(
        onnx.helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    (tmp_path / "weights.bin").unlink()
    graphs = {"encoder": graph_file(path, tmp_path)}
    write_artefact(Artefact(tmp_path, "db_sam", "fp32", Preprocessing(256), graphs))
    with pytest.raises(InputError, match="weights in another file"):
        load_artefact(tmp_path)


def test_graphs_are_taken_as_they_were_checked(artefact: Artefact) -> None:
    taken = take_graphs(artefact)
    assert next(taken) == ("encoder", OnnxContent(b"encoder" * 50))
    artefact.path("decoder").write_bytes(b"decoded" * 50)
    with pytest.raises(InputError, match="was changed after"):
        next(taken)


def put_exports(root: Path, *names: str) -> None:
    """Manifests below `root/build`, the last name the newest."""
    for second, name in enumerate(names):
        path = root / "build" / name / MANIFEST_NAME
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (second, second))


def test_the_newest_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put_exports(tmp_path, "fp32", "int8", "lite/fp16", ".work/fp16-abc", "a/b/c")
    (tmp_path / "build" / "model_repository_fp32").mkdir()
    expected = tuple(Path("build") / name for name in ("lite/fp16", "int8", "fp32"))
    assert find_exports() == expected
    assert find_export() == expected[0]
    assert export_note(expected[0]) == (
        "build/lite/fp16 is the newest export; --artefact takes another: build/int8, build/fp32"
    )
    (tmp_path / "build" / "fp32" / MANIFEST_NAME).touch()
    assert find_export() == Path("build/fp32")


def test_a_named_export_and_a_single_one_need_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_export(Path("missing")) == Path("missing")
    with pytest.raises(InputError, match=r"run `python -m dbsam_deploy\.export --precision fp16`"):
        find_export()
    put_exports(tmp_path, "fp16")
    assert find_export() == Path("build/fp16")
    assert export_note(Path("build/fp16")) == ""


def test_a_folder_of_exports_names_them(artefact: Artefact) -> None:
    with pytest.raises(InputError, match=re.escape(str(artefact.folder))):
        load_artefact(artefact.folder.parent)
    assert load_artefact(str(artefact.folder)) == artefact
