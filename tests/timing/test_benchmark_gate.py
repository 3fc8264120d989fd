"""The gate of `pytest --benchmark`: every way to pass without being compared must fail."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timing import ratios as benchmarking
from timing.ratios import Baseline, Measurement

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.machine import hardware

ROOT = Path(__file__).resolve().parents[2]

BENCHMARK = """
import itertools, os
from types import SimpleNamespace
import pytest
from timing import ratios

# Only work takes time here, so what is judged does not hang on what else the machine does.
seconds, readings = [0.0], itertools.count()

def clock():
    return seconds[0] + 1e-9 * next(readings)

def work():
    seconds[0] += 0.01

@pytest.mark.benchmark(timer=clock)
def test_{name}(benchmark_ratio, monkeypatch):
    monkeypatch.setattr(ratios, "time", SimpleNamespace(perf_counter=clock))

    def subject():
        for _ in range(int(os.environ.get("WORK", "1"))):
            work()
        return int(os.environ.get("ANSWER", "42"))

    def check(answer):
        assert answer == 42
        return {{"precision": "fp32"}}

    benchmark_ratio(subject, check, reference=work, rounds=15)
"""


def _measurement(ratio: float) -> Measurement:
    return Measurement(ratio, ratio * 10, ratio * 12, 10.0, 40)


def _baseline(**ratios: float) -> Baseline:
    rows = {name: _measurement(ratio) for name, ratio in ratios.items()}
    return Baseline({}, hardware.installed_versions(), "2026-01-01", rows)


def test_equal_and_faster_pass() -> None:
    now = {"a": _measurement(1.0), "b": _measurement(0.4)}
    assert benchmarking.judge(now, _baseline(a=1.0, b=2.0)) == []


@pytest.mark.parametrize("growth", [1.0, 1 + 0.99 * benchmarking.TOLERANCE])
def test_growth_within_the_tolerance_passes(growth: float) -> None:
    assert benchmarking.judge({"a": _measurement(3 * growth)}, _baseline(a=3.0)) == []


def test_regression_fails_and_names_the_figures() -> None:
    worse = 3 * (1 + 1.01 * benchmarking.TOLERANCE)
    (line,) = benchmarking.judge(
        {"a": _measurement(worse), "b": _measurement(1.0)}, _baseline(a=3.0, b=1.0)
    )
    assert line.startswith("a: ")
    assert "3.000" in line
    assert f"{worse:.3f}" in line


def test_nan_fails() -> None:
    assert len(benchmarking.judge({"a": _measurement(float("nan"))}, _baseline(a=3.0))) == 1


def test_a_renamed_benchmark_fails_on_both_names() -> None:
    problems = benchmarking.judge({"new": _measurement(1.0)}, _baseline(old=1.0))
    assert [line.split(":")[0] for line in problems] == ["new", "old"]


def test_baseline_survives_the_file(tmp_path: Path) -> None:
    machine = hardware.describe_hardware()
    row = dataclasses.replace(_measurement(1.25), facts={"precision": "fp32", "agreement": 0.99})
    path = benchmarking.baseline_path(tmp_path / "deep", machine)
    benchmarking.write_baseline(path, machine, {"a": row})
    read = benchmarking.read_baseline(path)
    assert read.benchmarks == {"a": row}
    assert read.hardware["key"] == machine.key
    assert read.versions["onnxruntime"] == hardware.installed_versions()["onnxruntime"]
    assert benchmarking.version_changes(read) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not json", "not a baseline"),
        ("[]", "not a baseline"),
        ('{"format": 99}', "another format"),
        ('{"format": 1, "benchmarks": {"a": {"ratio": 1}}}', "not a baseline"),
    ],
)
def test_a_damaged_baseline_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        benchmarking.read_baseline(path)


def test_a_ratio_of_zero_in_the_baseline_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    benchmarking.write_baseline(path, hardware.describe_hardware(), {"a": _measurement(0.0)})
    with pytest.raises(InputError, match="not positive"):
        benchmarking.read_baseline(path)


def test_nothing_measured_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    with pytest.raises(InputError, match="no benchmark ran"):
        benchmarking.write_baseline(path, hardware.describe_hardware(), {})
    assert not path.exists()


def test_a_machine_that_slows_down_leaves_the_ratio_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds * (1 + 0.001 * len(calls))  # ever busier neighbours

    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    result = benchmarking.measure(lambda: work("s", 0.06), lambda: work("r", 0.02), rounds=50)
    # The reference is repeated until both halves of a round take as long.
    assert "".join(calls) == "sr" * benchmarking.WARM_UP_ROUNDS + "rrrs" * 50
    assert result.rounds == 50
    assert result.ratio == pytest.approx(3, rel=0.01)
    assert result.p95_ms > 1.05 * result.median_ms > 3 * result.reference_ms


def test_the_reference_workload_is_the_same_every_time() -> None:
    first, second = benchmarking.reference_workload()(), benchmarking.reference_workload()()
    assert first[0].tobytes() == second[0].tobytes()
    assert abs(first[0]).max() > 0


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A small project with this repository's conftest.py, one test and one benchmark."""
    folders = (ROOT, ROOT / "benchmarks", ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    workers = [name for name in os.environ if name.startswith("PYTEST_XDIST")]
    for name in ("WORK", "ANSWER", *workers):  # a worker's benchmarks are switched off
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins only take time
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path))  # which conftest.py sets
    shutil.copy(ROOT / "conftest.py", pytester.path / "conftest.py")
    pytester.makeini(
        "[pytest]\npython_files = test_*.py bench_*.py\nmarkers =\n  gpu\n  slow\n  bound\n"
    )
    pytester.mkdir("benchmarks")
    (pytester.path / "benchmarks" / "bench_one.py").write_text(BENCHMARK.format(name="one"))
    pytester.makepyfile(test_plain="def test_plain(): pass")
    return pytester


PLUGINS = ("-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin")


def _run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest_inprocess(*PLUGINS, *options)


def _baselines(project: pytest.Pytester) -> list[Path]:
    return sorted(project.path.glob("benchmarks/baselines/*.json"))


def test_without_the_flag_only_tests_run(project: pytest.Pytester) -> None:
    """In a process of its own, as from a shell; the runs below are in this one."""
    result = project.runpytest_subprocess(*PLUGINS)
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["*pytest --benchmark*", "test_plain.py*"])


def test_life_of_a_baseline(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _run(project, "--benchmark")
    missing.assert_outcomes(passed=1, deselected=1)
    assert missing.ret == pytest.ExitCode.TESTS_FAILED
    missing.stdout.fnmatch_lines(
        ["benchmark gate: no baseline for this hardware*pytest --benchmark --rebaseline*"]
    )
    assert _baselines(project) == []

    recorded = _run(project, "--benchmark", "--rebaseline")
    assert recorded.ret == pytest.ExitCode.OK
    (path,) = _baselines(project)
    assert path.stem == hardware.describe_hardware().key
    assert list(json.loads(path.read_text())["benchmarks"]) == ["benchmarks/bench_one.py::test_one"]

    equal = _run(project, "--benchmark")
    assert equal.ret == pytest.ExitCode.OK

    monkeypatch.setenv("WORK", "3")
    slower = _run(project, "--benchmark")
    slower.assert_outcomes(passed=1, deselected=1)
    assert slower.ret == pytest.ExitCode.TESTS_FAILED
    slower.stdout.fnmatch_lines(["benchmark gate: benchmarks/bench_one.py::test_one: *baseline*"])
    monkeypatch.delenv("WORK")

    bench = project.path / "benchmarks" / "bench_one.py"
    bench.write_text(BENCHMARK.format(name="other"))
    renamed = _run(project, "--benchmark")
    assert renamed.ret == pytest.ExitCode.TESTS_FAILED
    renamed.stdout.fnmatch_lines(
        [
            "benchmark gate: *::test_other: not in the baseline*",
            "benchmark gate: *::test_one: in the baseline but it did not run*",
        ]
    )


def test_without_a_baseline_a_second_measurement_is_judged_against_a_first(
    project: pytest.Pytester,
) -> None:
    bench = project.path / "benchmarks" / "bench_one.py"
    equal = _run(project, "--benchmark", "--twice")
    assert equal.ret == pytest.ExitCode.OK
    equal.stdout.fnmatch_lines(["note: judged against a first measurement of this run*"])
    # One call is checked, and each measurement is of 5 rounds to warm up and 15: the 22nd begins
    # the second one.
    slower = BENCHMARK.format(name="one").replace(
        'range(int(os.environ.get("WORK", "1")))',
        "range(1 if calls.append(0) or len(calls) < 22 else 3)",
    )
    bench.write_text(slower.replace("    def subject", "    calls = []\n\n    def subject"))
    found = _run(project, "--benchmark", "--twice")
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["benchmark gate: benchmarks/bench_one.py::test_one: *baseline*"])
    assert _baselines(project) == []


def test_a_wrong_result_is_neither_timed_nor_recorded(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANSWER", "41")
    result = _run(project, "--benchmark", "--rebaseline")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["benchmark gate: a benchmark failed or none was timed*"])
    assert _baselines(project) == []


def test_a_benchmark_that_measures_nothing_fails(project: pytest.Pytester) -> None:
    (project.path / "benchmarks" / "bench_one.py").write_text("def test_one(): pass\n")
    result = _run(project, "--benchmark", "--rebaseline")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["benchmark gate: *test_one: passed without measuring*"])
    assert _baselines(project) == []


def test_a_bound_needs_no_time(project: pytest.Pytester) -> None:
    (project.path / "benchmarks" / "bench_bytes.py").write_text(
        "import pytest\n@pytest.mark.bound\ndef test_bytes(): pass\n"
    )
    result = _run(project, "--benchmark", "--rebaseline")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=2, deselected=1)
    (path,) = _baselines(project)

    alone = _run(project, "--benchmark", "-m", "bound")
    alone.assert_outcomes(passed=1, deselected=2)
    assert alone.ret == pytest.ExitCode.OK
    alone.stdout.fnmatch_lines(["note: bounds were held, no speed was judged*"])
    recorded = path.read_bytes()
    nothing = _run(project, "--benchmark", "--rebaseline", "-m", "bound")
    assert nothing.ret == pytest.ExitCode.TESTS_FAILED
    nothing.stdout.fnmatch_lines(["benchmark gate: a benchmark failed or none was timed*"])
    assert path.read_bytes() == recorded
    (project.path / "benchmarks" / "bench_bytes.py").write_text(
        "import pytest\n@pytest.mark.bound\ndef test_bytes(): assert False\n"
    )
    exceeded = _run(project, "--benchmark", "-m", "bound")
    assert exceeded.ret == pytest.ExitCode.TESTS_FAILED


GPU_BENCHMARK = "import pytest\n@pytest.mark.gpu\ndef test_gpu(benchmark_ratio): raise ValueError\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_only_what_the_baseline_knows_must_not_be_skipped(project: pytest.Pytester) -> None:
    (project.path / "benchmarks" / "bench_gpu.py").write_text(GPU_BENCHMARK)
    recorded = _run(project, "--benchmark", "--rebaseline")
    recorded.assert_outcomes(passed=1, skipped=1, deselected=1)
    assert recorded.ret == pytest.ExitCode.OK
    (path,) = _baselines(project)
    assert list(json.loads(path.read_text())["benchmarks"]) == ["benchmarks/bench_one.py::test_one"]

    judged = _run(project, "--benchmark", "-rs")
    judged.assert_outcomes(passed=1, skipped=1, deselected=1)
    assert judged.ret == pytest.ExitCode.OK
    judged.stdout.fnmatch_lines(["*SKIPPED*gpu: torch sees no CUDA device*"])
    judged.stdout.no_fnmatch_line("benchmark gate: *")

    bench = project.path / "benchmarks" / "bench_one.py"
    bench.write_text("import pytest\ndef test_one(): pytest.skip('not today')\n")
    known = _run(project, "--benchmark")
    assert known.ret == pytest.ExitCode.TESTS_FAILED
    known.stdout.fnmatch_lines(["benchmark gate: *::test_one: in the baseline but it did not run*"])


def test_options_that_need_each_other_or_exclude_each_other(project: pytest.Pytester) -> None:
    for options, message in {
        ("--rebaseline",): "*--rebaseline records*give both*",
        ("--twice",): "*--twice repeats*give both*",
        ("--benchmark", "--rebaseline", "--twice"): "*leave --twice out*",
    }.items():
        result = _run(project, *options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([message])


SKIPPING = {
    "test_gpu.py": "import pytest\n@pytest.mark.gpu\ndef test_gpu(): pytest.skip('inside')\n",
    "test_slow.py": "import pytest\n@pytest.mark.slow\ndef test_slow(): raise ValueError\n",
    "test_data.py": "import pytest\n@pytest.mark.data\ndef test_data(test_set): pass\n",
}


@pytest.fixture
def skipping(project: pytest.Pytester) -> pytest.Pytester:
    """The same project with tests that this machine (or an option) lets skip."""
    for name, text in SKIPPING.items():
        (project.path / name).write_text(text)
    return project


def test_skips_are_visible_with_their_reason(skipping: pytest.Pytester) -> None:
    result = _run(skipping, "-ra")
    result.assert_outcomes(passed=1, skipped=3, deselected=1)
    for reason in ("takes minutes: run with --slow", "data: no test set in", "inside|gpu: torch"):
        assert re.search(f"SKIPPED.*({reason})", result.stdout.str())


def test_require_turns_skips_into_failures(skipping: pytest.Pytester) -> None:
    result = _run(skipping, "--require", "gpu,data")
    result.assert_outcomes(passed=1, errors=2, skipped=1, deselected=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*skipped under --require data*no test set*"])


def test_what_misses_something_else_too_is_not_required(skipping: pytest.Pytester) -> None:
    (skipping.path / "test_both.py").write_text(
        "import pytest\n@pytest.mark.data\n@pytest.mark.triton\ndef test_both(): raise ValueError\n"
    )
    _run(skipping, "--require", "data", "test_both.py").assert_outcomes(skipped=1)
    _run(skipping, "--require", "data,triton", "test_both.py").assert_outcomes(errors=1)


def test_require_refuses_a_module_that_skips_itself(skipping: pytest.Pytester) -> None:
    (skipping.path / "test_module.py").write_text(
        "import pytest\npytest.skip('hidden', allow_module_level=True)\n"
    )
    result = _run(skipping, "--require", "gpu", "test_module.py")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*module skipped under --require*hidden*"])


def test_an_unknown_requirement_is_refused(project: pytest.Pytester) -> None:
    result = _run(project, "--require", "gpus")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    known = "gpu,trt,triton,rtx,openvino,modelopt,nvcc,nvrtc,data"
    result.stderr.fnmatch_lines([f"*--require gpus: expected some of {known}*"])


def test_slow_tests_run_on_request(skipping: pytest.Pytester) -> None:
    result = _run(skipping, "--slow", "test_slow.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ValueError*"])
