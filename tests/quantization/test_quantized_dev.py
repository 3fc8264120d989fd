"""The gates of quantised exports with trained weights on the development images (slow)."""

from pathlib import Path

import pytest

from dbsam_deploy.export import export
from dbsam_deploy.options.export_options import ExportOptions
from dbsam_deploy.recipe import load_recipe

DEV = Path(__file__).parents[3] / "shared/data/testset/dev"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("precision", "variant", "images"),
    [("int8", "db_sam_tiny", 28), ("int8", "lite_medsam", 84), ("fp8", "db_sam_tiny", 28)],
)
def test_the_recipe_keeps_to_its_gate(precision, variant, images, tmp_path):
    """A miss raises; the slices come from all 28 files. LiteMedSAM misses it in fp8."""
    options = ExportOptions(
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
    assert published.figures.images >= min(images, 50)  # what the files have
    assert published.figures.objects > 60
    assert published.figures.dice_drop <= load_recipe(precision).gate.dice_drop
