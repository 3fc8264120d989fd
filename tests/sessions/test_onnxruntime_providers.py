"""A session runs on the provider that was asked for, or there is no session."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.onnx_chain import SHAPE, chain
from support.peak_memory import resident_bytes

from dbsam_deploy.core.errors import EngineError, MissingError
from dbsam_deploy.diagnosis.inspections import ONE_NODE_MODEL
from dbsam_deploy.extras import pip_line
from dbsam_deploy.sessions import onnxruntime_providers as providers
from dbsam_deploy.sessions.onnxruntime_providers import (
    CPU,
    CUDA,
    TENSORRT,
    import_onnxruntime,
    open_session,
    require_provider,
)


class Fail(Exception):  # noqa: N818
    """Stands for the exceptions of ONNX Runtime's binding, which derive from Exception alone."""


class Runtime:
    """An ONNX Runtime of the GPU build, as far as sessions use it.

    Args:
        folder: where its `capi` would be.
        used: providers that a new session has.
        placement: provider → op types of the nodes it took.
        failure: raised instead of opening a session.
        printed: what `preload_dlls` prints.
    """

    __version__ = "1.99.0"
    cuda_version = "13.0"

    def __init__(
        self,
        folder: Path,
        *,
        used: tuple[str, ...] = (CUDA.name, CPU.name),
        placement: dict[str, tuple[str, ...]] | None = None,
        failure: Exception | None = None,
        printed: str = "",
    ) -> None:
        self.__file__ = str(folder / "__init__.py")
        self.capi = SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace(Fail=Fail))
        self.opened: list[Any] = []
        self.settings: dict[str, str] = {}
        self._used, self._placement = used, placement or {}
        self._failure, self._printed = failure, printed

    def get_available_providers(self) -> list[str]:
        return [TENSORRT.name, CUDA.name, CPU.name]

    def preload_dlls(self) -> None:
        print(self._printed)

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_session_config_entry=self.settings.__setitem__)

    def InferenceSession(self, model: Any, settings: Any, **options: Any) -> Any:  # noqa: N802
        self.opened.append(options)
        if self._failure is not None:
            raise self._failure
        parts = [
            SimpleNamespace(
                ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops]
            )
            for name, ops in self._placement.items()
        ]
        return SimpleNamespace(
            get_providers=lambda: list(self._used),
            get_provider_graph_assignment_info=lambda: parts,
        )


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the libraries that load in the test; nothing else does."""
    found: set[str] = set()

    def load(name: str) -> object:
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    return found


def test_the_installed_runtime_computes_on_the_cpu() -> None:
    runtime = pytest.importorskip("onnxruntime")
    require_provider(runtime, CPU)
    session = open_session(runtime, ONE_NODE_MODEL, CPU, threads=1)
    x = np.random.default_rng().standard_normal((4, 4)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ x, rtol=1e-5)
    assert session.get_providers() == [CPU.name]


def test_the_installed_runtime_refuses_what_is_no_model(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for model in (b"no model", str(tmp_path / "missing.onnx")):
        with pytest.raises(EngineError, match=f"opens no session on {CPU.name}"):
            open_session(runtime, model, CPU)


@pytest.mark.parametrize("provider", [CUDA, TENSORRT], ids=lambda p: p.label)
def test_the_installed_cpu_build_has_no_gpu_provider(provider: providers.Provider) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if provider.name in runtime.get_available_providers():
        pytest.skip("this onnxruntime is the GPU build")
    with pytest.raises(MissingError, match=f"offers .*, not {provider.name}: pip uninstall"):
        require_provider(runtime, provider)


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match="not installed: " + re.escape(pip_line("cpu"))):
        providers.import_onnxruntime()


def test_the_cpu_needs_no_library(tmp_path: Path, libraries: set[str]) -> None:
    require_provider(Runtime(tmp_path), CPU)  # type: ignore[arg-type]
    assert libraries == set()


@pytest.mark.skipif(sys.platform != "linux", reason="names Linux libraries")
class TestLibraries:
    """`require_provider` on the GPU build."""

    def check(self, runtime: Any, provider: providers.Provider) -> None:
        require_provider(runtime, provider)

    def test_no_driver(self, tmp_path: Path, libraries: set[str]) -> None:
        with pytest.raises(EngineError, match=r"no driver for one \(libcuda.so.1: cannot open"):
            self.check(Runtime(tmp_path), CUDA)

    def test_no_cuda(
        self, tmp_path: Path, libraries: set[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        libraries.add("libcuda.so.1")
        printed = (
            "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file"
        )
        with pytest.raises(MissingError) as caught:
            self.check(Runtime(tmp_path, printed=printed), CUDA)
        assert "CUDA 13.0" in caught.value.what
        assert "(libcublasLt.so.13: cannot open shared object file)" in caught.value.what
        assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.install
        assert capsys.readouterr().out == ""

    def test_all_of_cuda(self, tmp_path: Path, libraries: set[str]) -> None:
        libraries.add("libcuda.so.1")
        self.check(Runtime(tmp_path), CUDA)

    @pytest.mark.parametrize(("major", "line"), [(10, "tensorrt>=10.16,<11"), (12, "tensorrt>=12")])
    def test_another_tensorrt(
        self, tmp_path: Path, libraries: set[str], major: int, line: str
    ) -> None:
        (tmp_path / "capi").mkdir()
        library = tmp_path / "capi" / TENSORRT.library
        library.write_bytes(b"\x7fELF\0libnvinfer.so.%d\0libcudart.so.13\0" % major)
        libraries |= {"libcuda.so.1", "libnvinfer.so.11"}
        with pytest.raises(MissingError, match=f"built for TensorRT {major}") as caught:
            self.check(Runtime(tmp_path), TENSORRT)
        assert line in caught.value.install
        libraries.add(f"libnvinfer.so.{major}")
        self.check(Runtime(tmp_path), TENSORRT)

    def test_no_tensorrt_provider(self, tmp_path: Path, libraries: set[str]) -> None:
        libraries.add("libcuda.so.1")
        with pytest.raises(MissingError, match="names no TensorRT library"):
            self.check(Runtime(tmp_path), TENSORRT)


def open_on(runtime: Runtime, provider: providers.Provider, **options: str) -> Any:
    module: ModuleType = runtime  # type: ignore[assignment]
    return open_session(module, b"", provider, options=options)


def test_a_dropped_provider_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"left {CUDA.name} out and would run on {CPU.name}"):
        open_on(Runtime(tmp_path, used=(CPU.name,)), CUDA)
    with pytest.raises(EngineError, match=f"left {TENSORRT.name} out and would run on {CUDA.name}"):
        open_on(Runtime(tmp_path, used=(CUDA.name, CPU.name)), TENSORRT)


def test_options_of_a_session(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path, used=(TENSORRT.name, CUDA.name, CPU.name))
    open_on(runtime, TENSORRT, trt_engine_cache_enable="1")
    (options,) = runtime.opened
    first, *behind = options["providers"]
    assert first == (TENSORRT.name, {"trt_engine_cache_enable": "1"})
    assert behind == [CUDA.name]
    assert options["enable_fallback"] == 0
    assert "trt_fp16_enable" not in first[1]  # the graph's own types decide


def test_fp32_on_cuda_is_not_tf32(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    open_on(runtime, CUDA)
    assert runtime.opened[0]["providers"] == [(CUDA.name, {"use_tf32": "0"})]


@pytest.mark.parametrize("failure", [Fail("bad graph"), RuntimeError("no library")], ids=repr)
def test_a_refused_model_is_an_error(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(EngineError, match=f"opens no session on {CUDA.name}: {failure}"):
        open_on(Runtime(tmp_path, failure=failure), CUDA)


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        open_on(Runtime(tmp_path, failure=TypeError("x")), CUDA)


def test_heavy_nodes_must_be_on_the_provider(tmp_path: Path) -> None:
    placement = {CUDA.name: ("MatMul", "Conv"), CPU.name: ("Shape", "Gather")}
    open_on(Runtime(tmp_path, placement=placement), CUDA)
    placement[CPU.name] += ("MatMul", "Gemm")
    with pytest.raises(EngineError, match=rf"\(2 on {CPU.name}\)"):
        open_on(Runtime(tmp_path, placement=placement), CUDA)


@pytest.mark.parametrize(
    ("flags", "unsigned"),
    [("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), ("avx2 avx512f", True), ("", True)],
)
def test_int8_products_are_made_safe_only_where_they_overflow(
    monkeypatch: pytest.MonkeyPatch, flags: str, unsigned: bool
) -> None:
    """With VNNI the safe form costs a third of the speed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    made = []

    def remember(settings: Any) -> Any:
        made.append(settings)
        return settings

    monkeypatch.setattr(providers, "cpuinfo", lambda: f"flags : fpu {flags}\n")
    options = onnxruntime.SessionOptions
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: remember(options()))
    open_session(onnxruntime, ONE_NODE_MODEL, CPU)
    (settings,) = made
    if unsigned:
        assert settings.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            settings.get_session_config_entry("session.x64quantprecision")


def open_chain() -> Any:
    return open_session(import_onnxruntime(), chain(), CPU, threads=1)


def test_a_run_like_the_one_before_takes_no_further_memory():
    session, values = open_chain(), np.zeros(SHAPE, np.float32)
    session.run(None, {"x": values})
    before = resident_bytes()
    session.run(None, {"x": values})
    assert resident_bytes() - before < values.nbytes // 2


def test_a_session_runs_in_the_memory_of_another():
    one, other, values = open_chain(), open_chain(), np.zeros(SHAPE, np.float32)
    one.run(None, {"x": values})
    before = resident_bytes()
    other.run(None, {"x": values})
    assert resident_bytes() - before < values.nbytes // 2
