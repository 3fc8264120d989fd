"""CUDA's errors by name: the table is the toolkit's, and a library's log is understood."""

import re

import pytest

from dbsam_deploy.kernels.toolkit import find_nvcc
from dbsam_deploy.machine.cuda_errors import _ERRORS, cuda_error, explained


@pytest.mark.nvcc
def test_the_names_are_those_of_the_toolkit() -> None:
    toolkit = find_nvcc().resolve().parents[1]
    headers = [*toolkit.rglob("driver_types.h")]
    if not headers:
        pytest.skip(f"no driver_types.h below {toolkit}")
    text = headers[0].read_text()
    numbers = {int(n): name for name, n in re.findall(r"(cudaError\w+)\s*=\s*(\d+)", text)}
    assert {number: name for number, (name, _) in _ERRORS.items()}.items() <= numbers.items()


def test_an_old_driver_is_said_to_be_one() -> None:
    message = cuda_error(35)
    assert message.startswith("CUDA error 35 (cudaErrorInsufficientDriver: the driver is older")
    assert "nvidia-smi" in message


@pytest.mark.parametrize(
    "text",
    [
        "CUDA initialization failure with error: 35",
        "its process ended with status 1: CUDA error 35 for 1-th ConditionalTacticValue.",
    ],
)
def test_a_librarys_message_is_explained(text: str) -> None:
    assert explained(text).startswith(f"{text} (cudaErrorInsufficientDriver: the driver is older")


@pytest.mark.parametrize("text", ["no CUDA here", "error: 35", "CUDA error: 77777"])
def test_what_names_no_error_of_cudas_stays_as_it_is(text: str) -> None:
    assert explained(text) == text
