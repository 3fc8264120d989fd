"""NVRTC, which compiles the kernels where there is no nvcc: the same kernels as nvcc's."""

import re
from pathlib import Path

import pytest

from dbsam_deploy.core.errors import EngineError, MissingError
from dbsam_deploy.extras import NVRTC_LINE
from dbsam_deploy.kernels import nvrtc, toolkit
from dbsam_deploy.kernels.build import ResourceUsage, usage_of
from dbsam_deploy.kernels.nvrtc import compile_source, entry_names, find_nvrtc, source_ptx
from dbsam_deploy.kernels.quick_sources import (
    channel_attention_source,
    depthwise_conv_gelu_source,
    ms_deform_attn_source,
    read_launches,
    rel_pos_attention_source,
    windowed_attention_source,
)


def sources(element: str) -> dict[str, str]:
    """`db_sam`'s calls."""
    maps = {"level_shapes": [64, 64], "query_shapes": [64, 64]}
    sizes = {"batch": 1, "height": 64, "width": 64, "channels": 768, "reduced": 48}
    return {
        "ms_deform_attn": ms_deform_attn_source(
            element, num_heads=12, head_dim=64, num_points=4, **maps
        ),
        "rel_pos_attention": rel_pos_attention_source(element, num_heads=12, side=64, scale=0.125),
        "channel_attention": channel_attention_source(element, **sizes),
        "depthwise_conv_gelu": depthwise_conv_gelu_source(
            element, height=64, width=64, channels=3072
        ),
        "windowed_attention": windowed_attention_source(
            element, num_heads=12, side=14, scale=0.125, height=64, width=64
        ),
    }


OPERATORS = sorted(sources("float16"))
NVCCS = "channel_attention"
"""Compiled by nvcc too in every run: it has the most kernels; the others with `--slow`."""


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "element", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_compiles_and_fits(operator: str, element: str) -> None:
    made = compile_source(sources(element)[operator], "sm_90")
    launches, workspace = read_launches(made.ptx)
    assert made.cubin.startswith(b"\x7fELF")
    assert re.search(r"^\.target sm_90", made.ptx, re.M)
    assert len(made.usage) == len(launches) == len(entry_names(made.ptx))
    assert (workspace > 0) == (operator == "channel_attention")
    for usage in made.usage:
        assert 0 < usage.registers <= 255
        assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)


@pytest.mark.nvrtc
@pytest.mark.nvcc
@pytest.mark.parametrize(
    "operator",
    [name if name == NVCCS else pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS],
)
def test_they_are_nvccs_kernels(operator: str, tmp_path: Path) -> None:
    """The same kernels with the same shared memory; registers differ between releases of ptxas."""
    source = sources("float16")[operator]
    path = tmp_path / "quick.cu"
    path.write_text(source)
    theirs = {usage.kernel: usage for usage in usage_of(path, "sm_90")}
    ours = {usage.kernel: usage for usage in compile_source(source, "sm_90").usage}
    assert ours.keys() == theirs.keys()
    for name, usage in ours.items():
        assert _fixed(usage) == _fixed(theirs[name])
        assert abs(usage.registers - theirs[name].registers) <= 8, (usage, theirs[name])


def _fixed(usage: ResourceUsage) -> tuple[int, int, int]:
    return usage.shared_bytes, usage.stack_bytes, usage.spill_bytes


@pytest.fixture
def no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise EngineError("no nvcc")

    monkeypatch.setattr(toolkit, "find_nvcc", nowhere)


@pytest.mark.nvrtc
@pytest.mark.usefixtures("no_nvcc")
def test_a_quick_plugin_is_compiled_by_it_where_there_is_no_nvcc() -> None:
    ptx = source_ptx(sources("float16")["ms_deform_attn"], "sm_80")
    assert re.search(r"^\.target sm_80", ptx, re.M)
    assert entry_names(ptx) == ["dbsam_quick"]
    (launch,), _ = read_launches(ptx)
    assert (launch.blocks, launch.threads) == ((12, 64), 256)


@pytest.mark.nvrtc
def test_a_refused_source_is_shown() -> None:
    with pytest.raises(EngineError, match=r"NVRTC \d+\.\d+ refuses a kernel: ") as caught:
        compile_source("__global__ void broken( {}", "sm_90")
    assert any("kernels.cu(1): error" in line for line in caught.value.details)


@pytest.fixture
def looked_for_again():
    find_nvrtc.cache_clear()
    yield
    find_nvrtc.cache_clear()


@pytest.mark.usefixtures("looked_for_again")
def test_without_it_the_line_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_LIBRARIES", ("libno-nvrtc.so",))
    with pytest.raises(MissingError, match=r"no NVRTC, which compiles .* no nvcc") as caught:
        find_nvrtc()
    assert caught.value.install == NVRTC_LINE


@pytest.mark.nvrtc
@pytest.mark.usefixtures("looked_for_again")
def test_without_cudas_headers_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_header_folders", lambda: iter(()))
    with pytest.raises(MissingError, match=r"NVRTC .* is here, CUDA's cuda_fp16\.h is not"):
        find_nvrtc()
