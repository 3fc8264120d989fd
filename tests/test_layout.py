"""House rules that a reader would otherwise have to remember (docs/adr/001-layout.md)."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dbsam_deploy"

ORDER = (
    # what every room may use
    "errors",
    "cli",
    "extras",
    "contract",
    "resources",
    "kernel_build",
    "kernels",
    "hardware",
    "imaging",
    "prompts",
    "recipe",
    "artefact",
    "plugin_build",
    "plugins",
    "quick_plugins",
    "engines",
    # images and volumes in and out of files
    "scans",
    "npz_files",
    "volumes",
    "cases",
    "calibration",
    # checkpoint → model → graphs → ONNX
    "model",
    "checkpoint",
    "weights",
    "precision",
    "prompt_graph",
    "graphs",
    "torch_ops",
    "fused_model",
    "onnx_export",
    "fusions",
    "engine_build",
    # running a model, and judging what it gives
    "onnxruntime_providers",
    "cpu_graph",
    "observers",
    "smoothing",
    "qdq_types",
    "modelopt_worker",
    "modelopt_tool",
    "shared_tables",
    "layers",
    "rounding",
    "one_sided",
    "quantize",
    "layer_choice",
    "sessions",
    "engine_session",
    "cuda_graphs",
    "fused_session",
    "onnxruntime_tensorrt",
    "float_head",
    "openvino_session",
    "inspections",
    "probes",
    "backends",
    "predictor",
    "segment",
    "figures",
    "verify",
    "views",
    "exclusions",
    "quantized_graph",
    "engine_parity",
    # serving
    "steps",
    "triton_config",
    "repository",
    "server_env",
    "triton_server",
    "client_memory",
    "client_requests",
    "report",
    # figures of a model on labelled images
    "evaluation",
    "training",
    # for tests and benchmarks
    "testing",
    "testing_fusions",
    "testing_cuda",
    "testing_engines",
    "synthetic",
    "benchmarking",
    "gpu_peers",
    "gpu_benchmarking",
    # doors
    "predict",
    "client_async",
    "served",
    "client",
    "serve",
    "evaluate",
    "train",
    "engine",
    "export_options",
    "sensitivity",
    "export",
    "doctor",
)
"""Modules of the package; each imports only from those above it. A new module goes on this list."""

STAGES = {"weights", "onnx_export", "fusions", "engine_build", "verify", "repository"}
"""The export's steps: none knows another, and `export` alone puts them in order."""

FOLDERS = ("dbsam_deploy", "export", "kernels", "triton_models", "benchmarks", "tests", "docs")
MACHINE_PATH = re.compile(r"(?<![\w.$}:/-])/(?:work|root|home|Users|mnt)/\w")
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 50
MAX_FILE_BYTES = 1_000_000
CHECKPOINT, MAX_CHECKPOINT_BYTES = "export/checkpoints/db_sam_tiny.safetensors", 25_000_000


def _files(*suffixes: str) -> list[Path]:
    """Files of the project with these suffixes (all of them if none is named), caches left out."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()] + [ROOT / ".ci" / "run"]
    return [
        path
        for path in found
        if "__pycache__" not in path.parts and (not suffixes or path.suffix in suffixes)
    ]


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = sorted(_files(".py"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if (path.parent / "__init__.py").is_file())


def _owner(path: Path) -> str:
    """Name of the module or sub-package directly below `dbsam_deploy` that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Names directly below `dbsam_deploy` that `path` imports, lazily or not, with their line."""
    package = ["dbsam_deploy", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "dbsam_deploy" and len(target) > 1:
                yield target[1], node.lineno


def test_every_module_is_on_the_list_and_the_other_way_round() -> None:
    assert {_owner(path) for path in MODULES} - {"__init__"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", MODULES, ids=_relative)
def test_imports_go_one_way(path: Path) -> None:
    owner = _owner(path)
    allowed = set(ORDER[: ORDER.index(owner)]) | {owner} if owner in ORDER else set()
    wrong = [f"line {line}: {name}" for name, line in _imports(path) if name not in allowed]
    assert wrong == []


@pytest.mark.parametrize("stage", sorted(STAGES | {"quantize"}))
def test_a_stage_knows_no_other_stage(stage: str) -> None:
    paths = [path for path in MODULES if _owner(path) == stage]
    assert paths
    imported = {name for path in paths for name, _ in _imports(path)}
    assert imported & (STAGES - {stage}) == set()


def test_only_export_composes_the_stages() -> None:
    by_module = {path: {name for name, _ in _imports(path)} for path in MODULES}
    assert by_module[PACKAGE / "export.py"] >= STAGES
    exporters = {path.name for path, names in by_module.items() if "onnx_export" in names}
    assert exporters == {"export.py", "sensitivity.py"}  # a sweep needs the float encoder alone
    assert not any("export" in names for names in by_module.values())


def test_the_import_reader_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    source = (
        "import dbsam_deploy.a\nfrom dbsam_deploy import b\nfrom dbsam_deploy.c import x\n"
        "from .. import d\nfrom ..e import y\nfrom . import z\nimport numpy\n"
        "def f():\n    from ..g.h import w\n"
    )
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "part.py"
    path.write_text(source)
    assert [name for name, _ in _imports(path)] == ["a", "b", "c", "d", "e", "model", "g"]


@pytest.mark.parametrize("path", PYTHON, ids=_relative)
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_python_lives_in_its_rooms() -> None:
    # Outside the package: tests, benchmarks, and the models that tritonserver runs.
    strays = [
        _relative(path)
        for path in PYTHON
        if not re.fullmatch(
            r"dbsam_deploy/.*|tests/(test_|conftest)[^/]*"
            r"|benchmarks/(bench_|compare_|conftest)[^/]*|conftest\.py|triton_models/[^/]+/1/model\.py",
            _relative(path),
        )
    ]
    assert strays == []


def test_only_the_package_has_init_files_and_nothing_is_called_utils() -> None:
    names = {_relative(path) for path in PYTHON}
    assert {n for n in names if n.endswith("__init__.py")} == {
        "dbsam_deploy/__init__.py",
        "dbsam_deploy/engines/__init__.py",
        "dbsam_deploy/evaluation/__init__.py",
        "dbsam_deploy/fusions/__init__.py",
        "dbsam_deploy/model/__init__.py",
        "dbsam_deploy/training/__init__.py",
    }
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


COMMANDS = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in MODULES
    if re.search(r'^if __name__ == "__main__":', path.read_text(), re.M)
)


def _run_module(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"dbsam_deploy.{name}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_example(name: str) -> None:
    result = _run_module(name, "--help")
    assert result.returncode == 0, result.stderr
    usage, _, rest = result.stdout.partition("\n\n")
    assert usage.startswith(f"usage: python -m dbsam_deploy.{name}")
    assert re.search(r"^examples?:", rest, re.M)
    assert f"python -m dbsam_deploy.{name} " in rest


MISTAKES = [
    *((name, "--no-such-option") for name in COMMANDS),
    ("export", "--precision", "fp13"),
    ("export", "--precision", "fp32", "--variant", "db_sam_huge"),
    ("export", "--precision", "fp32", "--image-size", "100"),
    ("export", "--precision", "fp32", "--image-size", "big"),
    ("export", "--precision", "fp32", "--checkpoint", "missing.pth"),
    ("predict", "missing.png", "--box", "1", "2", "3", "4"),
    ("serve", "--repository", "missing-folder"),
    ("client", "missing.png", "--box", "1", "2", "3", "4"),
    ("evaluate", "--data", "missing-folder"),
    ("evaluate",),
    ("plugins", "info", "missing.so"),
    ("plugins", "build", "--arch", "90"),
    ("plugins", "build", "--tensorrt-include", "missing-folder"),
    ("plugins",),
    ("engine",),
    ("engine", "build", "--artefact", "missing-folder"),
    ("engine", "inspect", "--artefact", "missing-folder"),
    ("export", "--precision", "fp32", "--engine", "tensorrt-rtx", "--target", "ada"),
    ("train", "--recipe", "db_sam_huge"),
    ("train",),
    ("export", "--precision", "int8"),
    ("sensitivity",),
    ("doctor", "--backend", "tensorrt9"),
    ("doctor", "--device", "cuda"),
]
"""Commands with what a user might mistype, each refused in one line with status 2."""


@pytest.mark.parametrize("case", MISTAKES, ids=" ".join)
def test_a_mistake_ends_in_one_line_and_status_2(case: tuple[str, ...]) -> None:
    result = _run_module(*case)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""


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
