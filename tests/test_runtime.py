"""What a machine that only predicts needs: an export, NumPy, Pillow, rich and one runtime.

Runs among the other tests, and by `.ci/runtime` in fresh environments of other Pythons that have
`.[cpu,client]` and pytest alone (without conftest.py, with the export in `build/`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.artefact import find_export
from dbsam_deploy.extras import EXTRAS, pip_line
from dbsam_deploy.resources import resource_dir

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "safetensors", "segment_anything")
BLOCKED = sorted({m.partition(".")[0] for e in EXTRAS for m in e.modules} - {"onnxruntime"})
IMAGE = resource_dir("export") / "examples" / "Microscopy_nuclei_HE_0e21d7b3eea8.npz"
BOX = ("--box", 155, 47, 193, 74)

DOOR = """
import runpy, sys
missing, name, *words = sys.argv[1:]
for module in filter(None, missing.split(",")):
    sys.modules[module] = None
sys.argv = [name, *words]
runpy.run_module(f"dbsam_deploy.{name}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> Path:
    """An export: the test suite's, or without its fixtures the newest in `build/`."""
    try:
        return Path(request.getfixturevalue("tiny_artefact").folder).absolute()
    except pytest.FixtureLookupError:
        return find_export().absolute()


def door(
    name: str, *words: object, missing: tuple[str, ...] | list[str] = (), cwd: Path
) -> subprocess.CompletedProcess[str]:
    """`python -m dbsam_deploy.NAME`, where `missing` are not installed."""
    command = [sys.executable, "-c", DOOR, ",".join(missing), name, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_openvino_needs_its_own_extra_alone(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    own = {module for extra in EXTRAS if extra.name == "openvino" for module in extra.modules}
    others = sorted({*BLOCKED, "onnx_ir", "onnxruntime"} - own)
    words = (IMAGE, *BOX, "--artefact", published, "--output", tmp_path, *OPENVINO)
    result = door("predict", *words, missing=others, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert own <= {"openvino", "onnx"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, dbsam_deploy; print(sorted(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_predict_needs_the_runtime_alone(published: Path, tmp_path: Path) -> None:
    words = (IMAGE, *BOX, "--artefact", published, "--output", tmp_path)
    result = door("predict", *words, missing=BLOCKED, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / f"{IMAGE.stem}_mask.npz") as saved, np.load(IMAGE) as case:
        assert saved["segs"].shape == case["imgs"].squeeze().shape[:2]


def test_the_doctor_finds_the_runtime(tmp_path: Path) -> None:
    """All rows where nothing more is installed; here, where each takes seconds, the runtime's."""
    alone = importlib.util.find_spec("torch") is None
    words = () if alone else ("--backend", "onnxruntime")
    result = door("doctor", "--json", *words, missing=BLOCKED, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    row = next(r for r in body["checks"] if r["name"] == "onnxruntime") if alone else body
    assert row["name"] == "onnxruntime"
    assert row["usable"]


def test_the_server_is_found_or_asked_for_in_one_line(tmp_path: Path) -> None:
    result = door("serve", "--repository", tmp_path / "none", missing=BLOCKED, cwd=tmp_path)
    assert result.returncode in (1, 2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


OPENVINO = ("--backend", "openvino")
CASES = [
    ("torch", "export", ("export", "--precision", "fp16")),
    ("onnxscript", "export", ("export", "--precision", "fp16")),
    ("safetensors", "export", ("sensitivity", "--calibration", ".")),
    ("accelerate", "train", ("train", "--recipe", "db_sam", "--data", ".")),
    ("torch", "train", ("train", "--recipe", "db_sam", "--data", ".")),
    ("onnxruntime", "cpu", ("predict", IMAGE, *BOX, "--artefact", "EXPORT")),
    ("openvino", "openvino", ("predict", IMAGE, *BOX, "--artefact", "EXPORT", *OPENVINO)),
    ("torch", "export", ("predict", IMAGE, *BOX, "--backend", "pytorch")),
    ("safetensors", "export", ("predict", IMAGE, *BOX, "--backend", "pytorch")),
    ("nibabel", "nifti", ("predict", "scan.nii.gz", "--box3d", 1, 1, 0, 2, 2, 1)),
    ("pydicom", "dicom", ("predict", "scan.dcm", "--box", 1, 1, 2, 2)),
    ("tritonclient", "client", ("client", IMAGE, *BOX)),
    ("shtab", "completion", ("completion", "bash")),
]
"""Package that is missing, the extra it belongs to, a command that needs it."""


@pytest.mark.parametrize(("package", "extra", "words"), CASES, ids=lambda value: str(value)[:40])
def test_a_missing_extra_ends_in_the_line_that_installs_it(
    package: str,
    extra: str,
    words: tuple[object, ...],
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    name, *rest = (published if word == "EXPORT" else word for word in words)
    result = door(str(name), *rest, missing=[package], cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f": {pip_line(extra)}")
