"""Held-back images: boxes from labels or by place, and agreement with the float model's masks."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.quantization.calibration_images import choose_images
from dbsam_deploy.quantization.held_back import BOX_SHARES, make_views
from dbsam_deploy.recipe import CalibrationPlan, load_recipe
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples

HOW = Preprocessing(64)
PARITY = replace(load_recipe("int8").parity, boxes_per_image=3)
PLAN = CalibrationPlan("max", 99.9, images=1, held_back=2, seed=0)


@pytest.fixture(scope="module")
def session(small_models):
    return PytorchSession(small_models("db_sam_4level"))


@pytest.fixture(scope="module")
def stack():
    (path,) = bundled_examples().glob("MR_*.npz")
    with np.load(path) as content:
        filled = np.flatnonzero(content["gts"].any((1, 2)))
        return content["imgs"][filled], content["gts"][filled]


def views_of(folder, session, parity=PARITY):
    chosen = choose_images(folder, PLAN)
    return list(make_views(chosen.folder, chosen.held_back, session, HOW, parity)), chosen


def test_objects_of_a_labelled_image_give_the_boxes(tmp_path, session, stack):
    images, labels = stack
    np.savez(tmp_path / "stack.npz", imgs=images, gts=labels)
    views, chosen = views_of(tmp_path, session, replace(PARITY, box_jitter_px=0))
    assert [v.name for v in views] == [f"stack.npz[{i.slice}]" for i in _sorted(chosen)]
    for view, image in zip(views, _sorted(chosen), strict=True):
        assert view.sha256 == image.sha256
        assert view.image.shape == (1, 3, 64, 64)
        truth = labels[image.slice]
        wanted = set()
        for value in np.unique(truth[truth > 0]):
            rows, columns = np.nonzero(truth == value)
            if len(rows) >= PARITY.min_object_px:
                wanted.add((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        assert {tuple(box.tolist()) for box in view.boxes} <= wanted
        assert len(view.boxes) == min(len(wanted), 3)
        assert view.masks.shape == (len(view.boxes), *truth.shape)


def _sorted(chosen):
    return sorted(chosen.held_back, key=lambda image: (image.file, image.slice))


def test_an_image_without_labels_gets_boxes_by_place(tmp_path, session, stack):
    for number, image in enumerate(stack[0][:3]):
        Image.fromarray(image[:, :200]).save(tmp_path / f"{number}.png")
    views, _ = views_of(tmp_path, session)
    assert len(views) == 2
    for view in views:
        wanted = np.array(BOX_SHARES, np.float32) * np.array([200, 256, 200, 256], np.float32)
        np.testing.assert_allclose(view.boxes, wanted)


def test_agreement_is_whole_with_the_float_embedding_and_falls_with_another(
    tmp_path, session, stack
):
    np.savez(tmp_path / "stack.npz", imgs=stack[0])
    (view, other), _ = views_of(tmp_path, session)
    assert view.judge(view.embedding) == ([1.0] * len(view.boxes), [])
    rng = np.random.default_rng(zlib.crc32(b"views"))
    noise = rng.standard_normal(view.embedding.shape).astype(np.float32)
    assert np.mean(view.judge(noise * np.abs(view.embedding).max())[0]) < 0.999
    assert not np.array_equal(view.embedding, other.embedding)


def test_a_file_that_changed_is_noticed(tmp_path, session, stack):
    np.savez(tmp_path / "stack.npz", imgs=stack[0])
    chosen = choose_images(tmp_path, PLAN)
    np.savez(tmp_path / "stack.npz", imgs=stack[0][::-1])
    with pytest.raises(InputError, match="changed while it was in use"):
        list(make_views(chosen.folder, chosen.held_back, session, HOW, PARITY))
