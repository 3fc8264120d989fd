"""Embeddings within their budget, in memory and in a scratch file; who may use a predictor."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.prediction.turns import Turns
from dbsam_deploy.volumes.embeddings import EmbeddingStore, ImageKey, SharedPredictor, image_key

EACH = 256 * 4 * 4 * 2
"""Bytes of a kept embedding (1, 256, 4, 4)."""


def embedding(value: float) -> np.ndarray:
    values = np.random.default_rng(int(value)).standard_normal((1, 256, 4, 4), np.float32)
    values[0, 0, 0, 0] = value
    return values


def key(number: int) -> ImageKey:
    return ImageKey(bytes([number]), (8, 8))


def numbers(store: EmbeddingStore, count: int) -> list[int]:
    return [n for n in range(count) if key(n) in store]


def test_what_is_kept_is_what_was_used_first():
    store = EmbeddingStore(ram_bytes=EACH, disk_bytes=10 * EACH)
    used = [store.put(key(n), embedding(n)) for n in range(5)]
    assert store.used == (EACH, 4 * EACH)
    for n in range(5):
        np.testing.assert_array_equal(store.get(key(n)), used[n])
        np.testing.assert_allclose(used[n], embedding(n), rtol=1e-3, atol=1e-6)
    assert store.get(key(99)) is None


def test_the_budget_holds_and_the_least_recently_used_go_first():
    store = EmbeddingStore(ram_bytes=2 * EACH + 100, disk_bytes=3 * EACH + 100)
    assert store.room is None
    for n in range(5):
        store.put(key(n), embedding(n))
        assert store.room == 4 - n
    store.get(key(0))  # of those in the file, 0 is used again: 1 goes next
    store.put(key(5), embedding(5))
    assert numbers(store, 6) == [0, 2, 3, 4, 5]
    for n in range(6, 40):
        store.put(key(n), embedding(n))
        ram, disk = store.used
        assert ram <= 2 * EACH + 100
        assert disk <= 3 * EACH + 100
    assert numbers(store, 40) == [35, 36, 37, 38, 39]
    for n in range(35, 40):
        assert store.get(key(n))[0, 0, 0, 0] == n


@pytest.mark.parametrize("exact", [False, True])
def test_an_embedding_that_was_given_out_does_not_change_with_the_file(exact):
    each = EACH * (1 + exact)
    store = EmbeddingStore(0, each, exact=exact)
    used = store.put(key(0), embedding(0))
    given = store.get(key(0))
    store.put(key(1), embedding(1))  # in the same place
    np.testing.assert_array_equal(given, used)
    assert given.flags.writeable  # PyTorch warns of others


@pytest.mark.parametrize(("ram", "disk", "kept"), [(0, 2, 2), (2, 0, 2), (0, 0, 0)])
def test_a_store_without_memory_or_without_a_file(ram, disk, kept):
    store = EmbeddingStore(ram * EACH, disk * EACH)
    for n in range(4):
        np.testing.assert_allclose(store.put(key(n), embedding(n)), embedding(n), atol=0.01)
    assert len(numbers(store, 4)) == kept


def test_another_models_embedding_is_refused():
    store = EmbeddingStore()
    store.put(key(0), embedding(0))
    with pytest.raises(InputError, match="a store is of one model"):
        store.put(key(1), np.zeros((1, 256, 8, 8), np.float32))
    with pytest.raises(InputError, match="expected 0 or more"):
        EmbeddingStore(-1)


def test_a_full_disk_costs_embeddings_and_nothing_else(monkeypatch, caplog):
    store = EmbeddingStore(ram_bytes=EACH, disk_bytes=9 * EACH)
    for n in range(4):
        store.put(key(n), embedding(n))
    write = store._file.write
    monkeypatch.setattr(
        store,
        "_file",
        Wrapped(store._file, write=lambda content: write(content[:7])),  # no room for the rest
    )
    with caplog.at_level(logging.WARNING):
        for n in range(4, 8):
            store.put(key(n), embedding(n))
    assert "slices are encoded again" in caplog.text
    assert caplog.text.count("WARNING") <= 4
    for n in numbers(store, 8):
        assert store.get(key(n))[0, 0, 0, 0] == n
    assert key(7) in store  # in memory


class Wrapped:
    """A file of which a method is replaced."""

    def __init__(self, file, **methods) -> None:
        self.__dict__.update(methods)
        self._wrapped = file

    def __getattr__(self, name):
        return getattr(self._wrapped, name)


def test_no_room_from_the_start(monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    store = EmbeddingStore(ram_bytes=EACH, disk_bytes=9 * EACH)
    for n in range(3):
        store.put(key(n), embedding(n))
    assert numbers(store, 3) == [2]
    assert store.room == 0
    assert "No space left on device" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="there the system deletes it with the process")
def test_the_scratch_file_has_no_name_that_a_crash_could_leave(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from dbsam_deploy.volumes.embeddings import EmbeddingStore, ImageKey\n"
        "store = EmbeddingStore(0, 10**6, Path(sys.argv[1]))\n"
        "store.put(ImageKey(b'a', (1, 1)), np.ones((1, 4, 2, 2), np.float32))\n"
        "assert store.used == (0, 32) and os.listdir(sys.argv[1]) == []\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_closing_drops_all_and_a_new_beginning_is_possible(tmp_path):
    store = EmbeddingStore(EACH, 9 * EACH, tmp_path)
    for n in range(4):
        store.put(key(n), embedding(n))
    file = store._file
    store.close()
    assert file.closed
    assert store.used == (0, 0)
    assert store.get(key(3)) is None
    store.put(key(0), embedding(0))
    assert numbers(store, 4) == [0]


def test_an_image_is_known_by_its_pixels_and_its_shape():
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    assert image_key(image) == image_key(image.copy())
    assert image_key(image) != image_key(image.reshape(6, 8, 3))
    other = image.copy()
    other[-1, -1, -1] ^= 1
    assert image_key(image) != image_key(other)
    assert image_key(image[:, ::-1]) == image_key(image[:, ::-1].copy())


class Slow:
    """An `Encoding` that notes what it does, and in which order."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.log, self.active = seconds, [], 0

    def encode(self, image):
        self.active += 1
        assert self.active == 1, "two threads at a time"
        time.sleep(self.seconds)
        self.active -= 1
        self.log.append(int(image[0, 0, 0]))
        return embedding(int(image[0, 0, 0]))

    def set_embeddings(self, image_embeddings, original_size):
        self.current = int(image_embeddings[0, 0, 0, 0])

    def set_image(self, image):
        raise AssertionError("an encoder's embeddings are kept")

    def predict_boxes(self, boxes):
        return Prediction(np.zeros((1, 1, 2, 2), np.uint8), np.float32([[self.current]]))

    def predict_prompts(self, *, multimask=False, **prompts):
        return self.predict_boxes(None)


def image(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def ask(shared: SharedPredictor, value: int) -> int:
    made = image(value)
    found = shared.ask(image_key(made), lambda: made, lambda model: model.predict_boxes(None))
    return int(found.ious[0, 0])


def ahead(values):
    return [lambda value=value: (image_key(image(value)), image(value)) for value in values]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_image_is_encoded_once_whoever_asks():
    predictor = Slow(0.002)
    shared = SharedPredictor(predictor)
    answers: list[tuple[int, int]] = []

    def client(seed: int) -> None:
        for value in np.random.default_rng(seed).integers(0, 9, 25).tolist():
            answers.append((value, ask(shared, value)))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    shared.encode_ahead("them", ahead(range(12)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: shared._worker is None)
    assert len(answers) == 150
    assert all(value == answer for value, answer in answers)
    assert sorted(predictor.log) == list(range(12))


def test_a_prompt_waits_for_one_encoding_at_most():
    predictor = Slow(0.03)
    shared = SharedPredictor(predictor)
    shared.encode_ahead("one", ahead(range(100)))
    wait_until(lambda: predictor.log)
    for value in (200, 201, 202):
        before = len(predictor.log)
        assert ask(shared, value) == value
        assert value in predictor.log[before : before + 3]  # the one under way, and one begun
    shared.stop_ahead("one")
    wait_until(lambda: shared._worker is None)
    assert len(predictor.log) < 60


def test_a_prompt_that_waits_goes_before_work_ahead_that_waited_longer():
    for _ in range(10):  # who gets a plain lock next is chance
        predictor = Slow()
        shared = SharedPredictor(predictor)
        prompts = [threading.Thread(target=ask, args=(shared, value)) for value in (200, 201)]
        with shared.turns:
            shared.encode_ahead("one", ahead([1, 2]))
            time.sleep(0.01)  # the worker waits by now
            for prompt in prompts:
                prompt.start()
            wait_until(lambda shared=shared: shared.turns._wanted == 3)
        for prompt in prompts:
            prompt.join()
        wait_until(lambda shared=shared: shared._worker is None)
        assert sorted(predictor.log[:2]) == [200, 201]


def test_the_last_to_prompt_goes_first_and_the_other_afterwards():
    predictor = Slow(0.005)
    shared = SharedPredictor(predictor)
    with shared.turns:
        shared.encode_ahead("one", ahead([1, 2, 3]))
        shared.encode_ahead("two", ahead([11, 12]))
        time.sleep(0.02)
        assert predictor.log == []  # not while somebody has a turn
    wait_until(lambda: shared._worker is None)
    assert sorted(predictor.log) == [1, 2, 3, 11, 12]
    assert predictor.log[-2:] == [2, 3]  # `one` may have begun before `two` came


def test_images_that_come_while_the_earlier_ones_end_are_not_lost():
    predictor = Slow()
    shared = SharedPredictor(predictor)

    def earlier():
        yield from ahead([1])
        shared.encode_ahead("one", ahead([2, 3]))  # a prompt, just before the worker sees the end

    shared.encode_ahead("one", earlier())
    wait_until(lambda: shared._worker is None)
    assert predictor.log == [1, 2, 3]


def test_work_ahead_stops_where_it_would_push_out_what_was_encoded():
    predictor = Slow()
    store = EmbeddingStore(2 * EACH, 2 * EACH)
    shared = SharedPredictor(predictor, store=store)
    shared.encode_ahead("one", ahead(range(30)))
    wait_until(lambda: shared._worker is None)
    assert predictor.log == [0, 1, 2, 3]


def test_an_error_ahead_is_told_and_the_prompt_raises_it(caplog):
    class Broken(Slow):
        def encode(self, image):
            if image[0, 0, 0] == 7:
                raise InputError("slice 7 cannot be encoded")
            return super().encode(image)

    shared = SharedPredictor(Broken())
    shared.encode_ahead("one", ahead([5, 7, 6]))
    wait_until(lambda: shared._worker is None)
    assert "slice 7 cannot be encoded" in caplog.text
    with pytest.raises(InputError, match="slice 7"):
        ask(shared, 7)
    assert ask(shared, 6) == 6  # and the next one is asked as before


def test_closing_ends_the_thread():
    predictor = Slow(0.01)
    shared = SharedPredictor(predictor)
    shared.encode_ahead("one", ahead(range(100)))
    wait_until(lambda: predictor.log)
    shared.close()
    done = len(predictor.log)
    assert shared._worker is None
    assert shared.store.used == (0, 0)
    time.sleep(0.03)
    assert len(predictor.log) == done


def test_a_program_that_ends_does_not_encode_on():
    code = (
        "import atexit, sys; sys.path.insert(0, sys.argv[1])\n"
        "from volumes.test_embeddings import Slow, SharedPredictor, ahead\n"
        "predictor = Slow(0.02)\n"
        "atexit.register(lambda: print(len(predictor.log)))\n"
        "SharedPredictor(predictor).encode_ahead('one', ahead(range(200)))\n"
    )
    tests = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tests)], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 20
    assert ended.stderr == ""


def test_a_server_is_asked_by_image_and_nothing_is_kept():
    class Server:
        def __init__(self):
            self.images: list[int] = []

        def set_image(self, image):
            self.images.append(int(image[0, 0, 0]))

        def predict_boxes(self, boxes):
            return Prediction(np.zeros((1, 1, 2, 2), np.uint8), np.float32([[self.images[-1]]]))

        def predict_prompts(self, *, multimask=False, **prompts):
            return self.predict_boxes(None)

    server = Server()
    shared = SharedPredictor(server)
    shared.encode_ahead("one", ahead(range(5)))
    assert shared._worker is None
    assert [ask(shared, value) for value in (3, 4, 3)] == [3, 4, 3]
    assert server.images == [3, 4, 3]
    assert shared.store.used == (0, 0)


def test_turns_are_of_one_thread_which_may_take_one_again():
    turns, seen = Turns(), []

    def work(number: int) -> None:
        for _ in range(200):
            with turns, turns:
                seen.append(number)
                seen.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[::2] == seen[1::2]
    assert len(seen) == 1600
    with turns.spare():
        pass
