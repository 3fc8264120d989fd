"""The graphs on OpenVINO: the values of ONNX Runtime, batch by batch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.fusions import run_onnx
from support.references import check_close, prompt_feed

from dbsam_deploy.artefact import Artefact, graph_file, load_artefact, write_artefact
from dbsam_deploy.core.contract import graph_specs
from dbsam_deploy.core.errors import EngineError, InputError, MissingError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.extras import pip_line
from dbsam_deploy.files.private import keep
from dbsam_deploy.fusions import expected_counts, fuse_file
from dbsam_deploy.model import DbSam
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions import openvino_session
from dbsam_deploy.sessions.float_head import split_graph
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.parity import cosine

pytestmark = pytest.mark.openvino

SIZE = 64


def image(batch: int, size: int = SIZE) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng().standard_normal((batch, 3, size, size), np.float32)}


def boxes(batch: int, count: int, grid: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {
        "image_embeddings": rng.standard_normal((batch, 256, grid, grid), np.float32),
        "boxes": rng.random((batch, count, 4), np.float32) * grid * 16,
    }


@pytest.fixture(scope="module")
def fused(
    shipped_model: DbSam, float_graphs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artefact, PytorchSession]:
    """The shipped model, whose encoder has all three fused operators, and its reference."""
    folder, config = tmp_path_factory.mktemp("fused"), shipped_model.config
    names = ("encoder", "decoder", "prompt_decoder")
    for name in names:
        shutil.copy(float_graphs / f"{name}.onnx", folder)
    counts = fuse_file(folder / "encoder.onnx", config)
    assert counts == expected_counts(config)
    assert (
        min(counts[op] for op in ("ms_deform_attn", "channel_attention", "rel_pos_attention")) > 0
    )
    graphs = {name: graph_file(folder / f"{name}.onnx", folder) for name in names}
    write_artefact(Artefact(folder, config.name, "fp32", config.frame, graphs))
    return load_artefact(folder), PytorchSession(shipped_model)


def test_the_encoder_with_functions_equals_pytorch(fused, tmp_path: Path) -> None:
    artefact, reference = fused
    session = OpenvinoSession(artefact, cache=tmp_path)
    assert session.backend == "openvino-cpu-float32"
    for batch in (2, 1):
        feed = image(batch, artefact.preprocessing.image_size)
        found = session.run("encoder", feed)
        expected = reference.run("encoder", feed)
        assert list(found) == list(expected)
        check_close(found["image_embeddings"], expected["image_embeddings"], "float32")


def test_an_output_that_is_cast_at_the_end_has_its_own_name(tmp_path: Path) -> None:
    """OpenVINO drops such a cast, and the value then has two names, one of which is the first."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]>
        encoder (float[batch,3,64,64] image) => (float[batch,256,4,4] image_embeddings) {
            shape = Constant <value_ints = [256, 3, 16, 16]> ()
            half = Cast <to = 10> (image)
            wide = ConstantOfShape <value = float[1] {0.01}> (shape)
            weight = Cast <to = 10> (wide)
            a_sum = Conv <strides = [16, 16]> (half, weight)
            image_embeddings = Cast <to = 1> (a_sum)
        }"""
    )
    onnx.save(model, tmp_path / "encoder.onnx")
    graphs = {"encoder": graph_file(tmp_path / "encoder.onnx", tmp_path)}
    artefact = Artefact(tmp_path, "cast", "fp16", Preprocessing(64), graphs)
    feed = image(1, 64)
    found = OpenvinoSession(artefact, cache=tmp_path / "cache").run("encoder", feed)
    (expected,) = run_onnx(model, feed)
    check_close(found["image_embeddings"], expected, "float16")


def test_bfloat16_is_near_and_not_float32(fused, tmp_path: Path) -> None:
    artefact, reference = fused
    feed = image(1, artefact.preprocessing.image_size)
    expected = reference.run("encoder", feed)["image_embeddings"]
    found = OpenvinoSession(artefact, precision="bfloat16", cache=tmp_path).run("encoder", feed)
    check_close(found["image_embeddings"], expected, "bfloat16")
    assert found["image_embeddings"].dtype == np.float32


def test_what_int8_leaves_in_float_stays_float32_in_bfloat16(
    exported_graph: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    plan = load_recipe("int8").quantization
    feed = image(1)
    source = exported_graph("lite_medsam", "encoder", "fp8")
    (tmp_path / "scratch").mkdir()
    ready = calibrate(source, plan, lambda: [feed], tmp_path / "scratch")
    path = quantize_graph(ready, plan, tmp_path / "encoder.onnx").path
    graphs = {"encoder": graph_file(path, tmp_path)}
    how = Preprocessing(SIZE, "lite_medsam", embedding_stride=4)
    artefact = Artefact(tmp_path, "lite_medsam", "int8", how, graphs)
    embeddings, parts = {}, {}
    for precision in ("float32", "bfloat16"):
        session = OpenvinoSession(artefact, precision=precision, cache=tmp_path / "cache")
        embeddings[precision] = session.run("encoder", feed)["image_embeddings"]
        parts[precision] = [part.model for part in session.compiled("encoder")]
    split = split_graph(onnx.load(path), graph_specs(how)["encoder"])
    assert [part.lowered for part in split] == [False, True] * 4, "stem, downsampling, neck"
    assert [len(found) for found in parts.values()] == [1, len(split)]
    values = feed["image"]
    for compiled, part in zip(parts["bfloat16"], split, strict=True):
        found = compiled(values)[0]
        if not part.lowered:
            (expected,) = run_onnx(part.graph, {part.graph.graph.input[0].name: values})
            check_close(found, expected, "float32")
        values = found
    np.testing.assert_array_equal(values, embeddings["bfloat16"])
    assert not np.array_equal(embeddings["float32"], embeddings["bfloat16"])
    assert cosine(embeddings["float32"], embeddings["bfloat16"]) > 0.9


def test_coordinates_at_the_far_corner_stay_float32_in_bfloat16(fused, tmp_path: Path) -> None:
    """Half a pixel there is less than what bfloat16 tells apart."""
    artefact, _ = fused
    side = artefact.preprocessing.image_size
    corner = np.array([[[side - 9.5, side - 7, side - 1, side - 0.5]]], np.float32)
    feed = boxes(1, 1, artefact.preprocessing.grid)
    session = OpenvinoSession(artefact, lowered=("decoder",), cache=tmp_path)
    assert session.backend == "openvino-cpu-float32-decoder-bfloat16"
    masks = []
    for shift in (0, 0.125):
        found = session.run("decoder", {**feed, "boxes": corner - np.float32(shift)})
        masks.append(found["low_res_masks"])
    assert not np.array_equal(*masks)
    head, _ = (part.model for part in session.compiled("decoder"))
    spec = graph_specs(artefact.preprocessing)["decoder"]
    split, _ = split_graph(onnx.load(artefact.path("decoder")), spec)
    for found, expected in zip(
        head({"boxes": corner}).values(), run_onnx(split.graph, {"boxes": corner}), strict=True
    ):
        check_close(found, expected, "float32")
    exact = OpenvinoSession(artefact, cache=tmp_path).run("decoder", {**feed, "boxes": corner})
    assert not np.array_equal(masks[0], exact["low_res_masks"])
    assert cosine(masks[0], exact["low_res_masks"]) > 0.999


def test_both_decoders_equal_onnx_runtime(fused, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    artefact, _ = fused
    ours, theirs = OpenvinoSession(artefact, cache=tmp_path), OnnxRuntimeSession(artefact)
    grid = artefact.preprocessing.grid
    rng = np.random.default_rng()
    feeds = [("decoder", boxes(1, 1, grid)), ("decoder", boxes(1, 5, grid))]
    feeds += [("decoder", boxes(2, 3, grid))]
    feeds += [
        ("prompt_decoder", prompt_feed(rng, box=box, points=points, size=artefact.preprocessing))
        for box, points in ((True, 2), (False, 1))
    ]
    for graph, feed in feeds:
        found, expected = ours.run(graph, feed), theirs.run(graph, feed)
        assert list(found) == list(expected)
        for name, value in expected.items():
            check_close(found[name], value, "float32", name)


def test_compiled_models_are_kept_in_the_folder(tiny_artefact: Artefact, tmp_path: Path) -> None:
    feed = image(1, tiny_artefact.preprocessing.image_size)
    cache = tmp_path / "cache"
    first = OpenvinoSession(tiny_artefact, cache=cache).run("encoder", feed)
    (blob,) = cache.glob("*.blob")
    written = blob.stat().st_ino
    again = OpenvinoSession(tiny_artefact, cache=cache).run("encoder", feed)
    assert [path.stat().st_ino for path in cache.glob("*.blob")] == [written]
    np.testing.assert_array_equal(first["image_embeddings"], again["image_embeddings"])


def test_a_new_compiled_model_takes_the_place_of_the_longest_unused(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch
) -> None:
    size = tiny_artefact.preprocessing.image_size
    session = OpenvinoSession(tiny_artefact, cache=tmp_path)
    (oldest,) = [part.path for part in session.compiled("encoder")]
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(openvino_session, "KEPT_BYTES", int(1.5 * oldest.stat().st_size))
    (newest,) = [part.path for part in session.compiled("encoder", 2)]
    assert list(tmp_path.glob("*.blob")) == [newest]
    assert len(session.run("encoder", image(2, size))["image_embeddings"]) == 2


def test_mistakes(tiny_artefact: Artefact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected float32 or bfloat16"):
        OpenvinoSession(tiny_artefact, precision="float16")
    session = OpenvinoSession(tiny_artefact, cache=tmp_path)
    with pytest.raises(InputError, match="image: shape"):
        session.run("encoder", image(1, 256))


def test_a_graph_that_openvino_does_not_read(tiny_artefact: Artefact, tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Unheard", ["image"], ["image_embeddings"], domain="nowhere")],
        "encoder",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["b", 3, 128, 128])],
        [
            onnx.helper.make_tensor_value_info(
                "image_embeddings", onnx.TensorProto.FLOAT, ["b", 256, 8, 8]
            )
        ],
    )
    path = tmp_path / "encoder.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    graphs = {"encoder": graph_file(path, tmp_path)}
    broken = Artefact(tmp_path, "x", "fp32", tiny_artefact.preprocessing, graphs)
    with pytest.raises(EngineError, match="does not compile encoder"):
        OpenvinoSession(broken, cache=tmp_path).run("encoder", image(1, 128))


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_compiled_model_is_made_again(
    tiny_artefact: Artefact, tmp_path: Path, damage: bytes | None
) -> None:
    cache, feed = tmp_path / "cache", image(1, 128)
    first = OpenvinoSession(tiny_artefact, cache=cache).run("encoder", feed)
    (blob,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, blob.suffix) == (0o700, ".blob")
    whole = blob.read_bytes()
    written = blob.stat().st_ino
    if damage is not None:
        blob.write_bytes(damage)
    again = OpenvinoSession(tiny_artefact, cache=cache).run("encoder", feed)
    np.testing.assert_array_equal(first["image_embeddings"], again["image_embeddings"])
    if damage is None:
        assert blob.stat().st_ino == written  # it was used
    else:
        assert [len(path.read_bytes()) for path in cache.iterdir()] == [len(whole)]


def test_a_whole_compiled_model_that_openvino_does_not_take_is_made_again(
    tiny_artefact: Artefact, tmp_path: Path
) -> None:
    feed = image(1, 128)
    first = OpenvinoSession(tiny_artefact, cache=tmp_path).run("encoder", feed)
    (blob,) = tmp_path.iterdir()
    kept = blob.name
    other = keep(tmp_path, kept.split("-")[0], ".blob", b"of another machine")
    blob.unlink()
    again = OpenvinoSession(tiny_artefact, cache=tmp_path).run("encoder", feed)
    np.testing.assert_array_equal(first["image_embeddings"], again["image_embeddings"])
    assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_a_cache_that_others_may_write_is_refused(tiny_artefact: Artefact, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(EngineError, match=r"chmod go-w .*--engine-cache"):
        OpenvinoSession(tiny_artefact, cache=tmp_path)


def test_missing_openvino_names_the_extra(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingError, match=re.escape(pip_line("openvino"))):
        OpenvinoSession(tiny_artefact)
