"""`import dbsam_deploy`: what it offers, what it loads, and the session that the README shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dbsam_deploy as db

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tritonclient", "numpy", "PIL", "rich")


def test_every_public_name_is_there_and_documented():
    assert set(db.__all__) <= set(dir(db))
    for name in db.__all__:
        found = getattr(db, name)
        assert name == "sam_model_registry" or found.__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = db.no_such_name


def test_the_import_loads_nothing_else():
    code = "import sys, dbsam_deploy; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.split() == []


def test_load_does_not_need_torch_or_onnx():
    # What a machine with the extra `cpu` alone runs: an export on ONNX Runtime.
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'safetensors', 'segment_anything', 'tritonclient'):\n"
        "    sys.modules[name] = None\n"
        "import dbsam_deploy\n"
        "dbsam_deploy.load, dbsam_deploy.SamPredictor, dbsam_deploy.read_image\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _first_python_block() -> str:
    return re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)[0]


@pytest.mark.openvino
def test_the_session_in_the_readme(published_export, tmp_path, monkeypatch):
    nib = pytest.importorskip("nibabel")
    (tmp_path / "build").mkdir()
    shutil.copytree(published_export[1].artefact.folder, tmp_path / "build" / "fp16")
    with np.load(ROOT / "export/examples/Microscopy_nuclei_HE_0e21d7b3eea8.npz") as example:
        cells = Image.fromarray(example["imgs"][0])
    cells.save(tmp_path / "cells.png")
    cells.resize((500, 400)).save(tmp_path / "skin.png")
    values = np.random.default_rng().integers(-300, 300, (140, 160, 52), dtype=np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([0.8, 0.8, 2.5, 1.0])), tmp_path / "ct.nii.gz")
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    exec(_first_python_block(), session)  # noqa: S102 - the README's own words
    result, click, organ = (session[name] for name in ("result", "click", "organ"))
    assert result.masks.shape == (1, 1, *Image.open("cells.png").size[::-1])
    assert result.ious.shape == (1, 1)
    assert result.masks.sum() > 0
    assert click.masks.shape == (1, 3, 400, 500)
    assert session["better"].masks.shape == (1, 1, 400, 500)
    saved = nib.load("out/ct_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), organ.labels)
    assert organ.slices == tuple(range(30, 50))
