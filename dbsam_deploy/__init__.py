"""DB-SAM and SAM ViT-B for medical images: model, ONNX export, prediction and Triton serving.

    import dbsam_deploy as db

    model = db.load("build/fp16")
    result = model.predict("cells.png", boxes=[[155, 47, 193, 74]])

Every public name below is imported when it is first used: `import dbsam_deploy` loads nothing else.

>>> import dbsam_deploy as db
>>> db.build_model("db_sam_tiny", image_size=64).config.name
'db_sam_tiny'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .machine.privacy import switch_off

if TYPE_CHECKING:
    from .api.loading import load
    from .api.model import Model
    from .api.sam_predictor import SamPredictor, sam_model_registry
    from .artefact import load_artefact
    from .clients.access import Access
    from .clients.async_client import AsyncDbsamClient
    from .clients.client import DbsamClient
    from .clients.retries import Retries
    from .core.errors import (
        AccuracyError,
        BusyError,
        CheckpointError,
        DbsamError,
        DeadlineError,
        EngineError,
        ExportError,
        InputError,
        NoServerError,
        NotKeptError,
        ServingError,
        StoppingError,
    )
    from .core.masks import Prediction
    from .images.volumes import Volume, read_image
    from .model import build_model
    from .prediction.results import Result
    from .volumes.session import VolumePredictor

switch_off()  # before any library that would phone home is imported

__version__ = "0.1.0"
__all__ = [
    "Access",
    "AccuracyError",
    "AsyncDbsamClient",
    "BusyError",
    "CheckpointError",
    "DbsamClient",
    "DbsamError",
    "DeadlineError",
    "EngineError",
    "ExportError",
    "InputError",
    "Model",
    "NoServerError",
    "NotKeptError",
    "Prediction",
    "Result",
    "Retries",
    "SamPredictor",
    "ServingError",
    "StoppingError",
    "Volume",
    "VolumePredictor",
    "build_model",
    "load",
    "load_artefact",
    "read_image",
    "sam_model_registry",
]

_MODULES = {
    "artefact": ("load_artefact",),
    "clients.access": ("Access",),
    "clients.async_client": ("AsyncDbsamClient",),
    "clients.client": ("DbsamClient",),
    "clients.retries": ("Retries",),
    "core.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "core.masks": ("Prediction",),
    "images.volumes": ("Volume", "read_image"),
    "model": ("build_model",),
    "api.loading": ("load",),
    "api.model": ("Model",),
    "prediction.results": ("Result",),
    "volumes.session": ("VolumePredictor",),
    "api.sam_predictor": ("SamPredictor", "sam_model_registry"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
