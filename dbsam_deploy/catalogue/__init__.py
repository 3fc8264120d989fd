"""The model variants in words, for command lines and tables that have not loaded PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from ..extras import LITE_MEDSAM_LINE


@dataclass(frozen=True)
class Variant:
    """What a user chooses a variant by.

    Attributes:
        name: as in `model.VARIANTS`.
        family: of which it is.
        parameters: how many numbers it has.
        image_size: side of the model frame in pixels, without `--image-size`.
        licence: of the weights that are to be had; "" where there are none.
        weights: where.
    """

    name: str
    family: str
    parameters: int
    image_size: int
    licence: str
    weights: str


_APACHE = "Apache-2.0"
_SAM = "facebookresearch/segment-anything on GitHub"
_SAM2 = "facebookresearch/sam2 on GitHub"
_DB_SAM = "none are published: train it, or bring your own"
_CATALOGUE = (
    Variant("db_sam", "DB-SAM", 153_033_776, 1024, "", _DB_SAM),
    Variant("db_sam_4level", "DB-SAM", 163_105_520, 1024, "", _DB_SAM),
    Variant("db_sam_plus", "DB-SAM", 159_877_296, 1024, "", _DB_SAM),
    Variant("sam_vit_b", "SAM", 93_735_472, 1024, _APACHE, f"{_SAM}: sam_vit_b_01ec64.pth"),
    Variant("sam_vit_l", "SAM", 312_342_832, 1024, _APACHE, f"{_SAM}: sam_vit_l_0b3195.pth"),
    Variant("sam_vit_h", "SAM", 641_090_608, 1024, _APACHE, f"{_SAM}: sam_vit_h_4b8939.pth"),
    Variant(
        *("medsam_vit_b", "MedSAM", 93_735_472, 1024, _APACHE),
        "bowang-lab/MedSAM on GitHub: medsam_vit_b.pth",
    ),
    Variant("db_sam_tiny", "DB-SAM", 8_690_144, 1024, _APACHE, "come with this library"),
    Variant(
        *("lite_medsam", "LiteMedSAM", 9_791_300, 256, _APACHE),
        LITE_MEDSAM_LINE,
    ),
    Variant(
        *("sam_med2d", "SAM-Med2D", 271_241_776, 256, _APACHE),
        "OpenGVLab/SAM-Med2D on GitHub: sam-med2d_b.pth",
    ),
    Variant(
        *("mobile_sam", "MobileSAM", 9_808_452, 1024, _APACHE),
        "ChaoningZhang/MobileSAM on GitHub: mobile_sam.pt",
    ),
    *(
        Variant(
            *(f"efficientvit_sam_{size}", "EfficientViT-SAM", parameters, side, _APACHE),
            f"mit-han-lab/efficientvit-sam on Hugging Face: efficientvit_sam_{size}.pt",
        )
        for size, parameters, side in (
            ("l0", 34_792_784, 512),
            ("l1", 47_650_128, 512),
            ("l2", 61_328_592, 512),
            ("xl0", 116_957_904, 1024),
            ("xl1", 203_346_128, 1024),
        )
    ),
    Variant(
        *("sam2_hiera_tiny", "SAM 2", 31_308_880, 1024, _APACHE),
        f"{_SAM2}: sam2.1_hiera_tiny.pt",
    ),
    Variant(
        *("sam2_hiera_small", "SAM 2", 38_406_736, 1024, _APACHE),
        f"{_SAM2}: sam2.1_hiera_small.pt",
    ),
    Variant(
        *("sam2_hiera_base_plus", "SAM 2", 73_196_560, 1024, _APACHE),
        f"{_SAM2}: sam2.1_hiera_base_plus.pt",
    ),
    Variant(
        *("sam2_hiera_large", "SAM 2", 216_793_024, 1024, _APACHE),
        f"{_SAM2}: sam2.1_hiera_large.pt",
    ),
    Variant(
        *("medsam2", "MedSAM2", 31_308_880, 512, "as its page says"),
        "wanglab/MedSAM2 on Hugging Face: MedSAM2_latest.pt",
    ),
)

CATALOGUE = {variant.name: variant for variant in _CATALOGUE}
"""Variant name → facts, in the order of `model.VARIANTS`."""
VARIANT_NAMES = tuple(CATALOGUE)
DEFAULT_VARIANT = "db_sam_tiny"
"""The variant whose trained weights come with the library, in `export/checkpoints/`."""
