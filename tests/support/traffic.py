"""Requests for masks through TLS and a login, with NVIDIA's own clients."""

from __future__ import annotations

import ssl
from pathlib import Path

import numpy as np
from tritonclient import grpc, http

from dbsam_deploy.core.contract import MASKS, RAW_BOXES, RAW_IMAGE, ensemble_spec

MODEL = ensemble_spec(1).name


def _inputs(module, image: np.ndarray, boxes: np.ndarray) -> list:
    inputs = []
    for spec, array, datatype in ((RAW_IMAGE, image, "UINT8"), (RAW_BOXES, boxes, "FP32")):
        one = module.InferInput(spec.name, list(array.shape), datatype)
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


def masks_over_http(
    url: str, image: np.ndarray, boxes: np.ndarray, certificate: Path, login: str | None
) -> np.ndarray:
    """(N, H, W) uint8 from `https://url`."""
    with http.InferenceServerClient(
        url,
        ssl=True,
        ssl_context_factory=lambda: ssl.create_default_context(cafile=str(certificate)),
    ) as client:
        headers = {"Authorization": login} if login else None
        answer = client.infer(MODEL, _inputs(http, image, boxes), headers=headers)
        return answer.as_numpy(MASKS.name)


def masks_over_grpc(
    url: str, image: np.ndarray, boxes: np.ndarray, certificate: Path, login: str | None
) -> np.ndarray:
    """(N, H, W) uint8 from `url` with TLS."""
    with grpc.InferenceServerClient(url, ssl=True, root_certificates=str(certificate)) as client:
        headers = {"authorization": login} if login else None
        answer = client.infer(MODEL, _inputs(grpc, image, boxes), headers=headers)
        return answer.as_numpy(MASKS.name)
