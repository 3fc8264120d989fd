"""A client's shared memory and the layout of a request in it, without a server."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.clients import calls as client_requests
from dbsam_deploy.clients import shared_memory as client_memory
from dbsam_deploy.clients.shared_memory import RegionPool, SharedRegion, region_size
from dbsam_deploy.core.contract import TensorSpec
from dbsam_deploy.core.errors import ServingError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory


def regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("dbsam_client_*")}


def test_region_sizes_are_powers_of_two():
    assert [region_size(n) for n in (1, 2**20, 2**20 + 1, 200_000_000)] == [
        2**20,
        2**20,
        2**21,
        2**28,
    ]


def test_a_pool_hands_out_what_fits_and_drops_what_does_not():
    pool = RegionPool()
    small, large = SharedRegion(64), SharedRegion(256)
    pool.give_back(small)
    pool.give_back(large)
    assert pool.take(128) is large
    assert pool.take(128) is None
    assert pool.claim_stale() == [small.name]
    assert large.name in regions()
    pool.give_back(large)
    pool.retire_all()
    assert pool.claim_stale() == [large.name]
    assert not {small.name, large.name} & regions()


def test_threads_never_take_the_same_region():
    pool, taken = RegionPool(), []
    made = [SharedRegion(64) for _ in range(8)]
    for region in made:
        pool.give_back(region)

    def take() -> None:
        for _ in range(200):
            region = pool.take(64)
            if region is not None:
                assert region not in taken
                taken.append(region)
                taken.remove(region)
                pool.give_back(region)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(take) for _ in range(8)]:
            done.result()
    pool.retire_all()
    assert sorted(pool.claim_stale()) == sorted(region.name for region in made)


def test_a_forked_process_leaves_its_parents_regions_alone():
    pool, region = RegionPool(), SharedRegion(64)
    pool.give_back(region)
    child = os.fork()
    if child == 0:  # what is taken for free here would be written by two processes
        status = int(pool.take(64) is not None)
        pool.retire_all()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert region.name in regions()
    pool.retire_all()


def test_full_shared_memory_is_an_error_not_a_crash(monkeypatch):
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(client_memory.os, "statvfs", lambda _: Full)
    with pytest.raises(ServingError, match="--shm-size"):
        SharedRegion(8192)


def test_tensors_of_a_request_never_overlap_in_their_region():
    image = np.arange(33 * 17 * 3).astype(np.uint8).reshape(33, 17, 3)
    boxes = np.array([[0, 0, 5, 5], [1, 1, 17, 33], [2, 2, 4, 9]], np.float32)
    call = client_requests.box_call(image, boxes)
    offsets, end = call.regions()
    sizes = {name: array.nbytes for name, array in call.arrays.items()}
    sizes |= {f"->{spec.name}": call.output_bytes(spec) for spec in call.spec.outputs}
    spans = sorted((offset, offset + sizes[name]) for name, offset in offsets.items())
    assert len(spans) == 4
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] <= end
    assert sizes["->masks"] == 3 * 33 * 17


def test_metadata_without_a_mask_input_is_not_ours():
    with pytest.raises(ServingError, match="repository"):
        client_requests.mask_side(json.loads('{"inputs": [{"name": "x", "shape": [1]}]}'))


def test_output_sizes_follow_the_dtype():
    spec = TensorSpec("x", "int64", ("n",), "")
    assert client_requests.Call(None, {}, {"x": (3,)}).output_bytes(spec) == 24
