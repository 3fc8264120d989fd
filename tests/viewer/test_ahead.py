"""What is encoded while the user looks at an answer."""

from __future__ import annotations

import numpy as np
import pytest
from support.bright import FreeEncoder
from support.wedge import WIDE

from dbsam_deploy.viewer.marks import BoxMark
from dbsam_deploy.viewer.workspace import WorkRules, Workspace
from dbsam_deploy.volumes.embeddings import SharedPredictor

DEPTH, PROMPTED = 9, 5


class Noting(FreeEncoder):
    """Notes which slices it encodes, by their first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []

    def encode(self, image: np.ndarray) -> np.ndarray:
        self.order.append(int(image[0, 0, 0]))
        return super().encode(image)


@pytest.mark.parametrize("slices", [(PROMPTED, PROMPTED + 1), (4, 7)], ids=["2D", "3D"])
def test_after_an_answer_slices_are_encoded_outwards_from_it(slices):
    values = np.random.default_rng(0).integers(100, 256, (1, DEPTH, 40, 50), np.uint8)
    values[0, :, 0, 0] = range(DEPTH)
    model = Noting()
    shared = SharedPredictor(model)
    work = Workspace(shared, WorkRules(rule=WIDE))
    work.goes_through = False
    with shared.turns:  # so that nothing is encoded ahead before the answer
        work.set_image(values, None)
        work.set_buffer()
        assert work.add(BoxMark((slices, (8, 25), (12, 40)), True), runs=True).mask.any()
        worker = shared._worker
    worker.join(20)
    begun = DEPTH // 2  # the worker may have had it in hand
    assert sorted(model.order) == list(range(DEPTH))
    assert [z for z in model.order if z != begun] == [PROMPTED, 6, 7, 3, 8, 2, 1, 0]
    work.close()
