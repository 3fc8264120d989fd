"""House rules that a reader would otherwise have to remember (docs/adr/001-layout.md)."""

import ast
import doctest
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

from dbsam_deploy.files.sources import imported

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dbsam_deploy"

ORDER = (
    # what every room may use
    "core",
    "files",
    "extras",
    "cli",
    "catalogue",
    "resources",
    "machine",
    "artefact",
    "recipe",
    # one room a stage
    "images",
    "datasets",
    "model",
    "kernels",
    "fusions",
    "graphs",
    "engines",
    "serving",
    "clients",
    "sessions",
    "prediction",
    "verification",
    "outputs",
    "volumes",
    "pacs",
    "api",
    "viewer",
    "quantization",
    "diagnosis",
    "evaluation",
    "cohort",
    "loadtesting",
    "validation",
    "synthetic",
    "training",
    "options",
)
"""Rooms of the package (folders, and the modules all of them share); imports go up this list."""

DOORS = {
    "batch",
    "client",
    "completion",
    "convert",
    "doctor",
    "engine",
    "evaluate",
    "export",
    "inspect_file",
    "loadtest",
    "plugins",
    "predict",
    "prompts_check",
    "sensitivity",
    "serve",
    "train",
    "validate",
    "viewer_server",
}
"""Modules that parse a command line, call rooms and print; no room imports one."""

STAGES = {
    "model.weights",
    "graphs.onnx_export",
    "fusions",
    "engines.build",
    "verification.parity",
    "quantization.qdq",
    "serving.repository",
}
"""The export's steps: none knows another, and `export` alone puts them in order."""

FOLDERS = (
    *("dbsam_deploy", "export", "kernels", "triton_models"),
    *("deployment", "benchmarks", "tests", "docs"),
)
MACHINE_PATH = re.compile(r"(?<![\w.$}:/-])/(?:work|root|home|Users|mnt)/\w")
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 50
MAX_FILE_BYTES = 1_000_000
CHECKPOINT, MAX_CHECKPOINT_BYTES = "export/checkpoints/db_sam_tiny.safetensors", 25_000_000


def _files(*suffixes: str) -> list[Path]:
    """Files of the project with these suffixes (all of them if none is named), caches left out."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"] + [
        ROOT / ".ci" / "run"
    ]
    return [
        path
        for path in found
        if "__pycache__" not in path.parts
        and path.name != ".git"
        and (not suffixes or path.suffix in suffixes)
    ]


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = sorted(_files(".py"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if (path.parent / "__init__.py").is_file())


def _name(path: Path) -> str:
    """Dotted name of a module below `dbsam_deploy`; of a package's `__init__` the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _room(name: str) -> str:
    return name.split(".")[0]


@functools.cache  # not where this file is collected, which every worker does
def _imports() -> dict[str, set[str]]:
    """Module → what it imports of this package."""
    return {_name(path): set(imported(path)) for path in MODULES}


def test_every_room_is_on_the_list_and_the_other_way_round() -> None:
    rooms = {_room(name) for name in _imports()} - {"__init__", "__main__"}
    assert rooms == set(ORDER) | DOORS
    assert len(ORDER) == len(set(ORDER))


def test_no_name_hides_a_module_of_the_standard_library() -> None:
    """With a folder of ours on the path, as in a shell that stands in it, ours would be taken."""
    names = {part for name in _imports() for part in name.split(".")}
    assert names & sys.stdlib_module_names == set()


def test_imports_go_one_way() -> None:
    wrong = []
    for name, targets in _imports().items():
        own = _room(name)
        if own not in ORDER:
            continue  # a door may call any room; test_no_room_knows_a_door has the other direction
        allowed = {*ORDER[: ORDER.index(own)], own, "__version__"}
        wrong += [f"{name}: {one}" for one in targets if _room(one) not in allowed]
    assert wrong == []


def test_no_room_knows_a_door() -> None:
    knowing = {
        (name, _room(one))
        for name, targets in _imports().items()
        for one in targets
        if _room(one) in DOORS and name != "__main__"
    }
    assert knowing == set()


def _within(name: str, stage: str) -> bool:
    return name == stage or name.startswith(f"{stage}.")


def test_a_stage_knows_no_other_stage() -> None:
    wrong = []
    for stage in STAGES:
        own = {n: targets for n, targets in _imports().items() if _within(n, stage)}
        assert own, stage
        wrong += [
            f"{name}: {one}"
            for name, targets in own.items()
            for one in targets
            for other in STAGES - {stage}
            if _within(one, other)
        ]
    assert wrong == []


def test_only_export_composes_the_stages() -> None:
    def stages(name: str) -> set[str]:
        return {s for s in STAGES for one in _imports()[name] if _within(one, s)}

    assert stages("export") == STAGES - {"quantization.qdq"}  # the quantizer calls it
    exporters = {name for name in _imports() if "graphs.onnx_export" in stages(name)}
    assert exporters == {"export", "sensitivity"}  # a sweep needs the float encoder alone


def _reached(name: str) -> set[str]:
    """Rooms that a room or door imports, or what it imports does."""
    modules = {n for n in _imports() if _within(n, name)}
    while more := {one for n in modules for one in _imports().get(n, ())} - modules:
        modules |= more
    return {_room(n) for n in modules}


def test_export_and_server_do_without_volumes() -> None:
    beyond = {"outputs", "volumes", "pacs", "api", "viewer", "cohort"}
    assert beyond <= set(ORDER)
    assert _reached("export") & beyond == set()
    assert _reached("serving") & beyond == set()
    assert "prediction" in _reached("api")


def test_modules_and_functions_stay_short() -> None:
    long = []
    for path in PYTHON:
        text = path.read_text()
        if (lines := len(text.splitlines())) > MAX_MODULE_LINES:
            long.append(f"{_relative(path)}: {lines} lines")
        long += [
            f"{_relative(path)}: {node.name}: {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
        ]
    assert long == []


def test_python_lives_in_its_rooms() -> None:
    # Outside the package: tests, benchmarks, and the models that tritonserver runs.
    strays = [
        _relative(path)
        for path in PYTHON
        if not re.fullmatch(
            r"dbsam_deploy/.*|tests/([a-z]+/)?(test_|conftest)[^/]*|tests/support/[^/]*|(conftest|build_backend)\.py"
            r"|benchmarks/(bench_|compare_|conftest|timing/)[^/]*|triton_models/[^/]+/1/model\.py",
            _relative(path),
        )
    ]
    assert strays == []


def test_only_the_package_has_init_files_and_nothing_is_called_utils() -> None:
    names = {_relative(path) for path in PYTHON}
    folders = {_relative(path.parent) for path in MODULES}
    assert {n for n in names if n.endswith("__init__.py")} == {f"{f}/__init__.py" for f in folders}
    assert all(folder.count("/") <= 1 and folder.startswith("dbsam_deploy") for folder in folders)
    assert {n for n in names if re.search(r"(^|/)utils?(\.py|/)", n)} == set()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    hits = []
    for path in _files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # images and other binary files
        hits += [f"{_relative(path)}: {m.group()}" for m in MACHINE_PATH.finditer(text)]
    assert hits == []


def test_every_file_is_small() -> None:
    large = {_relative(path): path.stat().st_size for path in _files()}
    assert large.pop(CHECKPOINT) <= MAX_CHECKPOINT_BYTES
    assert {name: size for name, size in large.items() if size > MAX_FILE_BYTES} == {}


def test_the_machine_path_pattern_finds_one() -> None:
    assert MACHINE_PATH.search("see " + "/home" + "/somebody/x")
    assert not MACHINE_PATH.search("https://example.org" + "/home" + "/page")


def test_examples_in_docstrings_run() -> None:
    results = [doctest.testmod(importlib.import_module(name)) for name in ("dbsam_deploy",)]
    assert sum(result.attempted for result in results) > 0
    assert not any(result.failed for result in results)


def test_the_readme_has_the_two_commands_that_ci_reads() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("run", "test"):
        blocks = re.findall(
            rf"<!-- readme:{name} -->\s*```(?:bash|sh|console)?\n(.+?)```", text, re.S
        )
        assert len(blocks) == 1, name
        check = subprocess.run(["bash", "-n"], input=blocks[0], capture_output=True, text=True)
        assert check.returncode == 0, check.stderr


def test_one_name_stands_for_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(_relative(path))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name[0].isupper() and not name.isupper():  # an alias of a type
                    places.setdefault(name, []).append(_relative(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
