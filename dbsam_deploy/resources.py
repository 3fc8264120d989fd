"""Finds `export/`, `kernels/` and `triton_models/` in a checkout or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

from .core.errors import InputError

WEIGHTS_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""The weights in a folder that Hugging Face's libraries write."""

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Folder `name` (``export``, ``kernels`` or ``triton_models``).

    In a checkout and an editable install it stands beside the package, in a wheel under
    `dbsam_deploy/_share/`.

    Raises:
        InputError: it is in neither place (a broken installation).
    """
    for root in (_PACKAGE / "_share", _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"folder {name!r} is neither in {_PACKAGE / '_share'} nor in {_PACKAGE.parent}: "
        "reinstall dbsam-deploy"
    )
