"""`pytest` runs the tests; `pytest --benchmark` runs benchmarks/ and fails on any regression.

Options:
    --benchmark    run only benchmarks/ and judge them against the baseline of this hardware
    --rebaseline   with --benchmark: record the baseline instead of judging
    --twice        with --benchmark: time everything twice and judge the second against the first,
                   on hardware that has no baseline
    --baselines    with --benchmark: folder of baselines, benchmarks/baselines by default
    --slow         run the tests marked `slow` too
    --require      markers whose tests must run: what would be a skip becomes a failure

Write `--baselines=FOLDER` and `--require=gpu,trt` with the equals sign: before pytest has read this
file, it takes a value of its own that happens to be a folder for the place to look for tests.
"""

from __future__ import annotations

import os
import sys

if "--benchmark" not in sys.argv:
    # On a test's small tensors a second thread spins and waits, on a core that another worker
    # needs. PyTorch and NumPy read this when they are loaded, so it stands before their imports.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels and models are kept here between runs, and nothing goes into the user's own cache.
os.environ["XDG_CACHE_HOME"] = os.path.join(os.path.dirname(__file__), ".test-cache")

import functools
import importlib.util
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from support.browser import missing_browser
from support.orthanc import missing_orthanc
from timing import ratios as benchmarking

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.extras import pip_line
from dbsam_deploy.kernels.nvrtc import find_nvrtc
from dbsam_deploy.kernels.toolkit import find_nvcc
from dbsam_deploy.machine.hardware import Hardware, describe_hardware, installed_versions
from dbsam_deploy.serving.environment import DEFAULT_FOLDER, ServerEnvironment, find_environment

pytest_plugins = ["pytester", "support.random_numbers", "support.run_order"]

ROOT = Path(__file__).resolve().parent
BENCHMARKS = ROOT / "benchmarks"
GATE = "dbsam-benchmark-gate"
TEST_SET = ROOT.parent / "shared" / "data" / "testset" / "dev"
DEPLOYMENT_TOOLS = ("dclint", "hadolint", "helm", "nginx", "promtool")
TOOL_PATH = f"{ROOT / '.tools' / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _missing_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _missing_trt() -> str:
    if importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed: {pip_line('gpu')}"
    return _missing_gpu()


def _missing_triton(inside: str = "", option: str = "") -> str:
    # An environment that is there but broken is no reason to skip: its tests fail.
    place = f"{DEFAULT_FOLDER}/{inside}"
    return "" if any(ROOT.glob(place)) else f"no {place}: dbsam serve --install{option}"


def _without(module: str, line: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(module) else f"no {module}: {line}"


def _missing_modelopt() -> str:
    from dbsam_deploy.quantization.modelopt_tool import find_python  # which loads onnx_ir

    return _refusal(find_python)  # a Python that is named but broken is no reason: its tests fail


def _refusal(find: Callable[[], object]) -> str:
    try:
        find()
    except EngineError as error:
        return str(error)
    return ""


def _missing_deployment() -> str:
    there = any(shutil.which(name, path=TOOL_PATH) for name in DEPLOYMENT_TOOLS)
    return "" if there else f"none of {', '.join(DEPLOYMENT_TOOLS)}: python3 .ci/tools"


MISSING: dict[str, Callable[[], str]] = {
    "gpu": _missing_gpu,
    "trt": _missing_trt,
    "triton": _missing_triton,
    "rtx": _without("tensorrt_rtx", "the extra `test` installs it"),
    "openvino": _without("openvino", pip_line("openvino")),
    "modelopt": _missing_modelopt,
    "nvcc": lambda: _refusal(find_nvcc),
    "nvrtc": lambda: _refusal(find_nvrtc),
    "data": lambda: "" if TEST_SET.is_dir() else f"no test set in {TEST_SET}",
    "deployment": _missing_deployment,
    "orthanc": missing_orthanc,
    "browser": missing_browser,
    "ray": _without("ray", pip_line("cluster")),
    "served_openvino": lambda: _missing_triton("lib/*/*/openvino", " --backend openvino"),
}
"""Marker → why its tests cannot run on this machine, or "" if they can."""

FIXTURE_MARKERS = {
    "plugin_library": "nvcc",
    "rtx": "rtx",
    "server_environment": "triton",
    "deployment_tool": "deployment",
    "orthanc": "orthanc",
}
"""Fixture → the marker that every test using it has."""


@functools.cache
def _why_missing(marker: str) -> str:
    return MISSING[marker]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options named above."""
    group = parser.getgroup("dbsam-deploy")
    group.addoption("--benchmark", action="store_true", help="run benchmarks/ and judge them")
    group.addoption("--rebaseline", action="store_true", help="with --benchmark: record, not judge")
    group.addoption(
        "--twice",
        action="store_true",
        help="with --benchmark: judge a second measurement against a first, not against a baseline",
    )
    group.addoption(
        "--baselines",
        type=Path,
        default=BENCHMARKS / "baselines",
        help="with --benchmark: folder of baselines (default: benchmarks/baselines)",
    )
    group.addoption("--slow", action="store_true", help="run the tests marked slow too")
    group.addoption(
        "--require",
        default="",
        metavar="MARKERS",
        help=f"fail, instead of skip, the tests with these markers: {','.join(MISSING)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that do not fit together, and start the gate for a benchmark run."""
    config.addinivalue_line("markers", "data: reads the test set in ../shared/data")
    unknown = _required(config) - MISSING.keys()
    if unknown:
        raise pytest.UsageError(
            f"--require {','.join(sorted(unknown))}: expected some of {','.join(MISSING)}"
        )
    if config.getoption("rebaseline") and config.getoption("twice"):
        raise pytest.UsageError("--rebaseline records one measurement: leave --twice out")
    if config.getoption("benchmark"):
        config.pluginmanager.register(BenchmarkGate(config), GATE)
    for option, does in {"rebaseline": "records", "twice": "repeats"}.items():
        if config.getoption(option) and not config.getoption("benchmark"):
            raise pytest.UsageError(f"--{option} {does} what --benchmark measures: give both")


def _required(config: pytest.Config) -> set[str]:
    return {name.strip() for name in config.getoption("require").split(",") if name.strip()}


def _is_benchmark(item: pytest.Item) -> bool:
    return item.path.is_relative_to(BENCHMARKS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the benchmarks or the tests, never both: timing wants an otherwise idle process."""
    chosen = [item for item in items if _is_benchmark(item) == config.getoption("benchmark")]
    others = [item for item in items if _is_benchmark(item) != config.getoption("benchmark")]
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
    for item in items:
        for fixture, marker in FIXTURE_MARKERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    """Say which half was left out."""
    if config.getoption("benchmark"):
        return "only benchmarks/ is run; leave --benchmark out to run the tests"
    return "benchmarks/ is left out; run it with `pytest --benchmark`"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, with the reason."""
    for marker in MISSING:
        reason = _why_missing(marker) if item.get_closest_marker(marker) else ""
        if reason:
            pytest.skip(f"{marker}: {reason}")
    if item.get_closest_marker("slow") and not item.config.getoption("slow"):
        pytest.skip("takes minutes: run with --slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip of a required marker is a failure, wherever in the test it was raised."""
    report = yield
    required = {name for name in _required(item.config) if item.get_closest_marker(name)}
    excused = item.get_closest_marker("slow") and not item.config.getoption("slow")
    # A test that needs a GPU too is not missed where only the other thing is required.
    excused = excused or any(
        item.get_closest_marker(name) and _why_missing(name)
        for name in MISSING.keys() - _required(item.config)
    )
    if report.skipped and required and not excused and not hasattr(report, "wasxfail"):
        reason = call.excinfo.value if call.excinfo else "no reason given"
        report.outcome = "failed"
        report.longrepr = f"skipped under --require {','.join(sorted(required))}: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself whole hides its markers, so under --require it is an error."""
    report = yield
    if report.skipped and _required(collector.config):
        report.outcome = "failed"
        report.longrepr = f"module skipped under --require: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def test_set() -> Path:
    """Folder of the shared test set; tests that use it carry the marker `data`."""
    return TEST_SET


@pytest.fixture(scope="session")
def server_environment() -> ServerEnvironment:
    """The Triton server's own environment; tests that use it carry the marker `triton`."""
    return find_environment(ROOT / DEFAULT_FOLDER)


@pytest.fixture(scope="session")
def deployment_tool() -> Callable[[str], str]:
    """Name → path of a tool that checks `deployment/`, from .tools/ or the PATH, or a skip."""

    def find(name: str) -> str:
        found = shutil.which(name, path=TOOL_PATH)
        if found is None:
            pytest.skip(f"no {name}: python3 .ci/tools")
        return found

    return find


class BenchmarkGate:
    """Collects what the benchmarks of this run measured, and judges or records it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._rebaseline: bool = config.getoption("rebaseline")
        self.twice: bool = config.getoption("twice")
        self._hardware: Hardware = describe_hardware()
        self._path = benchmarking.baseline_path(config.getoption("baselines"), self._hardware)
        self._measured: dict[str, benchmarking.Measurement] = {}
        self._first: dict[str, benchmarking.Measurement] = {}
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._baseline: benchmarking.Baseline | None = None

    def record(self, name: str, *measurements: benchmarking.Measurement) -> None:
        """Keep what the benchmark `name` (its pytest id) measured, once or twice."""
        self._first[name], self._measured[name] = measurements[0], measurements[-1]

    def pytest_report_header(self) -> list[str]:
        """Name the machine and the versions that the figures below belong to."""
        hardware = self._hardware
        versions = ", ".join(f"{k} {v}" for k, v in installed_versions().items())
        gpu = f", {hardware.gpu} (driver {hardware.driver})" if hardware.gpu else ""
        return [f"hardware: {hardware.cpu}, {hardware.cores} cores{gpu}", f"versions: {versions}"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Drop the figures of a failed benchmark; note one that passed without any."""
        known = report.nodeid in self._measured or "bound" in report.keywords
        if report.failed:
            self._measured.pop(report.nodeid, None)
            self._first.pop(report.nodeid, None)
        elif report.when == "call" and report.passed and not known:
            self._problems.append(f"{report.nodeid}: passed without measuring anything")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge or record the run, and fail the session where there is a problem."""
        if session.config.getoption("collectonly"):
            return
        try:
            if self._rebaseline:
                self._record_baseline(session.testsfailed)
            elif session.items and all(i.get_closest_marker("bound") for i in session.items):
                self._notes.append("bounds were held, no speed was judged: leave `-m bound` out")
            else:
                self._baseline = self._find_baseline()
                self._problems += benchmarking.judge(self._measured, self._baseline)
                changes = ", ".join(benchmarking.version_changes(self._baseline))
                self._notes += [f"versions differ from the baseline's: {changes}"] * bool(changes)
        except InputError as error:
            self._problems.append(str(error))
        if self._problems:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _find_baseline(self) -> benchmarking.Baseline:
        if not self.twice:
            return benchmarking.read_baseline(self._path)
        if not self._first:
            raise InputError("no benchmark ran, so nothing was compared")
        self._notes.append(
            "judged against a first measurement of this run: that proves the benchmarks and their "
            "repeatability, not the absence of a regression"
        )
        return benchmarking.Baseline({}, installed_versions(), "", self._first)

    def _record_baseline(self, failed: int) -> None:
        if failed or self._problems or not self._measured:
            raise InputError(f"a benchmark failed or none was timed: {self._path} is as it was")
        benchmarking.write_baseline(self._path, self._hardware, self._measured)
        self._notes.append(f"recorded {len(self._measured)} benchmarks in {self._path}; commit it")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table, the notes and the gate's problems."""
        if terminalreporter.config.getoption("collectonly"):
            return
        terminalreporter.section("benchmarks")
        for line in benchmarking.table(self._measured, self._baseline):
            terminalreporter.write_line(line)
        for line in self._notes:
            terminalreporter.write_line(f"note: {line}")
        for line in self._problems:
            terminalreporter.write_line(f"benchmark gate: {line}", red=True)


@pytest.fixture(scope="session")
def reference_workload() -> benchmarking.Workload:
    """The workload every ratio is taken to."""
    return benchmarking.reference_workload()


@pytest.fixture
def benchmark_ratio(
    request: pytest.FixtureRequest, reference_workload: benchmarking.Workload, benchmark: Any
) -> Callable[..., benchmarking.Measurement]:
    """`benchmark_ratio(subject, check)`: check the subject's output, then time it.

    `check` takes what one call of `subject` returns, asserts that it is right and returns the facts
    (precision, agreement, …) that stand in its row. `reference` is a workload that runs elsewhere.
    """

    def time_rounds(
        work: benchmarking.Workload, before_round: Callable[[], None], rounds: int
    ) -> list[float]:
        benchmark.pedantic(work, setup=before_round, rounds=rounds)
        if benchmark.stats is None:
            pytest.fail("pytest-benchmark is switched off: leave --benchmark-disable out")
        return list(benchmark.stats.stats.data)

    gate = request.config.pluginmanager.get_plugin(GATE)
    if not isinstance(gate, BenchmarkGate):
        pytest.fail("benchmark_ratio is for benchmarks/, run with --benchmark")

    def run(
        subject: Callable[[], Any],
        check: Callable[[Any], dict[str, str | float]],
        *,
        reference: benchmarking.Workload = reference_workload,
        rounds: int = benchmarking.ROUNDS,
    ) -> benchmarking.Measurement:
        facts = check(subject())
        measurement = benchmarking.measure(
            subject, reference, rounds=rounds, facts=facts, time_rounds=time_rounds
        )
        benchmark.extra_info.update(facts, ratio=measurement.ratio)
        measured = [measurement]
        if gate.twice:
            measured.append(benchmarking.measure(subject, reference, rounds=rounds, facts=facts))
        gate.record(request.node.nodeid, *measured)
        return measurement

    return run
