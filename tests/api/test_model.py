"""What a program gets from `load`: exports, weights and servers behind one model, one result."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import dbsam_deploy as db
from dbsam_deploy.core.contract import MAX_MASK_PIXELS, MAX_PROMPTS
from dbsam_deploy.core.errors import CheckpointError, InputError, ServingError
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

BOXES = [[5, 6, 40, 30], [20, 10, 60, 45]]


@pytest.fixture
def image() -> np.ndarray:
    coarse = np.random.default_rng().integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:50, :66].copy()


@pytest.fixture
def model(tiny_artefact) -> db.Model:
    return db.load(tiny_artefact.folder)


@pytest.fixture
def predictor(tiny_artefact) -> Predictor:
    return Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)


@pytest.fixture
def encodings(monkeypatch) -> list[str]:
    """Graphs that ONNX Runtime ran."""
    ran, run = [], OnnxRuntimeSession.run

    def counted(self, graph, feed):
        ran.append(graph)
        return run(self, graph, feed)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    return ran


def test_boxes_give_each_its_mask_iou_and_logits(model, predictor, image):
    result = model.predict(image, boxes=BOXES)
    predictor.set_image(image)
    expected = predictor.predict_boxes(np.array(BOXES))
    np.testing.assert_array_equal(result.masks, expected.masks)
    np.testing.assert_array_equal(result.ious, expected.ious)
    np.testing.assert_array_equal(result.logits, expected.logits)
    assert result.masks.shape == (2, 1, 50, 66)
    assert (result.masks.dtype, result.ious.dtype) == (np.uint8, np.float32)
    assert result.note == "test graphs"
    np.testing.assert_array_equal(model.predict(image, boxes=BOXES[0]).masks, result.masks[:1])


def test_points_alternatives_and_an_earlier_mask(model, predictor, image):
    predictor.set_image(image)
    click = model.predict(image, points=[[20, 18]], labels=[1], multimask=True)
    prompt = {"point_coords": np.array([[[20, 18]]]), "point_labels": np.array([[1]])}
    expected = predictor.predict_prompts(**prompt, multimask=True)
    np.testing.assert_array_equal(click.masks, expected.masks)
    assert click.masks.shape == (1, 3, 50, 66)
    better = model.predict(image, boxes=[BOXES[0]], mask_input=click.logits[:, 1])
    refined = predictor.predict_prompts(
        boxes=np.array(BOXES[:1]), mask_input=expected.known_logits()[:, 1]
    )
    np.testing.assert_array_equal(better.logits, refined.logits)
    assert not np.array_equal(better.logits, model.predict(image, boxes=[BOXES[0]]).logits)
    several = model.predict(image, points=[[[20, 18]], [[5, 6]]])  # labels: all inside
    alone = model.predict(image, points=[[5, 6]], labels=[1])
    np.testing.assert_allclose(several.logits[1:], alone.logits, atol=1e-4)
    assert several.masks.shape == (2, 1, 50, 66)


def test_an_image_that_comes_back_is_encoded_once(model, image, encodings, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    other = 255 - image
    for each in (image, image.copy(), tmp_path / "a.png", Image.fromarray(image)):
        model.predict(each, boxes=BOXES)
    assert encodings.count("encoder") == 1
    model.predict(other, boxes=BOXES)
    model.predict(image, boxes=BOXES)  # the earlier one is still kept
    assert encodings.count("encoder") == 2
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert turned.tobytes() != image.tobytes()
    same_bytes = image.reshape(66, 50, 3)  # the same bytes are another image
    model.predict(same_bytes, boxes=[[1, 1, 40, 40]])
    assert encodings.count("encoder") == 3


def test_sams_names_on_the_model(model, image):
    model.set_image(image)
    ours = model.predict(image, points=[[20, 18], [3, 3]], labels=[1, 0], multimask=True)
    masks, scores, logits = model.predict(
        point_coords=np.array([[20, 18], [3, 3]]),
        point_labels=np.array([1, 0]),
        box=None,
        mask_input=None,
        multimask_output=True,
    )
    np.testing.assert_array_equal(masks, ours.masks[0] == 1)
    assert (masks.shape, masks.dtype) == ((3, 50, 66), bool)
    np.testing.assert_array_equal(scores, ours.ious[0])
    np.testing.assert_array_equal(logits, ours.logits[0])
    boxed = model.predict(box=np.array(BOXES[0]), mask_input=logits[:1])
    assert boxed.masks.shape == (1, 1, 50, 66)


def test_bgr_is_turned(model, image):
    model.set_image(image[..., ::-1].copy(), "BGR")
    turned = model.predict(boxes=BOXES)
    np.testing.assert_array_equal(turned.logits, model.predict(image, boxes=BOXES).logits)


def test_a_volume_with_3d_boxes_and_its_slices(model, image, tmp_path):
    stack = np.stack([image[..., 0], 255 - image[..., 0], image[..., 1], image[..., 2]])
    result = model.segment(stack, boxes_3d=[[5, 6, 1, 40, 30, 3]], propagate=False)
    assert result.labels.shape == (4, 50, 66)
    assert result.slices == (1, 2)
    for z in (1, 2):
        alone = model.predict(stack[z], boxes=[BOXES[0]])
        np.testing.assert_array_equal(result.labels[z], alone.masks[0, 0])
        np.testing.assert_array_equal(result.masks[0, 0, z], alone.masks[0, 0])
    assert not result.labels[[0, 3]].any()
    here = model.predict(stack, boxes=[BOXES[0]], slice_index=2)
    np.testing.assert_array_equal(here.masks[0, 0], result.labels[2])
    with pytest.raises(InputError, match="4 slices"):
        model.predict(stack, boxes=[BOXES[0]])
    saved = result.save(tmp_path / "new" / "mask.npz")
    with np.load(saved) as content:
        np.testing.assert_array_equal(content["segs"], result.labels)


def test_segment_and_predict_agree_on_the_label_map(model, image):
    kept, labels = (call(image, boxes=BOXES) for call in (model.predict, model.segment))
    np.testing.assert_array_equal(kept.labels, labels.labels)
    np.testing.assert_array_equal(kept.pixels, kept.masks.sum((2, 3)))
    np.testing.assert_array_equal(kept.pixels, labels.pixels)
    # What a later prompt covers is gone from a label map alone.
    covered = kept.masks[0, 0] * (1 - kept.masks[1, 0])
    np.testing.assert_array_equal(labels.masks[0, 0], covered)


def test_the_boxes_of_a_file_are_its_prompts(model, image, tmp_path):
    np.savez(tmp_path / "a.npz", imgs=image, boxes=np.array(BOXES))
    own = model.predict(tmp_path / "a.npz")
    np.testing.assert_array_equal(own.masks, model.predict(image, boxes=BOXES).masks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "no prompt"),
        ({"mask_input": np.zeros((1, 32, 32), np.float32)}, "alone is no prompt"),
        ({"boxes": [[5, 6, 40]]}, "expected numbers of shape"),
        ({"boxes": "all"}, "expected numbers"),
        ({"boxes": [[[5, 6, 40, 30]]]}, "expected numbers of 1 or 2 axes"),
        ({"boxes": [[5, 6, 40], [1]]}, "boxes of list"),
        ({"boxes": [[5, 6, 400, 30]]}, "outside the image"),
        ({"boxes": BOXES, "box": BOXES[0]}, "the same"),
        ({"points": [[5, 6]], "labels": [1, 0]}, "one label a point"),
        ({"points": [[5, 6]], "labels": [3]}, "labels"),
        ({"labels": [1]}, "no prompt|one is missing"),
        ({"boxes": BOXES, "slice_index": 2}, "slices 0–0"),
        ({"boxes": BOXES, "mask_input": np.zeros((2, 3, 3), np.float32)}, "mask_input"),
        ({"boxes": BOXES[0], "mask_input": np.zeros((2, 32, 32), np.float32)}, "one each"),
        ({"boxes_3d": [[1, 2, 0, 6, 8, 1]]}, "2D image"),
        ({"boxes": BOXES, "slice_index": 0.0}, "whole number"),
        ({"boxes": BOXES, "slice_index": True}, "whole number"),
        ({"boxes": BOXES, "window": (40,)}, "two numbers"),
        ({"points": [[5, 6], [7, 8]], "labels": [-1, -1]}, "no point"),
        ({"boxes": np.ma.masked_array(BOXES, mask=[[0] * 4, [1] * 4])}, "masked"),
    ],
)
def test_prompts_that_are_none(model, image, words, message):
    with pytest.raises(InputError, match=message):
        model.predict(image, **words)


def test_masks_of_a_whole_batch_do_not_take_the_first_of_too_many(model, image):
    boxes = np.tile([BOXES[0]], (MAX_PROMPTS, 1))
    side = model.preprocessing.mask_side
    masks = np.zeros((MAX_PROMPTS + 1, side, side), np.float32)
    with pytest.raises(InputError, match="one each"):
        model.predict(image, boxes=boxes, mask_input=masks)


def test_no_boxes_are_not_those_of_the_file(model, image, tmp_path):
    """What a detector gives that found nothing."""
    np.savez(tmp_path / "a.npz", imgs=image, boxes=np.array(BOXES))
    with pytest.raises(InputError, match="0 boxes"):
        model.predict(tmp_path / "a.npz", boxes=np.zeros((0, 4)))


def test_no_image_is_said(model):
    with pytest.raises(InputError, match="set_image"):
        model.predict(boxes=BOXES)


def test_an_image_that_cannot_be_used_does_not_leave_the_one_before(model, image, tmp_path):
    for call in (model, db.SamPredictor(model)):
        call.set_image(image)
        with pytest.raises(InputError, match="no such file"):
            call.set_image(tmp_path / "none.png")
        with pytest.raises(InputError, match="set_image"):
            call.predict(box=np.array(BOXES[0]))


def test_none_is_no_image_although_one_was_set(model, image):
    model.set_image(image)  # cv2.imread gives None for a file that it cannot read
    with pytest.raises(InputError, match="NoneType"):
        model.predict(None, boxes=BOXES)


def test_what_the_caller_writes_later_changes_no_result(model, image):
    given, boxes = image.copy(), np.array(BOXES)
    model.set_image(given)
    result = model.predict(boxes=boxes)
    text, picture = repr(result), result.plot().tobytes()
    given[:], boxes[:] = 0, [1, 1, 3, 3]
    assert (repr(result), result.plot().tobytes()) == (text, picture)
    np.testing.assert_array_equal(model.predict(boxes=BOXES).logits, result.logits)


def test_threads_get_the_masks_of_their_own_image(model, image):
    images = [np.ascontiguousarray(image[: 48 - row, row:]) for row in range(4)]
    expected = [model.predict(each, boxes=[[1, 1, 40, 40]]).masks for each in images]
    ask = model.predictor.predict_boxes

    def slow(boxes):
        time.sleep(0.02)  # lets the other threads set their image
        return ask(boxes)

    model.predictor.predict_boxes = slow
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.predict(i, boxes=[[1, 1, 40, 40]]).masks, images * 3))
    for masks, right in zip(found, expected * 3, strict=True):
        np.testing.assert_array_equal(masks, right)


def test_prompts_may_be_bfloat16_tensors(model, image):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(BOXES).bfloat16()
    np.testing.assert_array_equal(
        model.predict(image, boxes=tensor).masks, model.predict(image, boxes=BOXES).masks
    )


def test_masks_that_would_fill_memory_are_refused_before_work(model, encodings):
    side = 4000
    boxes = np.tile([[1, 1, 50, 50]], (MAX_MASK_PIXELS // side**2 + 1, 1))
    with pytest.raises(InputError, match="mask pixels"):
        model.predict(np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side)), boxes=boxes)
    assert encodings == []


def test_weights_open_in_pytorch(tmp_path, image):
    torch = pytest.importorskip("torch")
    from dbsam_deploy.model.weights import shipped_checkpoint

    path = shipped_checkpoint()
    torch.manual_seed(0)
    model = db.load(path, image_size=64)
    assert model.backend == "pytorch-cpu"
    assert model.preprocessing.image_size == 64
    assert model.note == ""
    default = db.load(backend="pytorch", image_size=64)
    np.testing.assert_array_equal(
        model.predict(image, boxes=BOXES).logits, default.predict(image, boxes=BOXES).logits
    )
    assert model.to("cpu") is model
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        db.load(tmp_path / "bad.pth")


@pytest.mark.openvino
def test_another_backend_of_the_same_export(tiny_artefact, image):
    reference = db.load(str(tiny_artefact.folder)).predict(image, boxes=BOXES)
    model = db.load(tiny_artefact.folder / "manifest.json", backend="openvino")
    assert model.backend.startswith("openvino")
    model.set_image(image)
    found = model.to("cpu").predict(boxes=BOXES)  # where it is: not opened anew
    np.testing.assert_allclose(found.logits, reference.logits, atol=1e-3)


def test_without_a_name_the_newest_export_is_opened(make_artefact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no export below build.* name the folder of one$"):
        db.load()
    make_artefact(tmp_path / "build" / "fp32")
    assert db.load().name == "tiny_test fp32"


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("missing/folder", {}, "no such folder"),
        ("missing.pth", {}, "missing.pth"),
        ("{tiny}", {"backend": "tensorflow"}, "expected one of"),
        ("{tiny}", {"variant": "db_sam"}, "goes with"),
        ("{tiny}", {"device": "tpu"}, "runs on cpu or cuda"),
        ("ftp://host", {}, "triton://"),
        ("triton://localhost:1/x", {}, "host:port"),
        ("triton://localhost:1", {"device": "cpu"}, "device"),
        ("triton://localhost:1", {"backend": "openvino"}, "backend"),
        (None, {"backend": "triton"}, "address"),
        ("triton", {}, "no such folder"),  # a name like a scheme's is a path
        ("{tiny}/encoder.onnx", {}, "name its folder"),
        ("{tiny}", {"shared_memory": True}, "shared_memory goes with a server"),
        ("{tiny}", {"timeout_s": 5}, "timeout_s goes with a server"),
    ],
)
def test_what_cannot_be_opened(tiny_artefact, source, words, message):
    named = source and source.format(tiny=tiny_artefact.folder)
    with pytest.raises((InputError, CheckpointError), match=message):
        db.load(named, **words)


@pytest.mark.triton
@pytest.mark.parametrize("scheme", ["triton", "triton+http"])
def test_a_server_gives_what_its_export_gives(triton, model, image, scheme, tmp_path):
    url = triton.grpc_url if scheme == "triton" else triton.http_url
    stack = np.stack([image[..., 0], 255 - image[..., 0], image[..., 1]])[..., None]
    asked = [
        (image, {"boxes": BOXES}),
        (image, {"points": [[20, 18], [3, 3]], "labels": [1, 0], "multimask": True}),
        (image, {"boxes": BOXES, "points": [[[20, 18]], [[30, 30]]]}),
        (stack, {"boxes_3d": [[5, 6, 0, 40, 30, 2], [20, 10, 1, 60, 45, 3]]}),
    ]
    with db.load(f"{scheme}://{url}") as served:
        assert served.note == model.note == "test graphs"
        for each, prompts in asked:
            here, there = model.predict(each, **prompts), served.predict(each, **prompts)
            assert there.note == here.note == model.note
            np.testing.assert_array_equal(there.masks, here.masks)
            np.testing.assert_array_equal(there.ious, here.ious)
            np.testing.assert_array_equal(there.labels, here.labels)
            if here.logits is not None:
                np.testing.assert_array_equal(there.logits, here.logits)
        boxes = np.array([[5, 6, 0, 40, 30, 2], [20, 10, 1, 60, 45, 3]])
        here, there = (
            one.segment(stack, boxes_3d=boxes, propagate=False) for one in (model, served)
        )
        np.testing.assert_array_equal(there.labels, here.labels)
        first = served.predict(image, boxes=BOXES)
        again = served.predict(image, boxes=BOXES, mask_input=first.logits[:, 0])
        ours = model.predict(image, boxes=BOXES, mask_input=first.logits[:, 0])
        np.testing.assert_array_equal(again.masks, ours.masks)
        with pytest.raises(InputError, match="server"):
            served.to("cuda")


def test_no_server_is_one_error(image):
    with (
        db.load("triton://127.0.0.1:9", timeout_s=2.0) as model,
        pytest.raises(ServingError, match="no Triton server answers"),
    ):
        model.predict(image, boxes=BOXES)


@pytest.mark.parametrize(
    ("address", "url"),
    [("[::1]:8009", "[::1]:8009"), ("[::1]", "[::1]:8001"), ("host", "host:8001")],
)
def test_the_usual_port_of_an_address_without_one(address, url):
    pytest.importorskip("tritonclient.grpc")
    with db.load(f"triton://{address}") as model:
        assert model.name == f"server {url}"


@pytest.mark.parametrize("scheme", ["triton", "triton+http"])
def test_a_closed_server_model_says_so_and_closes_again(image, scheme):
    pytest.importorskip("tritonclient.grpc")
    pytest.importorskip("tritonclient.http")
    with db.load(f"{scheme}://localhost:1") as model:
        pass
    model.close()
    with pytest.raises(InputError, match="is closed"):
        model.predict(image, boxes=BOXES)


def test_a_servers_model_may_be_asked_in_any_thread(image):
    pytest.importorskip("tritonclient.http")
    with (
        db.load("triton+http://localhost:1") as model,
        ThreadPoolExecutor(1) as pool,
        pytest.raises(db.NoServerError),  # it asks, and no server answers
    ):
        pool.submit(model.predict, image, boxes=BOXES).result(timeout=30)


def test_another_gpu_is_not_taken_for_the_first(model):
    with pytest.raises(InputError, match="first GPU"):
        model.to("cuda:1")
