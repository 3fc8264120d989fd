"""What the page is made of: small, checked, nothing from elsewhere, the bundle as locked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from dbsam_deploy.viewer.page import FOLDER

ROOT = Path(__file__).resolve().parents[2]
THIRD_PARTY = FOLDER / "third_party"
BUNDLE = "niivue.js"
SOURCES = [path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")]


def test_the_page_is_small_and_its_sources_are_few():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 3_000_000
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) <= 1500


def test_nothing_is_loaded_from_elsewhere_and_no_script_stands_in_the_page():
    for path in SOURCES:
        assert re.findall(r"(?:src|href|import|url\()\W{1,3}https?:", path.read_text()) == []
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", html) == []


def test_every_element_that_is_asked_for_is_there():
    html = (FOLDER / "index.html").read_text()
    asked = {
        name
        for path in SOURCES
        if path.suffix == ".js"
        for name in re.findall(r'\$\("([\w-]+)"\)', path.read_text())
    }
    assert asked
    assert asked - set(re.findall(r'id="([\w-]+)"', html)) == set()


def test_the_licences_of_the_bundle_are_there():
    text = (THIRD_PARTY / "licences.txt").read_text()
    for name in ("@niivue/niivue 0.69.0: BSD-2-Clause", "gl-matrix", "nifti-reader-js", "fflate"):
        assert name in text


def test_the_bundle_is_what_the_locked_packages_make(deployment_tool, tmp_path):
    deployment_tool("esbuild")
    script = ROOT / ".ci" / "bundle_niivue"
    subprocess.run(["bash", str(script), str(tmp_path / BUNDLE)], check=True)
    assert (tmp_path / BUNDLE).read_bytes() == (THIRD_PARTY / BUNDLE).read_bytes(), f"bash {script}"


def test_the_sources_pass_the_linter(deployment_tool):
    rules = ROOT / ".tools" / "node" / "eslint.config.mjs"
    command = [
        deployment_tool("eslint"),
        "--config",
        str(rules),
        "--max-warnings",
        "0",
        str(FOLDER),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
