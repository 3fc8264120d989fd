"""The documents: Python blocks run, commands parse, links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sybil import Example, Sybil
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.completion import whole_parser
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.serving.server import TritonServer

ROOT = Path(__file__).resolve().parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
ROOMS = [
    path for name in ("benchmarks", "kernels", "export") for path in ROOT.glob(f"{name}/**/*.md")
]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*TOP, *ROOMS, *SITE]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]*)(#[^)\s]*)?\)")
COORDINATE = re.compile(r"[xyzXYZ][01]")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _python(path: Path) -> Document:
    return Sybil([PythonCodeBlockParser()], encoding="utf-8").parse(path)


CLIENT = ROOT / "docs" / "how-to" / "client.md"  # its blocks need a server
WITH_PYTHON = [path for path in PAGES if "```python" in path.read_text() and path != CLIENT]


@pytest.fixture
def desk(tiny_artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name: an export in build/, two pictures and a CT."""
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "fp16").symlink_to(tiny_artefact.folder)
    for name, size in (("cells.png", (256, 320, 3)), ("skin.png", (400, 450, 3))):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / name)
    scan = nibabel.Nifti1Image(rng.integers(-200, 300, (160, 170, 60)).astype(np.int16), np.eye(4))
    nibabel.save(scan, tmp_path / "ct.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.openvino
@pytest.mark.parametrize("path", WITH_PYTHON, ids=_name)
def test_python_blocks_run(path: Path, desk: Path) -> None:
    for example in _python(path).examples():
        example.evaluate()  # what it raises names file and line


def test_the_client_page_runs(triton: TritonServer, desk: Path) -> None:
    page = desk / CLIENT.name
    page.write_text(CLIENT.read_text().replace("localhost:8001", triton.grpc_url))
    for example in _python(page).examples():
        example.evaluate()


def _commands(text: str) -> Iterator[list[str]]:
    """The `dbsam` commands of a shell block, as words; comments and what follows `&&` left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("…", ""), comments=True)
        if words[:2] == ["python", "-m"] and words[2].startswith("dbsam_deploy."):
            words = ["dbsam", words[2].removeprefix("dbsam_deploy."), *words[3:]]
        if words[:1] == ["dbsam"] and "." not in words[1]:
            stop = [i for i, word in enumerate(words) if word in ("&&", ">", "|")]
            yield [COORDINATE.sub("1", word) for word in words[1 : min(stop, default=None)]]


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_are_such_as_the_program_takes(path: Path) -> None:
    parser = whole_parser()

    def check(example: Example) -> None:
        for words in _commands(example.parsed):
            try:
                parser.parse_args(words)
            except (InputError, SystemExit):
                pytest.fail(f"{example.path}:{example.line}: dbsam {shlex.join(words)}")

    for example in Sybil([CodeBlockParser("sh", check)], encoding="utf-8").parse(path).examples():
        example.evaluate()


def test_commands_are_found() -> None:
    text = (
        "dbsam export --precision fp16  # why\npython -m dbsam_deploy.predict A \\\n --box X0 1\n"
    )
    assert list(_commands(text)) == [
        ["export", "--precision", "fp16"],
        ["predict", "A", "--box", "1", "1"],
    ]


def test_tables_and_tree_name_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "dbsam_deploy").glob("*/__init__.py")}
    readme, contributing = (path.read_text() for path in TOP[:2])
    assert set(re.findall(r"^\| `([a-z]+)/` \|", readme, re.M)) == rooms
    tree = contributing.partition("dbsam_deploy/ ")[2].partition("\nexport/")[0]
    assert set(re.findall(r"^  ([a-z]+)/ ", tree, re.M)) == rooms


def _anchors(path: Path) -> set[str]:
    slugify = pytest.importorskip("markdown.extensions.toc").slugify
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    # mkdocs checks the links between the pages of the site; what lies outside it is checked here.
    broken = []
    for page in (*TOP, *ROOMS):
        for target, anchor in LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            if not path.exists() or (anchor and anchor[1:] not in _anchors(path)):
                broken.append(f"{_name(page)}: {target}{anchor}")
    assert broken == []
