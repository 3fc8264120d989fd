"""The reference model in plain PyTorch: `build_model("db_sam")`."""

from ..extras import require

for _name in ("torch", "safetensors"):
    require(_name, extra="export", what_for="the PyTorch model")

from .config import VARIANTS, FourBranchConfig, ModelConfig, TwoBranchConfig, variant_config
from .db_sam import DbSam, build_model

__all__ = [
    "VARIANTS",
    "DbSam",
    "FourBranchConfig",
    "ModelConfig",
    "TwoBranchConfig",
    "build_model",
    "variant_config",
]
