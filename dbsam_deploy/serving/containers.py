"""NVIDIA's Triton containers: which release carries which TensorRT and CUDA.

A plan runs under the TensorRT that built it and no other, so the plan chooses the container. The
table was written without one of these images at hand: CUDA is from NVIDIA's release notes of Triton
(`rel-26-08` and so on), TensorRT from where `Container.source` says. `deployment/Dockerfile`
compares the image's own `TRT_VERSION` with the version asked for and refuses to build on another,
so a wrong row stops a build and never reaches a server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.errors import InputError

REGISTRY_IMAGE = "nvcr.io/nvidia/tritonserver"
OLDEST_RELEASE = "25.07"
"""Older servers end on a chunked HTTP body of many small chunks; none may face a network."""


@dataclass(frozen=True)
class Container:
    """One release of the server's container.

    Attributes:
        release: year and month, as in the image's tag.
        tensorrt: its TensorRT, all four parts.
        cuda: its CUDA.
        source: where `tensorrt` was read; none of it was seen in the image by this project.
    """

    release: str
    tensorrt: str
    cuda: str
    source: str

    @property
    def image(self) -> str:
        """The image with all backends and Python."""
        return f"{REGISTRY_IMAGE}:{self.release}-py3"


_SAME_RELEASE = "reported for NVIDIA's {} container of the same release"
CONTAINERS = (
    Container("26.03", "10.16.0.72", "13.2.0", _SAME_RELEASE.format("TensorRT")),
    Container("26.05", "10.16.1.11", "13.2.1", _SAME_RELEASE.format("PyTorch")),
    Container("26.06", "11.0.0.114", "13.3.0", _SAME_RELEASE.format("TensorRT")),
    Container("26.07", "11.1.0.106", "13.3.1", "reported as TRT_VERSION of this image"),
    Container("26.08", "11.2.1.2", "13.4.1", _SAME_RELEASE.format("TensorRT")),
)
"""Releases whose TensorRT is known and takes our plans (10.16 or newer), oldest first."""
UNKNOWN_RELEASES = ("26.04", "26.09", "26.10")
"""Releases that exist, of whose TensorRT nothing was found."""
FOR_ONNX = CONTAINERS[-1]
"""For a repository without plans, which asks for no TensorRT."""


def container_for(
    tensorrt_version: str, *, cuda: str = "", version_compatible: bool = False
) -> Container:
    """The container that runs a plan.

    Args:
        tensorrt_version: version that built it ("11.1.0.106"); fewer parts take the newest fit.
        cuda: CUDA version of its builder ("13" or more parts), "" if it does not matter.
        version_compatible: the plan brings code for newer releases of the same major version.

    Raises:
        InputError: no version, or no release that is known to carry it.
    """
    wanted = re.fullmatch(r"(\d+(\.\d+){0,3})(\.post\d+)?", tensorrt_version)
    if wanted is None:
        raise InputError(
            f"TensorRT version {tensorrt_version!r}: expected numbers like 11.1.0.106, as in the "
            "manifest beside the plan"
        )
    fitting = [
        one
        for one in CONTAINERS
        if _runs(one.tensorrt, wanted[1], version_compatible)
        and (not cuda or one.cuda.split(".")[0] == cuda.split(".")[0])
    ]
    if fitting:
        return fitting[-1]
    known = ", ".join(f"{one.tensorrt} ({one.release})" for one in CONTAINERS)
    with_cuda = f" with CUDA {cuda}" if cuda else ""
    raise InputError(
        f"no Triton container is known for a plan of TensorRT {tensorrt_version}{with_cuda}: known "
        f"are {known}; build the plan with one of these, or try "
        f"{', '.join(UNKNOWN_RELEASES)}: `docker run --rm {REGISTRY_IMAGE}:26.10-py3 printenv "
        "TRT_VERSION` tells what an image has"
    )


def _runs(carried: str, wanted: str, version_compatible: bool) -> bool:
    has, asked = (tuple(map(int, version.split("."))) for version in (carried, wanted))
    if version_compatible:
        return has[0] == asked[0] and has >= asked
    return has[: len(asked)] == asked
