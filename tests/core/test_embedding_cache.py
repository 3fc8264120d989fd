"""Embeddings are computed once, kept within the budget, and the oldest go first."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dbsam_deploy.core.embedding_cache import EmbeddingCache, Kept


def nothing() -> None:
    pass


def kept(value: str, nbytes: int = 10) -> Kept:
    return Kept(value, (4, 5), nbytes)


def fill(cache: EmbeddingCache, *names: str, nbytes: int = 10) -> None:
    for name in names:
        cache.get_or_make(name, lambda name=name: kept(name, nbytes), nothing)


def test_the_least_recently_used_goes_first():
    cache = EmbeddingCache(30)
    fill(cache, "a", "b", "c")
    assert cache.get("a").embedding == "a"
    fill(cache, "d")
    assert cache.get("b") is None
    assert all(cache.get(name) for name in "acd")
    counts = cache.counts
    assert (counts.misses, counts.evictions, counts.images, counts.nbytes) == (4, 1, 3, 30)


def test_one_shot_images_do_not_push_out_what_somebody_works_on():
    cache = EmbeddingCache(80)
    fill(cache, *"abcdefgh")
    for number in range(20):
        cache.get_or_make(f"once {number}", lambda: kept("x"), nothing, lasting=False)
    assert [name for name in "abcdefgh" if cache.get(name)] == list("cdefgh")
    assert cache.get("once 19"), "the last ones have a quarter"
    assert cache.get("once 17") is None
    fill(cache, "new")
    assert cache.get("once 19"), "asked for by its id, it lasts"
    assert cache.get("c") is None
    assert cache.counts.nbytes == 80


def test_one_shot_images_have_the_whole_cache_where_there_are_no_others():
    cache = EmbeddingCache(50)
    for number in range(9):
        cache.get_or_make(str(number), lambda: kept("x"), nothing, lasting=False)
    assert [number for number in range(9) if cache.get(str(number))] == [4, 5, 6, 7, 8]


def test_several_go_where_one_is_large():
    cache = EmbeddingCache(30)
    fill(cache, "a", "b", "c")
    fill(cache, "large", nbytes=25)
    assert [cache.get(name) is None for name in ("a", "b", "c", "large")] == [True] * 3 + [False]
    assert (cache.counts.evictions, cache.counts.nbytes) == (3, 25)


def test_what_exceeds_the_budget_is_used_and_not_kept():
    cache = EmbeddingCache(5)
    found, known = cache.get_or_make("a", lambda: kept("a"), nothing)
    assert (found.embedding, known) == ("a", False)
    assert cache.get("a") is None
    assert (cache.counts.images, cache.counts.nbytes, cache.counts.evictions) == (0, 0, 0)


def test_many_threads_at_once_compute_one_embedding():
    cache, started, go = EmbeddingCache(100), [], threading.Event()

    def make() -> Kept:
        started.append(1)
        assert go.wait(10)
        return kept("a")

    def waiting() -> None:
        if cache.counts.joined == 7:
            go.set()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: cache.get_or_make("a", make, waiting), range(8)))
    assert len(started) == 1
    assert [known for _, known in answers] == [False] * 8
    assert len({id(found) for found, _ in answers}) == 1
    assert cache.get_or_make("a", make, nothing)[1]
    assert (cache.counts.misses, cache.counts.joined, cache.counts.hits) == (1, 7, 1)


def test_all_who_wait_get_the_error_and_the_next_one_tries_again():
    cache, go = EmbeddingCache(100), threading.Event()

    def fail() -> Kept:
        assert go.wait(10)
        raise ValueError("broken")

    def waiting() -> None:
        go.set()

    def ask(_: int) -> str:
        with pytest.raises(ValueError, match="broken") as caught:
            cache.get_or_make("a", fail, waiting)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == ["broken"] * 2
    assert cache.get_or_make("a", lambda: kept("a"), nothing)[0].embedding == "a"


def test_who_waits_may_leave_and_the_embedding_is_kept_all_the_same():
    cache, go, begun = EmbeddingCache(100), threading.Event(), threading.Event()

    def make() -> Kept:
        begun.set()
        assert go.wait(10)
        return kept("a")

    def gone() -> None:
        raise TimeoutError

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get_or_make, "a", make, nothing)
        assert begun.wait(10)
        with pytest.raises(TimeoutError):
            cache.get_or_make("a", make, gone)
        go.set()
        assert first.result()[0].embedding == "a"
    assert cache.get("a").embedding == "a"


def test_a_storm_of_evictions_keeps_the_sums_right():
    cache = EmbeddingCache(50)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: fill(cache, str(n % 40)), range(400)))
    held = [name for name in map(str, range(40)) if cache.get(name)]
    counts = cache.counts
    assert len(held) == counts.images == 5
    assert counts.nbytes == 50
    assert counts.misses - counts.evictions == 5
