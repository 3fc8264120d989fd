"""Which runtime `--backend auto` takes: the quickest of those that keep the export's gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.trial_records import find_record
from dbsam_deploy.verification import runtimes
from dbsam_deploy.verification.answers import read_answers
from dbsam_deploy.verification.runtimes import Place, agreement, runtime_record, try_runtimes


class Bent:
    """ONNX Runtime with the signs of some graphs' outputs turned round."""

    backend = "bent"

    def __init__(self, artefact: Artefact, *graphs: str) -> None:
        self.session, self.graphs = OnnxRuntimeSession(artefact), graphs

    def run(self, graph: str, feed: Any) -> Any:
        found = self.session.run(graph, feed)
        bent = {name: -array for name, array in found.items() if graph in self.graphs}
        return {**found, **bent}


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    """Puts sessions in OpenVINO's place: runtime precision → the graphs that it gets wrong."""

    def start(**wrong: tuple[str, ...] | Exception) -> None:
        def open_one(artefact: Artefact, place: Place, backend: str, precision: Any) -> Any:
            graphs = wrong.get((precision or "").replace("-", "_"), ())
            if isinstance(graphs, Exception):
                raise graphs
            return Bent(artefact, *graphs)

        def quicker(work: Any) -> float:
            """Each candidate takes half of what the one before took."""
            times.append(times[-1] / 2)
            return times[-1]

        times = [1e6]
        monkeypatch.setattr(runtimes, "_open", open_one)
        monkeypatch.setattr(runtimes, "_ms", quicker)
        monkeypatch.setattr(runtimes, "has_bfloat16", lambda text: True)

    return start


def test_each_graph_is_held_against_its_own_masks(answered: Artefact) -> None:
    answers, gate = read_answers(answered), load_recipe("fp32").gate
    own = agreement(OnnxRuntimeSession(answered), answered, answers, gate)
    assert own.missed == {"encoder": "", "decoder": "", "prompt_decoder": ""}
    assert own.text.startswith("cosine 1.00000, boxes 1.0000 / 1.0000, prompts 1.0000 / 0.999")
    for graph in ("decoder", "prompt_decoder"):
        found = agreement(Bent(answered, graph), answered, answers, gate)
        assert [name for name, missed in found.missed.items() if missed] == [graph]
        assert "(wanted 0.9991 / 0.991)" in found.missed[graph]  # of 0.999 and 0.99, with a margin
    found = agreement(Bent(answered, "encoder"), answered, answers, gate)
    assert found.missed["encoder"] == "cosine -1.00000 (wanted 0.999991)"


@pytest.mark.parametrize(("floor", "misses"), [(-0.05, True), (-0.2, False)])
def test_of_what_a_gate_lets_be_lost_a_tenth_is_left(answered: Artefact, floor, misses) -> None:
    """Turned masks agree by 0: more than -0.05, whose loss with a margin ends at 0.055."""
    gate = dataclasses.replace(
        load_recipe("fp32").gate, mask_agreement_mean=floor, mask_agreement_p5=-1.0, dice_drop=2.0
    )
    found = agreement(Bent(answered, "decoder"), answered, read_answers(answered), gate)
    assert "boxes 0.0" in found.text
    assert bool(found.missed["decoder"]) == misses


def test_the_quickest_that_keeps_the_gate_is_taken(answered: Artefact, play) -> None:
    play(bfloat16=("decoder",))
    record = try_runtimes(answered, Place())
    assert [trial.passes for trial in record.trials] == [True, False, True, False]
    assert record.chosen.name == "openvino, bfloat16-decoders"
    assert record.chosen.lowered == ("decoder", "prompt_decoder")
    assert record.trials[3].verdict.startswith("misses its gate: boxes 0.")
    assert "slower than the choice" in record.trials[1].verdict
    whole = try_runtimes(answered, Place(), every=True)
    assert [trial.passes for trial in whole.trials] == [True, True, True, False]


def test_only_decoders_that_keep_the_gate_are_lowered(answered: Artefact, play) -> None:
    play(bfloat16=("encoder", "decoder"), bfloat16_decoders=("prompt_decoder",))
    chosen = try_runtimes(answered, Place()).chosen
    assert chosen.lowered == ("decoder",)
    assert "; float32 for prompts 0." in chosen.verdict
    slower = try_runtimes(answered, Place(), every=True).trials[3]
    assert slower.verdict.startswith("misses its gate: cosine -1.00000")


def test_what_cannot_be_compared_is_not_taken(answered: Artefact, play) -> None:
    play()
    record = try_runtimes(dataclasses.replace(answered, answers=None), Place())
    assert record.chosen.backend == "onnxruntime"
    assert all("keeps no masks of PyTorch" in trial.verdict for trial in record.trials[1:])


def test_what_does_not_open_is_a_row(answered: Artefact, play, monkeypatch) -> None:
    missing = EngineError("no OpenVINO here")
    play(float32=missing, bfloat16=missing)
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda text: False)
    record = try_runtimes(answered, Place())
    assert record.trials[1].verdict == "no OpenVINO here"
    assert "no instructions for bfloat16" in record.trials[2].verdict
    assert record.chosen.backend == "onnxruntime"


def test_a_record_is_measured_once(answered: Artefact, play) -> None:
    play()
    said: list[str] = []
    first = runtime_record(answered, Place(), said.append)
    assert said[0].startswith("trying the runtimes of this machine on ")
    assert runtime_record(answered, Place(), said.append) == first == find_record(answered)
    assert len(said) == 2
    runtime_record(answered, Place(), said.append, again=True)
    whole = runtime_record(answered, Place(), said.append, every=True)
    assert (whole.every, len(said)) == (True, 6)
    assert runtime_record(answered, Place(), said.append) == whole


def test_a_damaged_record_is_said_and_measured_again(answered: Artefact, play) -> None:
    play()
    said: list[str] = []
    first = runtime_record(answered, Place(), said.append)
    (path,) = (answered.folder / "trials").iterdir()
    path.write_text(path.read_text().replace("onnxruntime", "openvino"))
    assert runtime_record(answered, Place(), said.append).chosen.backend == first.chosen.backend
    assert "was edited" in said[2]


@pytest.mark.openvino
def test_real_runtimes(answered: Artefact, tmp_path: Path) -> None:
    """These graphs take coordinates as no SAM does, which bfloat16 refuses to round."""
    record = try_runtimes(answered, Place(engine_cache=tmp_path / "cache"), every=True)
    one, two, *lowered = record.trials
    assert (one.verdict, one.passes, two.passes) == ("the export's own gate", True, True)
    assert min(one.encoder_ms, one.box_ms, two.eight_ms) > 0
    assert {trial.passes for trial in lowered} == {False}
    assert np.isfinite(record.chosen.total_ms)
