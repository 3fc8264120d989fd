"""What a module is made of, read from its imports; an export hashes that and nothing else."""

import shutil
from pathlib import Path

import pytest

from dbsam_deploy.files.inputs import code_digest
from dbsam_deploy.files.sources import PACKAGE, closure, imported
from dbsam_deploy.verification import provenance


def names(paths: list[Path], package: Path = PACKAGE) -> set[str]:
    return {path.relative_to(package).as_posix() for path in paths}


def test_every_form_of_import_is_read(tmp_path: Path) -> None:
    package = tmp_path / "dbsam_deploy"
    source = (
        "import dbsam_deploy.a\nfrom dbsam_deploy import b\nfrom dbsam_deploy.c import x\n"
        "from .. import d\nfrom ..e import y\nfrom . import z\nimport numpy\n"
        "def f():\n    from ..g.h import w\nif TYPE_CHECKING:\n    from ..i import v\n"
    )
    path = package / "model" / "part.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    running = ["a", "b", "c.x", "d", "e.y", "model.z", "g.h.w"]
    assert list(imported(path, package)) == [*running, "i.v"]
    assert list(imported(path, package, typing=False)) == running


def test_imports_are_followed_through_every_form(tmp_path: Path) -> None:
    package = tmp_path / "dbsam_deploy"
    files = {
        "__init__.py": "",
        "start.py": "from .room import thing\ndef f():\n    import dbsam_deploy.late\n",
        "room/__init__.py": "from .inner import thing\nfrom ..other.deep import name\n",
        "room/inner.py": "import numpy\nthing = 1\n",
        "other/__init__.py": "",
        "other/deep.py": "from dbsam_deploy import start\nname = 2\n",
        "late.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import unrelated\n"
        ),
        "unrelated.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    expected = {"start.py", "room/__init__.py", "room/inner.py", "other/deep.py", "late.py"}
    assert names(closure(["start"], package), package) == expected


def test_a_closure_that_leads_nowhere_is_a_mistake() -> None:
    with pytest.raises(LookupError, match="no module no_such_room"):
        closure(["no_such_room.module"])


def test_graphs_are_made_of_the_rooms_before_them_and_of_no_door() -> None:
    graphs, gate = (names(closure(x)) for x in (provenance.GRAPH_MODULES, provenance.GATE_MODULES))
    assert {"core/contract.py", "graphs/onnx_export.py", "model/db_sam.py", "recipe.py"} <= graphs
    assert {"fusions/nodes.py", "quantization/rounding.py", "files/onnx_files.py"} <= graphs
    assert {"verification/parity.py", "core/imaging.py", "prediction/predictor.py"} <= gate
    rooms = {name.split("/")[0] for name in graphs | gate if "/" in name}
    assert not rooms & {"clients", "serving", "engines", "evaluation", "training", "diagnosis"}
    doors = {"predict.py", "export.py", "client.py", "serve.py", "engine.py", "doctor.py"}
    assert not doors & (graphs | gate)


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        ("predict.py", False),
        ("clients/client.py", False),
        ("serving/repository.py", False),
        ("graphs/precision.py", True),
        ("core/contract.py", True),
        ("quantization/rounding.py", True),
        ("fusions/nodes.py", True),
    ],
)
def test_the_key_changes_with_what_shapes_the_graphs(
    tmp_path: Path, edited: str, changes: bool
) -> None:
    copy = tmp_path / "dbsam_deploy"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_share"))
    before = code_digest.__wrapped__(provenance.GRAPH_MODULES, copy)
    (copy / edited).write_text((copy / edited).read_text() + "# edited\n")
    assert (code_digest.__wrapped__(provenance.GRAPH_MODULES, copy) != before) == changes
