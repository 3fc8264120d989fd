"""What the libraries below this one would tell their makers, switched off.

ONNX Runtime collects usage data by default since 1.32: it writes an identifier of the machine and a
queue into the user's cache folder, and sends names of model files and graphs and texts of errors.
OpenVINO sends an event when it is imported. `switch_off` runs when this package is imported, which
is before it imports either of them; what it sets is inherited by every process that is started.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: no uploader, no queue, no identifier
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, which accelerate installs
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray, for a cluster that is started here
    "DO_NOT_TRACK": "1",  # whoever keeps to that convention
}
"""Environment variables for this process, workers and servers; read when a library is loaded."""

_OPENVINO_SENDER = "openvino_telemetry"


def switch_off() -> None:
    """Let no library collect or send usage data, whatever the environment said before."""
    os.environ.update(VARIABLES)
    # OpenVINO has no variable for it, and its opt-out is a file in the user's home folder. Without
    # the package that sends, it takes its own stub.
    if _OPENVINO_SENDER not in sys.modules:
        sys.modules[_OPENVINO_SENDER] = None  # type: ignore[assignment] # what import refuses


def silence(onnxruntime: ModuleType) -> ModuleType:
    """Stop the events of an ONNX Runtime that may have been imported before this package was.

    Args:
        onnxruntime: the imported module, which is returned.
    """
    onnxruntime.disable_telemetry_events()
    return onnxruntime
