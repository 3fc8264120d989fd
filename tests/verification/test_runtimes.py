"""Which runtime `--backend auto` takes: the quickest of those that keep the export's gate."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.errors import CacheError, EngineError
from dbsam_deploy.core.graph_imaging import encoder_feed
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession
from dbsam_deploy.sessions.trial_records import OUT_OF_TIME, find_record
from dbsam_deploy.verification import references, runtimes
from dbsam_deploy.verification.agreement import agreement
from dbsam_deploy.verification.answers import read_answers
from dbsam_deploy.verification.runtimes import BUDGET_S, Place, runtime_record, try_runtimes

AMX, AVX512 = "flags : avx512_bf16 amx_bf16", "flags : avx512_bf16"


class Clock:
    """Time that passes only where a session says so."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Bent:
    """ONNX Runtime with the signs of some graphs' outputs turned round.

    Args:
        artefact: what is opened.
        graphs: whose signs are turned.
        seconds: that each run takes by `clock`.
        clock: see `Clock`.
    """

    backend = "bent"

    def __init__(
        self, artefact: Artefact, *graphs: str, seconds: float = 0.0, clock: Clock | None = None
    ) -> None:
        self.session, self.graphs = OnnxRuntimeSession(artefact), graphs
        self.seconds, self.clock, self.asked = seconds, clock or Clock(), Counter[str]()

    def run(self, graph: str, feed: Any) -> Any:
        self.clock.seconds += self.seconds
        self.asked[graph] += 1
        found = self.session.run(graph, feed)
        bent = {name: -array for name, array in found.items() if graph in self.graphs}
        return {**found, **bent}


@dataclasses.dataclass
class Played:
    """What `play` puts in the runtimes' place.

    Attributes:
        clock: tells how long they took.
        seconds: runtime precision, None for the default → what each run takes.
        wrong: runtime precision → the graphs that it gets wrong, or why it does not open.
        opened: runtime precision → the session.
    """

    clock: Clock
    seconds: dict[str | None, float]
    wrong: dict[str | None, tuple[str, ...] | Exception]
    opened: dict[str | None, Bent] = dataclasses.field(default_factory=dict)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    """Puts sessions in the runtimes' place, see `Played`; bfloat16 is the quickest by default.

    The processor has AMX.
    """

    def start(**words: tuple[str, ...] | Exception | float) -> Played:
        clock = Clock()
        keys = {word: word.replace("_", "-") for word in words}
        played = Played(
            clock,
            {None: 4.0, "float32": 3.0, "bfloat16-decoders": 2.0, "bfloat16": 1.0},
            {keys[w]: value for w, value in words.items() if not isinstance(value, float)},
        )
        played.seconds |= {keys[w]: value for w, value in words.items() if isinstance(value, float)}

        def open_one(artefact: Artefact, place: Place, backend: str, precision: Any) -> Any:
            graphs = played.wrong.get(precision, ())
            if isinstance(graphs, Exception):
                raise graphs
            session = Bent(artefact, *graphs, seconds=played.seconds[precision], clock=clock)
            played.opened[precision] = session
            return session

        monkeypatch.setattr(runtimes, "_open", open_one)
        monkeypatch.setattr(runtimes, "time", clock)
        monkeypatch.setattr(references, "time", clock)
        monkeypatch.setattr(runtimes, "cpuinfo", lambda: AMX)
        return played

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
    played = play(bfloat16=("decoder",))
    tried = try_runtimes(answered, Place())
    assert [trial.passes for trial in tried.record.trials] == [True, False, True, False]
    chosen = tried.record.chosen
    assert (chosen.name, chosen.lowered) == (
        "openvino, bfloat16-decoders",
        ("decoder", "prompt_decoder"),
    )
    assert tried.session is played.opened["bfloat16-decoders"]
    assert tried.record.trials[3].verdict.startswith("misses its gate: boxes at most 0.")
    assert "not tried, since" in tried.record.trials[1].verdict
    assert "float32" not in played.opened
    whole = try_runtimes(answered, Place(), every=True).record
    assert [trial.passes for trial in whole.trials] == [True, True, True, False]
    assert whole.trials[3].verdict.startswith("misses its gate: boxes 0.")
    assert whole.chosen == chosen


def test_each_image_is_encoded_once_for_each_kind_of_encoder(answered: Artefact, play) -> None:
    played = play()
    try_runtimes(answered, Place(), every=True)
    asked = {precision: session.asked["encoder"] for precision, session in played.opened.items()}
    assert asked == {None: 2, "bfloat16": 2, "bfloat16-decoders": 2, "float32": 0}
    hurried = play()
    try_runtimes(answered, Place())
    assert hurried.opened[None].asked["encoder"] == 1


def test_once_one_keeps_its_gate_others_are_tried_while_there_is_time(answered, play) -> None:
    played, said = play(), []
    record = runtime_record(answered, Place(), said.append)
    assert record.seconds > BUDGET_S
    assert list(played.opened) == [None, "bfloat16"]
    assert record.chosen.name == "openvino, bfloat16"
    assert [trial.name for trial in record.untried] == [
        "openvino, float32",
        "openvino, bfloat16-decoders",
    ]
    assert {(trial.verdict, trial.passes, trial.total_ms) for trial in record.untried} == {
        (OUT_OF_TIME, False, 0)
    }
    folder = answered.folder
    assert said[-1] == (
        "openvino, float32 and openvino, bfloat16-decoders: not tried: out of time; "
        f"`python -m dbsam_deploy.doctor --artefact {folder}` tries all"
    )
    whole = runtime_record(answered, Place(), said.append, every=True)
    assert [trial.passes for trial in whole.trials] == [True] * 4
    assert whole.untried == ()


@pytest.mark.parametrize(("slower", "begun"), [(1.0, True), (2.0, False)])
def test_what_would_end_too_late_is_not_begun(answered: Artefact, play, slower, begun) -> None:
    """What passes is asked 12 times after the default's six; then as much again would be."""
    played = play(bfloat16=0.125 * slower, bfloat16_decoders=0.1 * slower)
    played.seconds[None] = 0.25 * slower
    record = try_runtimes(answered, Place()).record
    assert ("bfloat16-decoders" in played.opened) == begun
    assert record.seconds < BUDGET_S
    chosen = "bfloat16-decoders" if begun else "bfloat16"
    assert record.chosen.name == f"openvino, {chosen}"


def test_the_search_goes_on_until_one_keeps_its_gate(answered: Artefact, play) -> None:
    played = play(bfloat16=("decoder",), bfloat16_decoders=("decoder", "prompt_decoder"))
    record = try_runtimes(answered, Place()).record
    assert list(played.opened) == [None, "bfloat16", "bfloat16-decoders", "float32"]
    assert record.chosen.name == "openvino, float32"
    assert record.seconds > BUDGET_S


def test_the_likely_choice_is_tried_first(answered: Artefact, play, monkeypatch) -> None:
    monkeypatch.setattr(runtimes, "BUDGET_S", 1000.0)
    quantised = dataclasses.replace(answered, quantization={"graphs": ["another"]})
    for export, processor, order in (
        (answered, AMX, ["bfloat16", "bfloat16-decoders", "float32"]),
        (answered, AVX512, ["bfloat16-decoders", "bfloat16"]),
        (quantised, AVX512, ["bfloat16", "bfloat16-decoders", "float32"]),
    ):
        played = play()
        monkeypatch.setattr(runtimes, "cpuinfo", lambda text=processor: text)
        try_runtimes(export, Place())
        assert list(played.opened) == [None, *order]


def test_an_encoder_that_is_wrong_or_slow_ends_it_before_a_decoder_is_asked(
    answered: Artefact, play
) -> None:
    played = play(bfloat16=("encoder",), bfloat16_decoders=8.0, float32=1.0)
    record = try_runtimes(answered, Place()).record
    assert record.trials[3].verdict == "misses its gate: cosine -1.00000 (wanted 0.999991)"
    assert record.trials[2].verdict == "not compared, since it is slower than the choice"
    for precision in ("bfloat16", "bfloat16-decoders"):
        assert played.opened[precision].asked == {"encoder": 1}
    assert record.trials[2].encoder_ms == 8000


def test_who_waits_is_told_how_long_an_image_takes_where_it_is_long(answered, play) -> None:
    said: list[str] = []
    for seconds in (3.0, 5.0):
        play().seconds[None] = seconds
        try_runtimes(answered, Place(), say=said.append)
    assert said == ["an image takes 5.0 s, and a runtime is asked about 2"]


def test_what_is_slower_is_not_compared_to_the_end(answered: Artefact, play) -> None:
    played = play(bfloat16=5.0, bfloat16_decoders=5.0, float32=5.0)
    played.wrong["bfloat16-decoders"] = ("decoder", "prompt_decoder")
    tried = try_runtimes(answered, Place())
    assert "slower than the choice" in tried.record.trials[1].verdict
    assert played.opened["float32"].asked["prompt_decoder"] == 2  # of the first image alone
    whole = try_runtimes(answered, Place(), every=True).record
    assert [trial.passes for trial in whole.trials] == [True, True, False, True]
    for one in (tried.record, whole):
        assert one.chosen.backend == "onnxruntime"
    assert tried.session is None


def test_a_comparison_ends_where_no_image_can_mend_it(answered: Artefact) -> None:
    answers, gate = read_answers(answered), load_recipe("fp32").gate
    halves = [agreement(Bent(answered, "decoder"), answered, answers, gate, enough=_ever)]
    halves.append(agreement(Bent(answered, "decoder"), answered, answers, gate))
    assert [found.whole for found in halves] == [False, True]
    assert all(found.missed["decoder"] for found in halves)
    kept = agreement(OnnxRuntimeSession(answered), answered, answers, gate, enough=_ever)
    assert (set(kept.missed.values()), kept.whole) == ({""}, False)
    assert "boxes at most 1.0000 / 1.0000" in kept.text


def _ever(found: Any) -> bool:
    return True


def test_what_later_images_may_mend_is_no_miss_yet(answered: Artefact) -> None:
    """Turned masks of the first image agree by 0; of all objects, half are in others."""
    gate = dataclasses.replace(
        load_recipe("fp32").gate, mask_agreement_mean=0.2, mask_agreement_p5=-1.0, dice_drop=2.0
    )
    bent, answers = Bent(answered, "decoder"), read_answers(answered)
    assert agreement(bent, answered, answers, gate, enough=_ever).missed["decoder"] == ""
    assert agreement(bent, answered, answers, gate).missed["decoder"]


def test_only_decoders_that_keep_the_gate_are_lowered(answered: Artefact, play) -> None:
    play(bfloat16=("encoder", "decoder"), bfloat16_decoders=("prompt_decoder",))
    tried = try_runtimes(answered, Place())
    chosen = tried.record.chosen
    assert chosen.lowered == ("decoder",)
    assert "; float32 for prompts 0." in chosen.verdict
    assert tried.session is None
    slower = try_runtimes(answered, Place(), every=True).record.trials[3]
    assert slower.verdict.startswith("misses its gate: cosine -1.00000")


def test_what_cannot_be_compared_is_not_taken(answered: Artefact, play) -> None:
    played = play()
    nothing = dataclasses.replace(answered, answers=None)
    for every in (False, True):
        record = try_runtimes(nothing, Place(), every=every).record
        assert record.chosen.backend == "onnxruntime"
        assert all("keeps no masks of PyTorch" in trial.verdict for trial in record.trials[1:])
        assert bool(played.opened) == every
        assert bool(record.trials[3].total_ms) == every


def test_what_does_not_open_is_a_row(answered: Artefact, play, monkeypatch) -> None:
    missing = EngineError("no OpenVINO here")
    play(float32=missing, bfloat16=missing)
    monkeypatch.setattr(runtimes, "cpuinfo", lambda: "flags : avx2")
    record = try_runtimes(answered, Place()).record
    assert record.trials[1].verdict == "no OpenVINO here"
    assert "no instructions for bfloat16" in record.trials[2].verdict
    assert record.chosen.backend == "onnxruntime"


@pytest.mark.openvino
def test_a_cache_that_cannot_be_used_is_no_verdict_on_a_runtime(
    answered: Artefact, tmp_path: Path
) -> None:
    place = tmp_path / "a file"
    place.touch()
    with pytest.raises(CacheError, match="compiled models cannot be kept in"):
        runtime_record(answered, Place(engine_cache=place), print)
    assert find_record(answered) is None


def test_a_record_is_measured_once(answered: Artefact, play) -> None:
    play()
    said: list[str] = []
    first = runtime_record(answered, Place(), said.append)
    assert said[0].startswith("trying the runtimes of this machine on ")
    assert runtime_record(answered, Place(), said.append) == first == find_record(answered)
    assert len(said) == 3
    runtime_record(answered, Place(), said.append, again=True)
    whole = runtime_record(answered, Place(), said.append, every=True)
    assert (whole.every, len(said)) == (True, 8)
    assert runtime_record(answered, Place(), said.append) == whole


def test_a_damaged_record_is_said_and_measured_again(answered: Artefact, play) -> None:
    play()
    said: list[str] = []
    first = runtime_record(answered, Place(), said.append)
    (path,) = (answered.folder / "trials").iterdir()
    path.write_text(path.read_text().replace("onnxruntime", "openvino"))
    assert runtime_record(answered, Place(), said.append).chosen.backend == first.chosen.backend
    assert "was edited" in said[3]


@pytest.mark.openvino
def test_real_runtimes(answered: Artefact, tmp_path: Path) -> None:
    """These graphs take coordinates as no SAM does, which bfloat16 refuses to round."""
    record = try_runtimes(answered, Place(engine_cache=tmp_path / "cache"), every=True).record
    one, two, *lowered = record.trials
    assert (one.verdict, one.passes, two.passes) == ("the export's own gate", True, True)
    assert min(one.encoder_ms, one.box_ms, two.eight_ms) > 0
    assert {trial.passes for trial in lowered} == {False}
    assert np.isfinite(record.chosen.total_ms)


@pytest.mark.openvino
def test_an_encoder_is_compiled_before_its_first_run_is_timed(
    answered: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(engine_cache=tmp_path / "cache")
    session = runtimes._open(answered, place, "openvino", "float32")
    monkeypatch.setattr(OpenvinoSession, "_compile", lambda *args: pytest.fail("compiled"))
    feed = encoder_feed(read_answers(answered)[0][0].image, answered.preprocessing)
    assert session.run("encoder", feed)
