"""The manifest: written whole, read back equal, and refused when anything under it changed."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from dbsam_deploy.artefact import (
    MANIFEST_NAME,
    Artefact,
    export_note,
    find_export,
    find_exports,
    graph_file,
    load_artefact,
    write_artefact,
)
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.atomic import sha256_of


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
    path = artefact.folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_round_trip(artefact: Artefact) -> None:
    assert load_artefact(artefact.folder) == artefact
    assert load_artefact(artefact.folder).path("encoder").read_bytes() == b"encoder" * 50


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
    (artefact.folder / "link.onnx").symlink_to(outside)
    item = {"file": name, "sha256": sha256_of(outside), "size_bytes": 9}
    edit(artefact, graphs={"encoder": item})
    with pytest.raises(InputError, match="which is not there"):
        load_artefact(artefact.folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 99}, "another manifest format"),
        ({"surprise": 1}, "not a manifest"),
        ({"graphs": []}, "not a manifest"),
        ({"graphs": {"encoder": {"file": "x"}}}, "not a manifest"),
        ({"preprocessing": {"image_size": "big"}}, "not a manifest"),
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
