"""Arguments of `load` of the wrong kind, and `auto`; sources, runtimes, servers: test_model."""

import pytest

import dbsam_deploy as db
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.sessions.trial_records import Record, Trial
from dbsam_deploy.verification import runtimes
from dbsam_deploy.verification.runtimes import Tried


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": 3}, "a model is 3: expected text"),
        ({"source": b"build"}, "a model is b'build': expected text"),
        ({"backend": "pytorch", "image_size": "64"}, "image size '64': expected a multiple"),
        ({"backend": "pytorch", "image_size": 96.0}, "image size 96.0"),
        ({"backend": "pytorch", "variant": ["db_sam"]}, "expected text"),
        ({"decoder_weights": 7}, "decoder_weights is 7"),
        (
            {"source": "triton://localhost:1", "timeout_s": "5"},
            "timeout_s is '5'",
        ),
    ],
)
def test_what_is_no_path_text_or_number(words, message):
    with pytest.raises(InputError, match=message):
        db.load(**words)


class Opened:
    """A session that a trial has left open."""

    backend = "opened by a trial"


def test_auto_tries_the_runtimes_once(make_artefact, tmp_path, monkeypatch, capsys):
    folder = make_artefact(tmp_path / "export").folder
    tried, sessions = [], [Opened()]

    def play(artefact, place, *, every, say):
        tried.append((artefact.folder, every))
        trial = Trial("onnxruntime", None, True, "its own", (), 1.0, 1.0, 1.0)
        return Tried(Record((trial,), every, 0.1), sessions.pop())

    monkeypatch.setattr(runtimes, "try_runtimes", play)
    assert db.load(folder, backend="auto").backend == "opened by a trial"
    assert "trying the runtimes of this machine" in capsys.readouterr().err
    assert db.load(folder, backend="auto").backend == "onnxruntime-cpu"
    assert capsys.readouterr().err == ""
    assert tried == [(folder, False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"device": "cuda"}, "--device cuda: backend auto runs on cpu"),
        ({"runtime_precision": "bfloat16"}, "goes with --backend openvino, not auto"),
        ({"variant": "db_sam"}, "not auto; an artefact has its own weights"),
    ],
)
def test_auto_tries_nothing_for_what_it_refuses(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        db.load(tmp_path, backend="auto", **words)
