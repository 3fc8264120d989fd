"""Histograms and thresholds: what each calibrator keeps, and that nothing is lost on the way."""

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from dbsam_deploy.core.errors import EngineError, ExportError, InputError
from dbsam_deploy.quantization.observers import BINS, Histogram, observe


def histogram(*arrays):
    found = Histogram()
    for array in arrays:
        found.add(np.asarray(array, np.float32), axis=-1)
    return found


@pytest.fixture
def normal(rng):
    return rng.standard_normal((64, 1000)).astype(np.float32)


def test_no_value_is_lost_when_the_range_grows(rng):
    parts = [rng.standard_normal((10, 100)) * scale for scale in (1, 0, 30, 1000, 2)]
    found = histogram(*parts)
    assert found.counts.sum() == 5000
    assert found.largest == pytest.approx(np.abs(parts).max(), rel=1e-6)
    assert found.limit >= found.largest
    np.testing.assert_allclose(found.channels, np.abs(parts).max((0, 1)), rtol=1e-6)


def test_order_of_images_changes_no_threshold(rng):
    parts = [rng.standard_normal((10, 1000)) * scale for scale in (1, 3, 7)]
    for name in ("max", "percentile", "entropy", "mse"):
        there = histogram(*parts).threshold(name, 99.9)
        back = histogram(*parts[::-1]).threshold(name, 99.9)
        assert there == pytest.approx(back, rel=0.06), name


def test_percentile_is_that_of_the_magnitudes(normal):
    found = histogram(normal).threshold("percentile", 99.0)
    assert found == pytest.approx(np.percentile(np.abs(normal), 99), rel=0.01)


def quantisation_error(values, threshold):
    step = threshold / 127
    return float(((np.clip(np.round(values / step), -127, 127) * step - values) ** 2).mean())


@pytest.mark.parametrize("shape", ["normal", "outliers", "uniform", "laplace"])
def test_mse_is_close_to_the_best_threshold(rng, shape):
    values = {
        "normal": rng.standard_normal(20000),
        "outliers": np.append(rng.standard_normal(20000), [60.0]),
        "uniform": rng.uniform(-1, 1, 20000),
        "laplace": rng.laplace(size=20000),
    }[shape].astype(np.float32)
    found = histogram(values[None]).threshold("mse", 0)
    errors = [quantisation_error(values, t) for t in np.linspace(0.05, 1, 200) * abs(values).max()]
    assert quantisation_error(values, found) <= 1.1 * min(errors)


def test_entropy_clips_an_outlier_and_keeps_a_uniform_range(rng):
    spread = rng.standard_normal((10, 2000))
    spread[0, 0] = 100
    clipped = histogram(spread).threshold("entropy", 0)
    assert 3 < clipped < 20
    assert histogram(rng.uniform(-1, 1, (10, 2000))).threshold("entropy", 0) > 0.9


@pytest.mark.parametrize("name", ["max", "percentile", "entropy", "mse"])
def test_zeros_have_no_range_and_one_value_has_its_own(name):
    assert histogram(np.zeros((2, 5))).threshold(name, 99.9) == 0
    constant = histogram(np.full((2, 5), -3.0)).threshold(name, 99.9)
    assert constant == pytest.approx(3, rel=2 / BINS) if name != "entropy" else 0 < constant <= 3


def test_unknown_calibrator_and_infinite_values_are_refused(normal):
    with pytest.raises(InputError, match="'mean': expected max, percentile"):
        histogram(normal).threshold("mean", 99)
    with pytest.raises(EngineError, match="not finite"):
        histogram(np.array([[1.0, np.inf]]))


@pytest.fixture
def doubling(tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Neg", ["twice"], ["y"]),
    ]
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xy"}
    inner = helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"]], value_info=[inner])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "g.onnx",
    )
    return tmp_path / "g.onnx"


def test_observe_sees_inputs_and_inner_tensors_of_every_image(doubling):
    seen = []

    def feeds():
        for scale in (1, 5):
            seen.append(scale)
            yield {"x": np.array([[scale, 0, -3]], np.float32)}

    found = observe(doubling, {"x": -1, "twice": 1}, feeds())
    assert seen == [1, 5]
    assert found["x"].largest == 5
    np.testing.assert_array_equal(found["twice"].channels, [10, 0, 6])


def test_observe_refuses_no_image_and_unknown_tensors(doubling):
    with pytest.raises(InputError, match="no calibration image"):
        observe(doubling, {"x": -1}, [])
    with pytest.raises(ExportError, match="no type is known for"):
        observe(doubling, {"z": -1}, [])
