"""Answers of PyTorch that are kept: as if computed, and harmless if somebody changed them."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.private import cache_folder
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import Parity
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.parity import compare, compare_apart
from dbsam_deploy.verification.references import (
    AskedOnce,
    References,
    question,
    references_key,
)

HOW = Preprocessing(64)


class Drawn:
    """A session whose answers follow from the image, and that counts what it is asked."""

    backend = "drawn"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, graph, feed):
        self.asked.append(graph)
        rng = np.random.default_rng(int(np.abs(next(iter(feed.values()))).sum() * 1000))
        if graph == "encoder":
            return {"image_embeddings": rng.random((1, 256, 4, 4), np.float32)}
        boxes = graph == "decoder"
        count = feed["boxes" if boxes else "point_labels"].shape[1]
        masks = rng.standard_normal((1, count, 1 if boxes else 4, 16, 16), np.float32)
        return {"low_res_masks": masks, "iou_predictions": masks[..., 0, 0]}


def never():
    raise AssertionError("PyTorch was asked")


def image(value: float):
    return {"image": np.full((1, 3, 64, 64), value, np.float32)}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path, said):
    """(what opens the reference, key) → References of one folder."""

    def build(open_session=never, key="key", folder=tmp_path, **options):
        return References(open_session, HOW, key, folder=folder, say=said.append, **options)

    return build


@pytest.fixture(scope="module")
def cases():
    return load_cases(bundled_examples(), Parity(2, 2, 20, 16))


def assert_same(found, wanted) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name])


def test_an_answer_is_computed_once_and_is_the_same_ever_after(make):
    session = Drawn()
    first = make(lambda: session)
    answers = [first.run("encoder", image(value)) for value in (1, 2, 1)]
    assert session.asked == ["encoder"] * 2
    assert not np.array_equal(*(answer["image_embeddings"] for answer in answers[:2]))
    later = make()
    for value, answer in zip((1, 2, 1), answers, strict=True):
        assert_same(later.run("encoder", image(value)), answer)
    assert later.seconds == first.seconds  # how long PyTorch took, not the disk
    assert len(later.seconds["encoder"]) == 2


@pytest.mark.parametrize("other", ["key", "value", "shape"])
def test_another_question_has_another_answer(make, other):
    make(Drawn).run("encoder", image(1))
    session = Drawn()
    asked = make(lambda: session, "another" if other == "key" else "key")
    feed = {"key": image(1), "value": image(np.nextafter(np.float32(1), 2))}.get(
        other, {"image": np.ones((2, 3, 64, 64), np.float32)}
    )
    asked.run("encoder", feed)
    assert session.asked == ["encoder"]


def test_a_released_session_is_opened_when_it_is_needed_again(make):
    opened = []

    def begin():
        opened.append(Drawn())
        return opened[-1]

    references = make(begin)
    references.run("encoder", image(1))
    references.release()
    references.run("encoder", image(1))
    assert len(opened) == 1
    references.run("encoder", image(2))
    assert len(opened) == 2


def rewrite(folder: Path, content: bytes) -> Path:
    """Put content in the place of the folder's one answer, under the name that fits it."""
    (path,) = folder.glob("*.npz")
    path.unlink()
    stem = path.name.rsplit("-", 1)[0]
    new = folder / f"{stem}-{hashlib.sha256(content).hexdigest()}.npz"
    new.write_bytes(content)
    return new


def archive(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_changed_file_is_not_believed_and_runs_no_code(make, tmp_path, said):
    session, trap = Drawn(), tmp_path / "ran"
    wanted = make(lambda: session).run("encoder", image(1))
    good = wanted["image_embeddings"]
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    changed = whole.replace(good.tobytes()[:64], bytes(64), 1)
    assert changed != whole
    path.write_bytes(changed)  # its name says other content
    assert_same(make(lambda: session).run("encoder", image(1)), wanted)
    for content in (
        archive(image_embeddings=np.array([Trap(trap)], object), seconds=1.0),
        archive(image_embeddings=good[:, :1], seconds=1.0),
        archive(image_embeddings=good.astype(np.float64), seconds=1.0),
        archive(image_embeddings=good),
        archive(seconds=1.0),
        whole[:-30],
        b"PK",
        b"",
    ):
        rewrite(tmp_path, content)
        assert_same(make(lambda: session).run("encoder", image(1)), wanted)
    assert not trap.exists()
    assert len(session.asked) - 1 == len(said) == 9
    assert all(
        line.endswith("is damaged; this answer of PyTorch is computed anew") for line in said
    )
    assert_same(make().run("encoder", image(1)), wanted)  # the last one was kept


def test_where_nothing_can_be_kept_answers_still_come(make, tmp_path, said, monkeypatch):
    session = Drawn()
    references = make(lambda: session, folder=tmp_path / "absent")
    for _ in range(2):
        references.run("encoder", image(1))
    assert not references.keeps
    assert len(said) == 1
    assert "not kept for the next export" in said[0]
    folder = tmp_path / "dbsam_deploy/references"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not References(never, HOW, "key", say=said.append).keeps
    assert "other users may write there" in said[1]


def test_the_longest_unused_go_first(make, tmp_path):
    references = make(Drawn)
    for value in (1, 2, 3):
        references.run("encoder", image(value))
    sizes = {path: path.stat().st_size for path in tmp_path.glob("*.npz")}
    for age, path in enumerate(sorted(sizes, key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (age, age))
    references.run("encoder", image(1))
    references.trim(2 * max(sizes.values()))
    later = make()
    later.run("encoder", image(1))
    later.run("encoder", image(3))
    with pytest.raises(AssertionError, match="PyTorch was asked"):
        later.run("encoder", image(2))
    references.trim(0)
    assert not list(tmp_path.glob("*.npz"))


def test_an_image_is_asked_each_question_once():
    session = Drawn()
    asked = AskedOnce(session)
    first = asked.run("encoder", image(1))
    first["image_embeddings"] = np.zeros(1, np.float32)  # an answer is the caller's own
    assert asked.run("encoder", image(1))["image_embeddings"].shape == (1, 256, 4, 4)
    assert session.asked == ["encoder"]
    asked.forget()
    asked.run("encoder", image(1))
    assert len(session.asked) == len(asked.seconds["encoder"]) == 2


def test_a_question_is_its_numbers_however_they_lie_in_memory():
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    turned = question("decoder", {"boxes": whole.T})
    assert turned == question("decoder", {"boxes": whole.T.copy()})
    assert turned != question("decoder", {"boxes": whole.reshape(6, 4)})
    assert question("decoder", {"boxes": whole[:0]}) != question("decoder", {"boxes": whole[:, :0]})
    parts = [b"decoder", b"boxes", b"float32", b"(4, 6)", whole.tobytes()]
    known = hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts))
    assert question("decoder", {"boxes": whole}) == known.hexdigest()


def test_one_of_the_two_is_open_at_a_time_and_the_figures_are_the_same(make, cases):
    events = []

    def begin():
        events.append("PyTorch")
        return Drawn()

    references = make(begin, put_away=lambda: events.append("put away"))

    def deployed():
        assert references._session is None
        events.append("deployed")
        return Drawn()

    names = [case.name for case in cases]
    told = []
    found = compare_apart(references, deployed, HOW, cases, progress=told.append)
    assert events == ["PyTorch", "put away", "deployed"]
    assert told == [f"asked PyTorch about {n}" for n in names] + [f"compared {n}" for n in names]
    wanted = compare(Drawn(), Drawn(), HOW, cases).as_dict()
    for name, value in found.as_dict().items():
        assert name.endswith("_ms") or value == wanted[name], name
    compare_apart(make(), Drawn, HOW, cases)  # a second precision


def test_the_key_has_what_decides_about_pytorchs_numbers(monkeypatch):
    loaded = load_model(image_size=64)
    keys = [references_key(loaded.model, "a")]
    keys.append(references_key(loaded.model, "b"))
    keys.append(references_key(load_model(image_size=128).model, "a"))
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    keys.append(references_key(loaded.model, "a"))
    monkeypatch.delenv("MKL_CBWR")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.append(references_key(loaded.model, "a"))
    finally:
        torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)
    assert references_key(loaded.model, "a") == keys[0]


def test_all_masks_of_a_prompt_come_from_one_pass():
    session = PytorchSession(load_model(image_size=64).model)
    model, passes = session._model, []
    model.mask_decoder.transformer.register_forward_hook(lambda *_: passes.append(1))
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((1, 256, 4, 4), np.float32))
    boxes = torch.tensor([[3.0, 5, 40, 50], [8, 2, 60, 30]])
    with torch.inference_mode():
        parts = [model.decode(features, boxes=boxes, multimask=m) for m in (False, True)]
        passes.clear()
        together = model.decode(features, boxes=boxes, multimask=None)
    assert len(passes) == 1
    for index in (0, 1):
        torch.testing.assert_close(
            together[index], torch.cat([part[index] for part in parts], 1), rtol=0, atol=0
        )


def test_the_users_answers_are_kept_in_a_folder_of_their_own(said):
    assert References(never, HOW, "key", say=said.append).keeps
    assert cache_folder("references").stat().st_mode & 0o077 == 0
    assert not said
