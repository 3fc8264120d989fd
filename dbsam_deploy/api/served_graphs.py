"""What a server on a CPU runs: the runtime is chosen and its graphs compiled before it starts.

Both take memory that a process keeps, and `serve` stays with its server; so a process of its own
does it. What it compiles is kept, as `predict` keeps it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..artefact import Artefact, read_artefact
from ..cli import HelpFormatter, Parser, run, say_on_stderr
from ..core.errors import EngineError
from ..extras import require
from ..machine.child_process import run_python
from ..serving.compiled import CompiledGraphs, KeptPart
from ..sessions.backends import AUTO, ModelOptions, find_backend
from ..sessions.trial_records import Record, Trial, find_record

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
SERVED_BACKENDS = (ONNXRUNTIME, OPENVINO, AUTO)
"""Values of `serve --backend`; the names are `predict`'s."""

DESCRIPTION = """\
Choose the runtime of an export and compile its graphs; python -m dbsam_deploy.serve runs this in
a process of its own. The answer is JSON.

examples:
  what would be served
    python -m dbsam_deploy.api.served_graphs --artefact build/fp16 --backend auto --answer a.json
"""


def served_graphs(
    backend: str, folder: Path, check_server: Callable[[], None], say: Callable[[str], None]
) -> CompiledGraphs | None:
    """What a server's stand-ins run in place of an export's ONNX files.

    `openvino` computes in float32, as `predict` does unless it is told otherwise; `auto` takes what
    was measured on this machine, now if nothing was.

    Args:
        backend: one of `SERVED_BACKENDS`.
        folder: the export.
        check_server: raises where the server cannot run OpenVINO.
        say: told what is done, and what was chosen.

    Returns:
        None where ONNX Runtime runs the ONNX files.

    Raises:
        InputError: an export that is missing or changed.
        EngineError: OpenVINO is missing here, `check_server` raised, a graph cannot be compiled, or
            what was asked for is known to miss the export's gate.
    """
    if backend == ONNXRUNTIME:
        return None
    artefact = read_artefact(folder)
    if backend == OPENVINO:
        require("openvino", extra="openvino", what_for="an export on OpenVINO")
        check_server()
        _refuse_missed(artefact)
    else:
        record = find_record(artefact)
        if find_spec(OPENVINO) if record is None else record.chosen.backend == OPENVINO:
            check_server()
        if record is None:
            say(f"trying the runtimes of this machine on {folder}, once: ten seconds or more")
    told = _ask_worker(folder, backend)
    if told["backend"] == ONNXRUNTIME:
        say(f"{AUTO}: graphs run on ONNX Runtime ({told['verdict']})")
        return None
    parts = {
        graph: [KeptPart(Path(part["path"]), part["settings"]) for part in found]
        for graph, found in told["graphs"].items()
    }
    compiled = CompiledGraphs(told["runtime"], told["verdict"], told["openvino"], parts)
    say(f"graphs run on {compiled.note}")
    return compiled


def _refuse_missed(artefact: Artefact) -> None:
    trial = _float32(find_record(artefact))
    if trial is not None and trial.missed:
        raise EngineError(
            f"{artefact.folder} on OpenVINO in float32 {trial.verdict} on this machine: drop "
            f"--backend, or take --backend {AUTO}"
        )


def _float32(record: Record | None) -> Trial | None:
    return None if record is None else record.of(OPENVINO, "float32")


def _ask_worker(folder: Path, backend: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        words = ["--artefact", str(folder), "--backend", backend, "--answer", str(answer)]
        ended = run_python(["-m", __name__, *words])
        if ended.status:
            raise EngineError(ended.reason())
        body: dict[str, Any] = json.loads(answer.read_text())
    return body


def choose_and_compile(backend: str, folder: Path) -> dict[str, Any]:
    """Choose a runtime and compile an export's graphs for it, each for one image.

    Returns:
        `backend` and `verdict`; of OpenVINO `runtime`, `openvino` and `graphs`, too, see
        `serving.compiled.CompiledGraphs`.

    Raises:
        InputError, EngineError: see `served_graphs`.
    """
    from ..sessions.openvino_session import OpenvinoSession, import_openvino

    artefact = read_artefact(folder)
    options = ModelOptions(backend=OPENVINO, artefact=folder)
    if backend == AUTO:
        from ..verification.runtimes import Place, runtime_record

        trial: Trial | None = runtime_record(artefact, Place(), say_on_stderr).chosen
    else:
        trial = _float32(find_record(artefact))
    if trial is not None and trial.backend == ONNXRUNTIME:
        return {"backend": ONNXRUNTIME, "verdict": trial.verdict}
    if trial is not None:
        options = replace(options, runtime_precision=trial.runtime_precision)
    session = find_backend(OPENVINO).open(options, "cpu").session
    if not isinstance(session, OpenvinoSession):
        raise TypeError(f"{session.backend} is no session of OpenVINO")
    return {
        "backend": OPENVINO,
        "runtime": session.backend,
        "verdict": trial.verdict
        if trial and trial.passes
        else "not compared with PyTorch on this machine",
        "openvino": import_openvino().__version__,
        "graphs": {
            graph: [
                {"path": str(part.path.absolute()), "settings": part.settings}
                for part in session.compiled(graph)
            ]
            for graph in artefact.graphs
        },
    }


def _parser() -> Parser:
    parser = Parser(
        prog="python -m dbsam_deploy.api.served_graphs",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--artefact", type=Path, required=True, help="folder of an export")
    parser.add_argument("--backend", choices=(OPENVINO, AUTO), required=True, help="as of `serve`")
    parser.add_argument("--answer", type=Path, required=True, help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the answer; returns 0."""
    args: argparse.Namespace = _parser().parse_args(argv)
    args.answer.write_text(json.dumps(choose_and_compile(args.backend, args.artefact)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
