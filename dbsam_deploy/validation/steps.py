"""The steps of a validation, the one that tells most first: a budget cuts from the end."""

from __future__ import annotations

from .engine_checks import ENGINE_CHECKS
from .machine_state import CHECKS as MACHINE
from .operators import BUILD, COMPARE, REPLAY, SANITIZE
from .runtimes import EXPORT, HOLD, SERVE
from .speed import SPEED
from .verdicts import Step

STEPS = (
    Step("machine", "versions, driver, clocks, backends", "nothing", MACHINE, 60),
    Step("build", "the fused kernels compile and load", "g++ or nvcc", BUILD, 600),
    Step("operators", "each fused kernel against PyTorch", "a GPU or g++; torch", COMPARE, 300),
    Step("replay", "each kernel captured as a CUDA graph", "a GPU, torch", REPLAY, 120),
    Step("export", "an export to validate", "nothing, or torch", EXPORT, 1800),
    Step("runtimes", "the export's gate on each runtime", "a runtime", HOLD, 1800),
    Step("engines", "TensorRT: plugins, layers, gate", "TensorRT, a GPU", ENGINE_CHECKS, 3600),
    Step("speed", "times beside this machine's ceilings", "torch, a runtime", SPEED, 900),
    Step("server", "Triton starts, answers, stops", "a Triton server", SERVE, 900),
    Step("sanitizer", "races and stray accesses", "g++; a GPU, CUDA's toolkit", SANITIZE, 600),
)
"""In order. The limits are for one check of a full-size model on a slow machine: what takes longer
hangs."""
