"""Runs an artefact's engines through their gate on this GPU, and signs the manifests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..artefact import Artefact
from ..engines.device import Gpu
from ..engines.kinds import TENSORRT, TENSORRT_RTX, Kind
from ..engines.layers import check_plugins, read_attention, read_layers
from ..engines.manifest import EngineRecord, PassedGate, engine_folder, read_records, sign
from ..recipe import Gate
from ..sessions.engine_session import EngineSession, TensorrtRtxSession, TensorrtSession
from ..sessions.session import Session
from .cases import Case
from .parity import check_gate, compare

# TensorRT-RTX runs a shape with general kernels until special ones are compiled; both serve users,
# so both are measured. CUDA graphs are recorded and replayed in every way.
_WAYS: dict[str, dict[str, Callable[..., EngineSession]]] = {
    TENSORRT.name: {"default": TensorrtSession},
    TENSORRT_RTX.name: {
        "general kernels": partial(TensorrtRtxSession, specialization="none"),
        "special kernels": partial(TensorrtRtxSession, specialization="eager"),
    },
}


def unverified_here(records: Mapping[str, EngineRecord], gpu: Gpu | None) -> bool:
    """Whether this machine's GPU can run the engines and has not verified them yet."""
    if gpu is None or any(gpu.target not in record.targets for record in records.values()):
        return False
    return any(gpu.target not in (record.parity or {}) for record in records.values())


def verify_engines(
    artefact: Artefact,
    kind: Kind,
    reference: Session,
    cases: list[Case],
    gate: Gate,
    *,
    progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> dict[str, EngineRecord]:
    """Compare every way in which the engines may run here with PyTorch; sign them if all pass.

    Args:
        artefact: a published export with engines of this kind.
        kind: which engines.
        reference: PyTorch on the artefact's weights.
        cases: real images with boxes and truth.
        gate: the floor of the artefact's recipe.
        progress: called with each case's name once it is done.
        **options: `device` and `runtime`, see `EngineSession`.

    Returns:
        Graph → signed manifest.

    Raises:
        AccuracyError: a figure misses the gate; the manifests are left as they were.
        EngineError: the engines cannot be run here, or fused operators did not become plugins.
    """
    figures: dict[str, dict[str, Any]] = {}
    for way, open_session in _WAYS[kind.name].items():
        session = open_session(artefact, verified=False, **options)
        try:
            found = compare(reference, session, artefact.preprocessing, cases, progress=progress)
            what = f"{kind.title} {artefact.precision} {artefact.variant} on {session.gpu.name}"
            check_gate(found, gate, what)
            records = {graph: _inspected(artefact, session, graph) for graph in artefact.graphs}
            figures[way], gpu = found.as_dict(), session.gpu
        finally:
            session.close()
    plans = {graph: record.plan.sha256 for graph, record in records.items()}
    parity = PassedGate(gpu=gpu, figures=figures, gate=asdict(gate), plans=plans)
    sign(engine_folder(artefact, kind), records, parity)
    return read_records(artefact, kind)


def _inspected(artefact: Artefact, session: EngineSession, graph: str) -> EngineRecord:
    """A graph's manifest with what the builder made of it."""
    record = session.records[graph]
    attention = read_attention(artefact.path(graph))
    if record.flags.quick_plugins:
        attention = attention.of_quick_plugins()
    report = read_layers(session.layers(graph), attention)
    if record.plugins is not None or record.flags.quick_plugins:
        check_plugins(report, record.plan.file)
    return replace(record, layers=report.as_dict())
