"""The optional extras of the package: what each is for, its modules, and the line that installs it.

Every message that asks for a package takes its line from here, so that no message names an extra
that pyproject.toml does not have.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """One extra of pyproject.toml.

    Attributes:
        name: as in the brackets after `dbsam-deploy`.
        purpose: what it is for, in a few words.
        distributions: what pip installs for it.
        modules: what Python imports of them.
    """

    name: str
    purpose: str
    distributions: tuple[str, ...]
    modules: tuple[str, ...]


EXTRAS = (
    Extra("cpu", "ONNX Runtime on the CPU", ("onnxruntime",), ("onnxruntime",)),
    Extra(
        "gpu",
        "ONNX Runtime on CUDA, TensorRT",
        ("onnxruntime-gpu", "tensorrt", "pycuda"),
        ("onnxruntime", "tensorrt", "pycuda"),
    ),
    Extra(
        "rtx",
        "TensorRT-RTX engines",
        ("tensorrt-rtx-cu13", "pycuda"),
        ("tensorrt_rtx", "pycuda"),
    ),
    Extra("openvino", "OpenVINO on the CPU", ("openvino",), ("openvino",)),
    Extra(
        "modelopt",
        "Q/DQ by nvidia-modelopt",
        ("nvidia-modelopt", "onnx-graphsurgeon", "onnxslim", "lief", "onnxruntime"),
        ("modelopt",),
    ),
    Extra("client", "client of the Triton server", ("tritonclient",), ("tritonclient.grpc",)),
    Extra("nifti", "NIfTI files", ("nibabel",), ("nibabel",)),
    Extra("dicom", "DICOM files", ("pydicom",), ("pydicom",)),
    Extra("medsam", "MedSAM's preprocessing", ("scikit-image",), ("skimage.transform",)),
    Extra(
        "eval",
        "Dice and NSD, reports",
        ("monai", "scipy", "scikit-image", "matplotlib", "jinja2"),
        ("monai", "scipy.ndimage", "skimage.transform", "matplotlib", "jinja2"),
    ),
    Extra("train", "training", ("accelerate", "tensorboard"), ("accelerate", "tensorboard")),
)
"""Extras for users; `test` and `dev` are for the package's own development."""


def pip_line(extra: str, *more: str) -> str:
    """The command that installs an extra, and further requirements with it.

    >>> pip_line("nifti")
    "pip install 'dbsam-deploy[nifti]'"
    """
    words = (f"dbsam-deploy[{extra}]", *more)
    return "pip install " + " ".join(f"'{word}'" for word in words)


_ONNXRUNTIME_GPU = ("gpu", "onnxruntime-gpu[cuda,cudnn]")
_WITHOUT_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu"
ONNXRUNTIME_GPU_LINE = f"{_WITHOUT_ONNXRUNTIME} && {pip_line(*_ONNXRUNTIME_GPU)}"
"""Both builds share one folder: the GPU build is whole only where the other one is gone first."""

TENSORRT_10 = "tensorrt>=10.16,<11"
ONNXRUNTIME_TENSORRT_LINE = f"{_WITHOUT_ONNXRUNTIME} && {pip_line(*_ONNXRUNTIME_GPU, TENSORRT_10)}"
"""ONNX Runtime's TensorRT provider is built for TensorRT 10, and does not load 11."""

TORCH_GPU_LINE = f"pip uninstall -y torch && {pip_line('gpu')}"
"""A CPU build satisfies the pinned version, so that pip would leave it in place."""

GXX_LINE = "apt-get install g++"
NVCC_LINE = "apt-get install cuda-toolkit-13-0"
"""A package of NVIDIA's own repository; its `bin` folder belongs on the PATH."""
