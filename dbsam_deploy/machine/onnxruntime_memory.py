"""Memory that all sessions of ONNX Runtime in this process run in, on the CPU."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any


def share_memory(runtime: ModuleType, settings: Any) -> None:
    """Let a session run where others of this process have run, and leave the memory to them.

    An encoder keeps 0.6 GB for its next image, a decoder half as much; one runs at a time. Weights
    lie apart, so that they go with their session.

    Args:
        runtime: the module `onnxruntime`.
        settings: the session's `SessionOptions`.
    """
    _register_arena(runtime)
    # A pattern keeps a second block as large as all tensors of the largest run so far, and is no
    # quicker here.
    settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.use_env_allocators", "1")
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


@cache
def _register_arena(runtime: ModuleType) -> None:
    """Make that memory, once: ONNX Runtime would put a new one in its place."""
    arena = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = runtime.OrtMemoryInfo("Cpu", arena, 0, runtime.OrtMemType.DEFAULT)
    runtime.create_and_register_allocator(place, None)
