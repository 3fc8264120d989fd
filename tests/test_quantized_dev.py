"""The gates of quantised exports with trained weights on the development images (slow)."""

from pathlib import Path

import pytest

from dbsam_deploy.export import export
from dbsam_deploy.export_options import Options
from dbsam_deploy.recipe import load_recipe

DEV = Path(__file__).parents[2] / "shared/data/testset/dev"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("variant", "images"), [("db_sam_tiny", 28), ("lite_medsam", 84)])
def test_the_recipe_keeps_to_its_gate(variant, images, precision, tmp_path):
    """A miss raises; the slices come from all 28 files."""
    options = Options(
        precision,
        variant=None if variant == "db_sam_tiny" else variant,
        calibration=DEV,
        data=DEV,
        data_images=images,
        output=tmp_path,
        engine="none",
    )
    published = export(options)
    assert published.artefact.variant == variant
    assert published.figures.images == images
    assert published.figures.objects > 60
    assert published.figures.dice_drop <= load_recipe(precision).gate.dice_drop
