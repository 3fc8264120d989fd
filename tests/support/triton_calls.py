"""Requests to a Triton server without this library's client, which would check and retry."""

from __future__ import annotations

import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import np_to_triton_dtype

Answer = dict[str, np.ndarray]


def ask(
    url: str,
    arrays: dict[str, Any],
    outputs: tuple[str, ...] = (),
    *,
    model: str = "dbsam_interactive",
    transport: str = "grpc",
    timeout_us: int | None = None,
    client_timeout_s: float | None = None,
) -> Answer:
    """One request by a client of its own; what Triton says of it is raised."""
    library: Any = grpc if transport == "grpc" else http
    inputs = []
    for name, value in arrays.items():
        array = np.asarray(value)
        inputs.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    wanted = [library.InferRequestedOutput(name) for name in outputs] or None
    waiting = {"client_timeout": client_timeout_s} if transport == "grpc" else {}
    client = library.InferenceServerClient(url)
    try:
        found = client.infer(model, inputs, outputs=wanted, timeout=timeout_us, **waiting)
        if transport == "grpc":
            names = [item.name for item in found.get_response().outputs]
        else:
            names = [item["name"] for item in found.get_response()["outputs"]]
        return {name: np.array(found.as_numpy(name)) for name in names}
    finally:
        client.close()


def metrics(url: str) -> dict[str, float]:
    """The front model's metrics by name."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line.startswith("dbsam_"))
    return {name.split("{")[0]: float(value) for name, value in rows}
