"""The plan chooses the container: exact versions, CUDA, and what is said where none is known."""

import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.engines.kinds import TENSORRT, check_version
from dbsam_deploy.serving.containers import (
    CONTAINERS,
    FOR_ONNX,
    OLDEST_RELEASE,
    UNKNOWN_RELEASES,
    container_for,
)


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda one: one.release)
def test_a_plan_gets_the_container_of_its_own_tensorrt(container):
    assert container_for(container.tensorrt) is container
    assert container.image == f"nvcr.io/nvidia/tritonserver:{container.release}-py3"


def test_every_row_takes_our_plans_and_survives_chunked_bodies():
    for one in CONTAINERS:
        check_version(TENSORRT, one.tensorrt)
        assert one.release >= OLDEST_RELEASE
        assert one.source
    releases = [one.release for one in CONTAINERS]
    assert releases == sorted(set(releases))
    assert not set(releases) & set(UNKNOWN_RELEASES)
    versions = [tuple(map(int, one.tensorrt.split("."))) for one in CONTAINERS]
    assert versions == sorted(set(versions)), "a newer release carries a newer TensorRT"
    assert FOR_ONNX.release == max(releases)


def test_fewer_parts_take_the_newest_that_fits():
    assert container_for("10.16").tensorrt == "10.16.1.11"
    assert container_for("11.1").release == "26.07"
    assert container_for("10.16.1.11.post1").release == "26.05"  # as NVIDIA names some wheels


def test_a_version_compatible_plan_takes_a_newer_release_of_its_major_version():
    assert container_for("10.16.0.1", version_compatible=True).tensorrt == "10.16.1.11"
    assert container_for("11.0.0.114", version_compatible=True) is CONTAINERS[-1]
    with pytest.raises(InputError, match=r"11\.99"):
        container_for("11.99.0.1", version_compatible=True)


def test_cuda_must_be_of_the_same_major_version():
    assert container_for("11.1.0.106", cuda="13").cuda.startswith("13.")
    with pytest.raises(InputError, match="with CUDA 12"):
        container_for("11.1.0.106", cuda="12.9")


@pytest.mark.parametrize("version", ["11.1.0.107", "11.10", "1", "8.6.1.6", "11.2.1.20"])
def test_another_version_is_refused_with_what_is_known(version):
    with pytest.raises(InputError, match=r"known are 10\.16\.0\.72 \(26\.03\)") as caught:
        container_for(version)
    assert "TRT_VERSION" in str(caught.value)


@pytest.mark.parametrize("version", ["", "eleven", "11.1.0.106+cuda13", "11..1", "1.2.3.4.5"])
def test_what_is_no_version_is_refused(version):
    with pytest.raises(InputError, match=r"expected numbers like"):
        container_for(version)
