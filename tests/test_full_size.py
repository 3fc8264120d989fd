"""Full-size graphs at 1024 px through the whole export: minutes and 14 GB each, run with --slow."""

import importlib.util
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from dbsam_deploy.export import ExportOptions, export
from dbsam_deploy.verification.cases import bundled_examples


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", ["db_sam", "db_sam_4level", "db_sam_plus", "sam_vit_b"])
def test_full_size_graphs_pass_their_gate(variant, precision, tmp_path):
    """The gate is inside `export`; one image keeps it to one pass of each encoder."""
    data = tmp_path / "cases"
    data.mkdir()
    example = min(bundled_examples().glob("*.npz"), key=lambda path: path.stat().st_size)
    shutil.copy(example, data)
    options = ExportOptions(
        precision, variant=variant, data=data, output=tmp_path / "build", engine="none"
    )
    ahead_of_time = variant == "db_sam" and importlib.util.find_spec("tensorrt_rtx") is not None
    if ahead_of_time:
        options = replace(options, engine="tensorrt-rtx", targets=("sm_86", "sm_120"))
    published = export(options, Console(quiet=True))
    assert published.artefact.preprocessing.image_size == 1024
    assert published.figures.images == 1
    assert published.figures.objects > 1
    assert set(published.engines) == (set(published.artefact.graphs) if ahead_of_time else set())
    shutil.rmtree(options.output)  # a gigabyte
