"""Image → embedding by TensorRT, of an image on the GPU: every way of compare_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare_gpu import MIN_COSINE, ROWS
from timing.gpu import synchronized
from timing.tensorrt_rows import Workshop

from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import Recipe
from dbsam_deploy.sessions.cuda_graphs import CudaGraphRecorder, RecordedFunction
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.parity import cosine

WAYS = [name for name, row in ROWS.items() if row.engine is not None]
DEVICE = "cuda"


def few_images(recipe: Recipe) -> Recipe:
    """A recipe that finds its ranges on as many images as are bundled."""
    plan = recipe.quantization
    if plan is None or plan.calibration is None:
        return recipe
    few = replace(plan.calibration, images=8, held_back=2)
    return replace(recipe, quantization=replace(plan, calibration=few))


@pytest.fixture(scope="module")
def shop(subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    artefact, folder = subject.artefact, tmp_path_factory.mktemp("engines")
    loaded = load_model(variant=artefact.variant, image_size=artefact.preprocessing.image_size)
    return Workshop(loaded, folder, bundled_examples(), change=few_images)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("way", WAYS)
def test_engine(benchmark_ratio, gpu, shop, subject, pixels, way) -> None:
    row = ROWS[way]
    if way.endswith("plugins") and not shop.library.is_file():
        pytest.skip(f"no plugin library {shop.library}: python -m dbsam_deploy.plugins build")
    expected = subject.pytorch.run("encoder", {"image": pixels})["image_embeddings"]
    image = torch.from_numpy(pixels).to(DEVICE)
    encoder = row.engine(shop, 1)

    def encode(given: torch.Tensor) -> tuple[torch.Tensor]:
        return (encoder(given),)

    recorded = RecordedFunction(encode, CudaGraphRecorder(), device=torch.device(DEVICE))
    call = recorded if row.recorded else encode

    def check(outputs) -> dict[str, str | float]:
        found = cosine(outputs[0].cpu().numpy(), np.asarray(expected))
        assert found >= MIN_COSINE
        return {**subject.facts, "way": way, "dtype": str(row.dtype), "cosine": found}

    benchmark_ratio(synchronized(lambda: call(image)), check, reference=gpu.reference)
