"""Backends judged from what their runtimes say, machine by machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.diagnosis import probes
from dbsam_deploy.diagnosis.inspections import Answer
from dbsam_deploy.diagnosis.probes import Finding
from dbsam_deploy.extras import NVCC_LINE, TORCH_GPU_LINE, pip_line

NO_GPU = Answer(error="no NVIDIA GPU, or no driver for it")
GPU = Answer({"name": "NVIDIA H200", "target": "sm_90", "cuda": "13.0"})
TORCH_CPU = Answer({"version": "2.13.0+cpu", "cuda": ""})
TORCH_GPU = Answer(
    {"version": "2.13.0", "cuda": "13.0", "device": "NVIDIA H200", "capability": [9, 0]}
)
ORT = Answer({"version": "1.32.0", "offers": ["CPUExecutionProvider"]})
OPENVINO = Answer({"version": "2026.4.1"})
PYCUDA = Answer({"version": "2025.1", "devices": 1})
TRT = Answer({"version": "10.16.1.11", "builder": True})
RTX = Answer({"version": "1.7.1.116", "builder": True})


def absent(module: str) -> Answer:
    return Answer(error=f"{module} is not installed", absent=module)


def no_provider(name: str) -> Answer:
    return Answer(error=f"this onnxruntime has no {name}", install=f"pip install {name}")


@dataclass
class Machine:
    """Answers of one machine; by default one without a GPU, with PyTorch and ONNX Runtime."""

    answers: dict[str, Answer] = field(
        default_factory=lambda: {
            "driver": NO_GPU,
            "torch": TORCH_CPU,
            "onnxruntime": ORT,
            "onnxruntime-cuda": no_provider("CUDAExecutionProvider"),
            "onnxruntime-tensorrt": no_provider("TensorrtExecutionProvider"),
            "openvino": absent("openvino"),
            "tensorrt": absent("tensorrt"),
            "tensorrt_rtx": absent("tensorrt_rtx"),
            "pycuda": absent("pycuda"),
        }
    )

    def __call__(self, question: str) -> Answer:
        return self.answers[question]

    def but(self, **answers: Answer) -> Machine:
        """The same machine with other answers; `_` stands for `-` in `onnxruntime_…`."""
        named = {
            name.replace("_", "-") if name.startswith("onnx") else name: answer
            for name, answer in answers.items()
        }
        return Machine({**self.answers, **named})


CPU = Machine()
FULL = Machine(
    {
        "driver": GPU,
        "torch": TORCH_GPU,
        "onnxruntime": ORT,
        "onnxruntime-cuda": ORT,
        "onnxruntime-tensorrt": ORT,
        "openvino": OPENVINO,
        "tensorrt": TRT,
        "tensorrt_rtx": RTX,
        "pycuda": PYCUDA,
    }
)
ALL = (
    probes.probe_pytorch,
    probes.probe_pytorch_fused,
    probes.probe_onnxruntime,
    probes.probe_onnxruntime_tensorrt,
    probes.probe_tensorrt,
    probes.probe_tensorrt_rtx,
)


@pytest.fixture(autouse=True)
def with_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))


@pytest.mark.parametrize("probe", ALL, ids=lambda probe: probe.__name__)
def test_a_gpu_machine_with_everything(probe: probes.Probe) -> None:
    finding = probe(FULL)
    assert finding.usable
    assert "cuda" in finding.devices
    assert (finding.missing, finding.install) == ("", "")
    assert finding.version


def test_a_cpu_machine() -> None:
    found = {probe.__name__.removeprefix("probe_"): probe(CPU) for probe in ALL}
    assert {name for name, finding in found.items() if finding.usable} == {"pytorch", "onnxruntime"}
    assert all(finding.devices == ("cpu",) for finding in found.values() if finding.usable)
    for finding in found.values():
        assert "no NVIDIA GPU" in finding.missing
    assert found["tensorrt"].install == pip_line("gpu")
    assert found["tensorrt_rtx"].install == pip_line("rtx")
    assert found["onnxruntime_tensorrt"].install == "pip install TensorrtExecutionProvider"
    assert found["pytorch"].install == found["onnxruntime"].install == ""  # no GPU to install for
    for module in ("tensorrt is not installed", "pycuda is not installed"):
        assert module in found["tensorrt"].missing


def test_openvino_runs_on_the_cpu_whatever_the_gpu() -> None:
    for machine in (CPU.but(openvino=OPENVINO), FULL):
        assert probes.probe_openvino(machine) == Finding(True, "2026.4.1", ("cpu",))
    finding = probes.probe_openvino(CPU)
    assert finding == Finding(
        False,
        missing="openvino is not installed",
        install=pip_line("openvino"),
    )


def test_a_cpu_build_of_pytorch_beside_a_gpu() -> None:
    machine = CPU.but(driver=GPU)
    finding = probes.probe_pytorch(machine)
    assert finding == Finding(
        True,
        "2.13.0+cpu",
        ("cpu",),
        "cuda: torch 2.13.0+cpu is a build for the CPU",
        TORCH_GPU_LINE,
    )
    fused = probes.probe_pytorch_fused(machine)
    assert (fused.usable, fused.install) == (False, TORCH_GPU_LINE)


def test_a_driver_too_old_for_pytorch() -> None:
    torch = Answer({"version": "2.13.0", "cuda": "13.0"})
    driver = Answer({**GPU.facts, "cuda": "12.4"})
    finding = probes.probe_pytorch(CPU.but(driver=driver, torch=torch))
    assert (finding.usable, finding.devices, finding.install) == (True, ("cpu",), "")
    assert (
        "for CUDA 13.0 does not use the GPU, whose driver runs CUDA up to 12.4" in finding.missing
    )


def test_a_broken_pytorch() -> None:
    machine = CPU.but(torch=Answer(error="ImportError: libtorch_cpu.so: undefined symbol"))
    for probe in (probes.probe_pytorch, probes.probe_pytorch_fused):
        finding = probe(machine)
        assert not finding.usable
        assert "undefined symbol" in finding.missing
        assert finding.install == pip_line("export")


def test_fused_kernels_need_nvcc_and_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    old = probes.probe_pytorch_fused(FULL.but(driver=Answer({**GPU.facts, "target": "sm_75"})))
    assert (old.usable, old.install) == (False, "")
    assert "the GPU is sm_75, the kernels need sm_80" in old.missing

    def nowhere() -> Path:
        raise EngineError("no nvcc in the PATH")

    monkeypatch.setattr(probes, "find_nvcc", nowhere)
    finding = probes.probe_pytorch_fused(FULL)
    assert (finding.usable, finding.install) == (False, NVCC_LINE)
    assert "no nvcc" in finding.missing


def test_onnxruntime_on_a_gpu_machine_without_its_gpu_build() -> None:
    finding = probes.probe_onnxruntime(CPU.but(driver=GPU))
    assert (finding.usable, finding.devices) == (True, ("cpu",))
    assert finding.missing == "cuda: this onnxruntime has no CUDAExecutionProvider"
    assert finding.install == "pip install CUDAExecutionProvider"


def test_onnxruntime_that_is_not_there() -> None:
    missing = Answer(error="ONNX Runtime is not installed", install="pip install 'x[cpu]'")
    machine = CPU.but(onnxruntime=missing, onnxruntime_cuda=missing, onnxruntime_tensorrt=missing)
    finding = probes.probe_onnxruntime(machine)
    assert finding == Finding(
        False, missing="ONNX Runtime is not installed", install="pip install 'x[cpu]'"
    )
    assert not probes.probe_onnxruntime_tensorrt(machine).usable


def test_a_tensorrt_provider_that_was_dropped() -> None:
    dropped = Answer(error="left TensorrtExecutionProvider out")
    finding = probes.probe_onnxruntime_tensorrt(FULL.but(onnxruntime_tensorrt=dropped))
    assert (finding.usable, finding.missing) == (False, dropped.error)
    assert "tensorrt>=10.16,<11" in finding.install


def test_a_whole_gpu_build_of_onnxruntime_without_a_gpu() -> None:
    refused = Answer(error="TensorrtExecutionProvider needs an NVIDIA GPU")
    machine = FULL.but(driver=NO_GPU, onnxruntime_tensorrt=refused)
    finding = probes.probe_onnxruntime_tensorrt(machine)
    assert finding == Finding(False, "1.32.0", missing=NO_GPU.error)


@pytest.mark.parametrize(
    ("answers", "missing", "install"),
    [
        (
            {"tensorrt": Answer(error="OSError: libnvinfer.so.10")},
            "libnvinfer.so.10",
            pip_line("gpu"),
        ),
        (
            {"tensorrt": Answer({"version": "10.3.0", "builder": True})},
            "10.16 or newer",
            pip_line("gpu"),
        ),
        ({"tensorrt": Answer({"version": "11.4", "builder": False})}, "no builder", ""),
        ({"pycuda": absent("pycuda")}, "pycuda is not installed", pip_line("gpu")),
        ({"driver": NO_GPU}, "no NVIDIA GPU", ""),
    ],
    ids=["broken", "old", "no builder", "no pycuda", "no gpu"],
)
def test_tensorrt(answers: dict[str, Answer], missing: str, install: str) -> None:
    finding = probes.probe_tensorrt(FULL.but(**answers))
    assert not finding.usable
    assert missing in finding.missing
    assert install in finding.install
    assert bool(install) == bool(finding.install)


def test_tensorrt_rtx_builds_without_a_gpu_but_does_not_run() -> None:
    finding = probes.probe_tensorrt_rtx(FULL.but(driver=NO_GPU))
    assert (finding.usable, finding.version, finding.install) == (False, "1.7.1.116", "")
    assert "engines can be built here, but not run" in finding.missing


def test_pycuda_without_a_gpu_says_nothing_more_than_the_driver() -> None:
    machine = FULL.but(driver=NO_GPU, pycuda=Answer(error="pycuda: cuInit failed"))
    assert probes.probe_tensorrt(machine).missing == NO_GPU.error
    machine = FULL.but(pycuda=Answer(error="pycuda: compiled for another CUDA"))
    assert "compiled for another CUDA" in probes.probe_tensorrt(machine).missing


def test_a_tensorrt_without_a_version() -> None:
    finding = probes.probe_tensorrt(FULL.but(tensorrt=Answer({"version": "", "builder": True})))
    assert not finding.usable
    assert "10.16 or newer" in finding.missing
