"""`pytest -p support.other_kernels`: the kernels' tests run on another build of the sources.

`OTHER_KERNELS` names a mistake of `kernel_faults.WRONG_VALUES`; without it, they run on the
detector.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from dbsam_deploy.kernels import build, library
from dbsam_deploy.kernels.detector import detecting_library

from .kernel_faults import WRONG_VALUES

_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def _library(operator: str) -> Any:
    if not (name := os.environ.get("OTHER_KERNELS")):
        return detecting_library(operator)
    folder = Path(_FOLDER.name)
    source = WRONG_VALUES[name].plant(folder)
    path = build.build_library("fault", "g++", (source,), library.HOST_FLAGS, folder / "cache")
    return library.load_library(path, (operator,))


library.host_library = _library
