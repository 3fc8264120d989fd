"""Questions to runtimes, put to real processes: whatever breaks there is an answer."""

from __future__ import annotations

import importlib.metadata
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from dbsam_deploy.diagnosis import inspections
from dbsam_deploy.diagnosis.inspections import INSPECTIONS, Answer, inspect_runtime
from dbsam_deploy.engines.device import find_gpu
from dbsam_deploy.extras import pip_line

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(module, source)`: a package that the asked process finds first."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )

    def write(module: str, source: str) -> None:
        (folder / f"{module}.py").write_text(textwrap.dedent(source))

    return write


def test_the_installed_pytorch_and_onnxruntime_compute() -> None:
    pytest.importorskip("onnxruntime")
    for question, distribution in (("torch", "torch"), ("onnxruntime", "onnxruntime")):
        answer = inspect_runtime(question)
        assert answer.error == ""
        assert answer.facts["version"].startswith(importlib.metadata.version(distribution))


@pytest.mark.openvino
def test_the_installed_openvino_computes() -> None:
    answer = inspect_runtime("openvino")
    assert answer.error == ""
    assert answer.facts["version"].startswith(importlib.metadata.version("openvino"))


def test_a_package_that_does_not_load(install: Install) -> None:
    install("tensorrt", "raise OSError('libnvinfer.so.11: cannot open shared object file')")
    answer = inspect_runtime("tensorrt")
    assert answer == Answer(error="OSError: libnvinfer.so.11: cannot open shared object file")


def test_a_package_that_ends_the_process(install: Install) -> None:
    install(
        "tensorrt_rtx",
        """
        import os, sys
        print("terminate called after throwing an instance", file=sys.stderr)
        os.abort()
        """,
    )
    answer = inspect_runtime("tensorrt_rtx")
    assert answer.facts == {}
    assert "ended by SIGABRT; its last words: terminate called after throwing" in answer.error


def test_a_package_that_leaves_without_a_word(install: Install) -> None:
    install("tensorrt", "import os; os._exit(3)")
    assert inspect_runtime("tensorrt").error == "its process ended with status 3: it said nothing"


def test_a_package_that_hangs(install: Install) -> None:
    install("tensorrt", "import time; time.sleep(60)")
    assert inspect_runtime("tensorrt", timeout_s=1.5).error == "no answer within 1.5 s"


def test_a_package_that_prints_and_fails_at_the_end(install: Install) -> None:
    install(
        "tensorrt",
        """
        import atexit, os
        atexit.register(os.abort)
        print("[TRT] [W] a warning on standard output")
        __version__ = "10.16.1"
        class Logger:
            ERROR = 1
            def __init__(self, severity): pass
        class Builder:
            def __init__(self, logger): raise TypeError("factory function returned nullptr")
        """,
    )
    answer = inspect_runtime("tensorrt")
    assert answer.error == ""
    assert answer.facts == {"version": "10.16.1", "builder": False}


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(inspections._AbsentError, match="no_such_package"):
        inspections._module("no_such_package.part")


def test_an_onnxruntime_that_does_not_load(install: Install) -> None:
    install("onnxruntime", "raise ImportError('libonnxruntime.so.1: wrong ELF class')")
    answer = inspect_runtime("onnxruntime")
    assert "wrong ELF class" in answer.error
    assert answer.install == pip_line("cpu")


def test_a_provider_that_onnxruntime_drops_with_a_word_in_its_log(install: Install) -> None:
    install(
        "onnxruntime",
        """
        import sys
        __version__ = "1.99.0"
        def disable_telemetry_events():
            pass
        def get_available_providers():
            return ["CPUExecutionProvider"]
        class SessionOptions:
            def add_session_config_entry(self, *entry): pass
        class OrtAllocatorType:
            ORT_ARENA_ALLOCATOR = 1
        class OrtMemType:
            DEFAULT = 0
        class OrtMemoryInfo:
            def __init__(self, *place): pass
        def create_and_register_allocator(place, settings): pass
        class InferenceSession:
            def __init__(self, *model, **options):
                print("[E] Failed to load x.so with error: libz.so.9: not found", file=sys.stderr)
            def get_providers(self):
                return ["OtherExecutionProvider"]
        """,
    )
    answer = inspect_runtime("onnxruntime")
    assert "left CPUExecutionProvider out and would run on OtherExecutionProvider" in answer.error
    assert answer.error.endswith("(libz.so.9: not found)")


def test_a_gpu_that_only_nvidia_smi_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_gpu() is not None:
        pytest.skip("this process sees a GPU")
    plain = inspect_runtime("driver")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.86.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answer = inspect_runtime("driver")
    assert plain.error == "no NVIDIA GPU, or no driver for it"
    assert "nvidia-smi shows NVIDIA H200, but" in answer.error
    assert "--gpus all" in answer.error


def test_an_unknown_question_is_a_bug_with_its_message() -> None:
    assert inspect_runtime("no such question").error == "KeyError: 'no such question'"


def test_extras_report_their_versions() -> None:
    pytest.importorskip("pydicom")
    answer = inspect_runtime("extra:dicom")
    assert answer.facts["versions"]["pydicom"] == importlib.metadata.version("pydicom")
    assert {"pyjpegls", "python-gdcm"} <= set(answer.facts["versions"])
    assert {"extra:eval", "extra:train", "extra:client"} <= set(INSPECTIONS)
