"""The arithmetic of the GPU benchmarks, and how they end on a machine without a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime
import pytest
import torch
from support.references import small_model
from support.torch_engines import PLAYED_TENSORRT, played_build
from timing import gpu as gpu_benchmarking
from timing import tensorrt_rows

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.engines.manifest import Flags
from dbsam_deploy.fusions import fuse_file
from dbsam_deploy.sessions.cuda_graphs import Recording
from dbsam_deploy.validation import measuring
from dbsam_deploy.verification.parity import cosine

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
KERNEL_BENCHMARKS = (
    *("ms_deform_attn", "channel_attention", "rel_pos_attention", "depthwise_conv_gelu"),
    "windowed_attention",
)


def test_variants_take_turns_and_the_order_rotates():
    log: list[str] = []
    variants = {name: (lambda name=name: log.append(name)) for name in "abc"}
    clock = iter(range(1000))

    def stopwatch(work) -> float:
        work()
        return float(next(clock))

    seconds = measuring.take_turns(variants, stopwatch, rounds=3)
    warm = 3 * measuring.WARM_UP_ROUNDS
    assert "".join(log[warm:]) == "abcbcacab"
    # The n-th timed call took warm + n seconds: a was 1st, 6th and 8th, b 2nd, 4th and 9th.
    assert seconds == {"a": warm + 5, "b": warm + 3, "c": warm + 4}


def test_one_slow_call_does_not_move_the_median():
    calls = []

    def stopwatch(work) -> float:
        calls.append(work)
        return 100.0 if len(calls) == measuring.WARM_UP_ROUNDS + 2 else 1.0

    assert measuring.take_turns({"a": print}, stopwatch, rounds=5) == {"a": 1.0}


def test_ceilings_count_both_directions_of_a_copy_and_both_halves_of_a_multiply_add():
    found = measuring.measure_ceilings(lambda work: work() is None or 0.5, device="cpu", divide=64)
    size, side = measuring.COPY_BYTES // 64, measuring.GEMM_SIDE // 64
    assert found.copy_gb_s == pytest.approx(4 * size / 1e9)
    assert found.gemm_tflop_s == pytest.approx(4 * side**3 / 1e12)


def test_a_row_says_what_was_reached_of_the_ceilings():
    seconds = {"ours": 2e-6, "eager": 9e-6}
    facts = measuring.row_facts(
        seconds, "ours", measuring.Demand(6000, 8 * 10**6), measuring.Ceilings(4.0, 16.0)
    )
    assert facts == pytest.approx(
        {
            "us": 2.0,
            "GB/s": 3.0,
            "of copy": 0.75,
            "TFLOP/s": 4.0,
            "of GEMM": 0.25,
            "vs eager": 4.5,
        }
    )
    assert "TFLOP/s" not in measuring.row_facts(
        seconds, "ours", measuring.Demand(6000), measuring.Ceilings(4.0, 16.0)
    )


@pytest.mark.parametrize(
    ("bytes_per_call", "sets"), [(1, 64), (10**6, 30), (14 * 10**6, 4), (10**9, 4)]
)
def test_the_inputs_of_a_benchmark_exceed_the_cache(bytes_per_call, sets):
    assert measuring.sets_needed(bytes_per_call, 10**7) == sets


def test_the_gpu_reference_workload_is_the_same_every_time():
    first, second = (gpu_benchmarking.gpu_reference_workload("cpu", 64)() for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_a_peer_that_does_not_run_is_named_and_the_others_are_recorded(monkeypatch):
    def captured(function, sets):
        return function(*sets[0])

    def broken(x):
        raise ImportError("no flash_attn.cute\nand a traceback")

    monkeypatch.setattr(gpu_benchmarking, "Captured", captured)
    variants = {"ours": lambda x: x + 1, "FLASH": broken, "eager": lambda x: x + 2}
    graphs, missing = gpu_benchmarking.capture_all(variants, [(1,)])
    assert graphs == {"ours": 2, "eager": 3}
    assert missing == {"no FLASH": "ImportError: no flash_attn.cute"}
    with pytest.raises(ImportError):
        gpu_benchmarking.capture_all({"ours": broken}, [(1,)])


def test_float32_without_tf32_stays_on_cudnn():
    """`torch.backends.cudnn.flags(allow_tf32=False)` switches cuDNN off, which ships with it on."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark
    with measuring.without_tf32():
        assert (cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark) == (True, False, before[2])
    assert (cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark) == before


@WITHOUT_GPU
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(EngineError, match="bench needs a CUDA device") as error:
        gpu_benchmarking.require_cuda("bench")
    assert len(str(error.value).splitlines()) == 1


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@WITHOUT_GPU
def test_without_a_gpu_the_kernel_benchmarks_are_collected_and_skipped(tmp_path):
    files = [f"benchmarks/bench_{name}.py" for name in KERNEL_BENCHMARKS]
    result = _run("-m", "pytest", "--benchmark", f"--baselines={tmp_path}", "-rs", *files)
    assert "24 skipped" in result.stdout, result.stdout + result.stderr
    assert "gpu: torch sees no CUDA device" in result.stdout
    assert "error" not in result.stdout.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def compare_gpu(monkeypatch) -> ModuleType:
    """benchmarks/compare_gpu.py as a module."""
    path = ROOT / "benchmarks" / "compare_gpu.py"
    spec = importlib.util.spec_from_file_location("compare_gpu", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_gpu", module)
    spec.loader.exec_module(module)
    return module


@WITHOUT_GPU
def test_the_comparison_ends_in_one_line_without_a_gpu(compare_gpu, capsys):
    assert compare_gpu.run(compare_gpu.main, []) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: benchmarks/compare_gpu.py needs a CUDA device")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "fastest"], "row 'fastest': expected one of eager-fp32"),
        (["--variants", "sam"], "variant 'sam': expected one of"),
        (["--batches", "1", "0"], "expected numbers of at least 1"),
        (["--rounds", "0"], "expected numbers of at least 1"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistaken_options_end_in_one_line(compare_gpu, capsys, options, message):
    assert compare_gpu.run(compare_gpu.main, options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_help_teaches_by_example(compare_gpu, capsys):
    with pytest.raises(SystemExit) as ended:
        compare_gpu.main(["--help"])
    assert ended.value.code == 0
    assert "python benchmarks/compare_gpu.py --variants db_sam" in capsys.readouterr().out


class _Rerun:
    """Stands in for CUDA graphs."""

    def __call__(self, function, inputs) -> Recording:
        buffers = tuple(tensor.clone() for tensor in inputs)
        outputs = tuple(tensor.clone() for tensor in function(*buffers))

        def replay() -> None:
            for buffer, value in zip(outputs, function(*buffers), strict=True):
                buffer.copy_(value)

        return Recording(buffers, outputs, replay)


@pytest.fixture
def on_cpu(compare_gpu, monkeypatch) -> Iterator[ModuleType]:
    """The comparison on the CPU with a small model: all but the device and the compiler is real."""
    model = small_model("sam_vit_b", 64)
    loaded = SimpleNamespace(model=model, preprocessing=model.config.frame)
    monkeypatch.setattr(measuring, "WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(compare_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(compare_gpu, "load_model", lambda **_: loaded)
    monkeypatch.setattr(compare_gpu, "require_cuda", lambda what: None)
    monkeypatch.setattr(compare_gpu, "CudaGraphRecorder", _Rerun)
    monkeypatch.setattr(compare_gpu, "peak_bytes", lambda function, image: 10**9)
    monkeypatch.setattr(compare_gpu, "synchronized", lambda work: work)
    monkeypatch.setattr(compare_gpu, "gc", SimpleNamespace(collect=lambda: 0))  # no memory is read
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operators: a second thread only waits
    yield compare_gpu
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_row_of_the_comparison_computes_the_embedding(on_cpu, capsys):
    names = [name for name, row in on_cpu.ROWS.items() if row.engine is None]
    options = ["--variants", "db_sam", "--batches", "2", "--rounds", "1", "--rows", *names]
    assert on_cpu.main(options) == 0
    out = capsys.readouterr().out
    assert len(cosines_in(out)) == len(names)
    assert all("1.00" in line.split("│")[5] for line in out.splitlines() if "float" in line)


def cosines_in(table: str) -> list[float]:
    """Of the rows of a printed comparison, all of which are the embedding."""
    found = re.findall(r"│ +(\d\.\d{6}) │", table)
    assert all(float(cosine) > 0.999 for cosine in found)
    return found


@pytest.fixture
def with_tensorrt(
    compare_gpu, small_models, exported_graph, on_cpu, monkeypatch, tmp_path
) -> ModuleType:
    """The comparison with TensorRT played: builder, runtime and provider; int8 is fp16's graph."""
    model = small_models("sam_vit_b")
    loaded = SimpleNamespace(model=model, preprocessing=model.config.frame)
    plain = exported_graph("sam_vit_b", "encoder", "fp16")
    fused = shutil.copy(plain, tmp_path / "encoder.onnx")
    fuse_file(Path(fused), model.config)
    monkeypatch.setattr(compare_gpu, "load_model", lambda **_: loaded)
    monkeypatch.setattr(compare_gpu, "exported_graph", lambda shop, precision: Path(fused))
    monkeypatch.setattr(compare_gpu, "users_graph", lambda shop, batch: Path(plain))
    monkeypatch.setattr(tensorrt_rows, "import_kind", lambda kind: PLAYED_TENSORRT)
    monkeypatch.setattr(tensorrt_rows, "run_job", played_build)
    monkeypatch.setattr(tensorrt_rows, "load_plugins", lambda path, runtime: None)
    monkeypatch.setattr(tensorrt_rows, "import_onnxruntime", lambda: onnxruntime)
    monkeypatch.setattr(tensorrt_rows, "require_provider", lambda runtime, provider: None)
    monkeypatch.setattr(
        tensorrt_rows,
        "open_session",
        lambda runtime, path, provider, options: runtime.InferenceSession(
            path, providers=["CPUExecutionProvider"]
        ),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build/plugins").mkdir(parents=True)
    (tmp_path / "build/plugins/libdbsam_plugins.so").touch()
    return compare_gpu


def test_tensorrts_rows_compute_the_embedding(with_tensorrt, capsys):
    names = [name for name, row in with_tensorrt.ROWS.items() if row.engine is not None]
    assert {"trt-sam", "ort-trt", "trt-fp16", "trt-plugins", "trt-int8", "trt-fp8"} <= set(names)
    options = ["--variants", "sam_vit_b", "--batches", "1", "--rounds", "1", "--rows", *names]
    assert with_tensorrt.main(options) == 0
    assert len(cosines_in(capsys.readouterr().out)) == len(names)


def test_a_row_whose_engine_fails_is_named_and_the_others_go_on(with_tensorrt, monkeypatch, capsys):
    Path("build/plugins/libdbsam_plugins.so").unlink()

    def broken(shop, batch):
        raise RuntimeError("the builder is gone\nsecond line")

    monkeypatch.setitem(
        with_tensorrt.ROWS, "trt-fp8", with_tensorrt.Row("broken", "fp8", engine=broken)
    )
    options = ["--variants", "sam_vit_b", "--batches", "1", "--rounds", "1", "--rows"]
    assert with_tensorrt.main([*options, "trt-plugins", "trt-fp8", "trt-fp16"]) == 1
    out = capsys.readouterr().out
    assert "trt-plugins: no plugin library" in out
    assert "trt-fp8: RuntimeError: the builder is gone\n" in out
    assert len(cosines_in(out)) == 1


def test_plugins_that_were_taken_apart_are_no_row_of_plugins(with_tensorrt, monkeypatch, capsys):
    def taken_apart(job, folder, graph):
        return played_build(replace(job, plugins="", flags=Flags()), folder, graph)

    monkeypatch.setattr(tensorrt_rows, "run_job", taken_apart)
    options = ["--variants", "sam_vit_b", "--batches", "1", "--rounds", "1", "--rows"]
    assert with_tensorrt.main([*options, "trt-quick"]) == 1
    assert re.search(r"trt-quick: .*: 0 plugin layers for \d fused", capsys.readouterr().out)


def test_int8_without_images_says_what_it_wants(on_cpu, capsys):
    options = ["--variants", "sam_vit_b", "--batches", "1", "--rounds", "1", "--rows"]
    assert on_cpu.main([*options, "trt-int8"]) == 0
    assert "trt-int8: int8 and fp8 need real images" in capsys.readouterr().out


@pytest.mark.slow
def test_the_graphs_of_the_rows_are_the_models(small_models, tmp_path):
    model = small_models("db_sam")
    loaded = SimpleNamespace(model=model, preprocessing=model.config.frame)
    shop = tensorrt_rows.Workshop(loaded, tmp_path)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.encode(image).numpy()
        paths = [tensorrt_rows.users_graph(shop, 2), tensorrt_rows.exported_graph(shop, "fp16")]
    for path in paths:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"image": image.numpy()})
        assert cosine(found, expected) > 0.999, path


def test_a_row_with_another_embedding_is_not_timed(on_cpu, monkeypatch, capsys):
    row = on_cpu.Row("wrong", torch.float32, lambda model, dtype: lambda x: model.encode(-x))
    monkeypatch.setitem(on_cpu.ROWS, "eager-fp16", row)
    options = ["--variants", "db_sam", "--batches", "1", "--rounds", "1", "--rows"]
    assert on_cpu.main([*options, "eager-fp16", "eager-fp32"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"eager-fp16: cosine .*; not timed", out)
    assert len(cosines_in(out)) == 1


def test_a_row_that_does_not_fit_the_memory_is_named(on_cpu, monkeypatch, capsys):
    def build(model, dtype):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setitem(on_cpu.ROWS, "ours-fp16", on_cpu.Row("ours", torch.float16, build))
    options = ["--variants", "db_sam", "--batches", "1", "--rounds", "1", "--rows"]
    assert on_cpu.main([*options, "eager-fp32", "ours-fp16"]) == 0
    assert "out of memory" in capsys.readouterr().out
