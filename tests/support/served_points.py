"""Points through a real server that serves weights which know boxes."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy import load
from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.verification.cases import Case


def check_points(server: TritonServer, artefact: Artefact, case: Case) -> None:
    """A click of weights that know boxes: the server tries the same boxes as `load` does here."""
    x0, y0, x1, y1 = case.boxes[0]
    click = [[(x0 + x1) / 2, (y0 + y1) / 2]]
    beyond = [[x0, y0, (x0 + 2 * x1) / 3, y1]], [[x1 - 1, (y0 + y1) / 2]]
    asked = [
        {"points": click},
        {"points": click, "multimask": True},
        {"boxes": beyond[0], "points": beyond[1]},
    ]
    with load(artefact.folder) as local, load(f"triton://{server.grpc_url}") as served:
        assert served.points == local.points
        assert local.points.first == "search"
        for prompts in asked:
            expected, answer = (one.predict(case.image, **prompts) for one in (local, served))
            np.testing.assert_array_equal(answer.masks, expected.masks)
            np.testing.assert_array_equal(answer.ious, expected.ious)
            np.testing.assert_array_equal(answer.logits, expected.logits)
            assert answer.note == expected.note
        raw = served.predict(case.image, points=click, adapt_points=False)
        assert raw.masks.sum() < expected.masks.sum() / 20  # what these weights make of a point
        client, pixel = served.predictor.client, np.array([click], np.float32)
        given = {"point_coords": pixel, "point_labels": np.ones((1, 1), np.int32)}
        answer = client.segment_prompts(case.image, **given)
        np.testing.assert_array_equal(answer.masks, local.predict(case.image, points=click).masks)
        many = {name: np.repeat(array, 43, 0) for name, array in given.items()}
        with pytest.raises(InputError, match="43 prompt sets with points, for which 258 boxes"):
            client.segment_prompts(case.image, **many)
