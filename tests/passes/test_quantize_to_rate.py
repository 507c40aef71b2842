"""quantize-to-rate: ONNX Runtime judges the outputs, store-weights the bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.numerics.rates import entropy_bits
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.quantize_to_rate import QuantizeToRate, RateOverride
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]
Feeds = list[dict[str, Array]]

TOTAL = "all of them"
LAYERS = "t = Gather(table, ids) h = MatMul(t, first) r = Relu(h) y = MatMul(r, second)"
NETWORK = f"g (int64[N] ids) => (float[N,K] y) {{ {LAYERS} }}"


def model_of(text: str, **arrays: Array) -> Model:
    """A model of ONNX text, with initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def network() -> Model:
    """A table and two products; the second one adds a little of its many outputs to the first."""
    mixing = np.eye(32, dtype=np.float32) + noise(32, 32, seed=9)
    return model_of(
        NETWORK,
        table=noise(200, 32, seed=1) @ mixing,
        first=noise(32, 48, seed=2),
        second=noise(48, 40, seed=3),
    )


def feeds(count: int = 24, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(0, 200, 20)} for _ in range(count)]


def run(model: Model, data: Feeds | None, **options: Any) -> dict[str, Decision]:
    samples = None if data is None else Samples.from_feeds(data)
    result = QuantizeToRate(**options).apply(model, Context(samples=samples))
    assert isinstance(result, PassResult)
    return {decision.where: decision for decision in result.decisions}


def sqnr(reference: Model, candidate: Model) -> float:
    with open_session(reference) as before, open_session(candidate) as after:
        return compare_outputs(before, after, feeds(seed=77)).sqnr_db


def bits_of(model: Model) -> dict[str, float]:
    """The entropy of the values, by name."""
    return {weight.name: entropy_bits(weight.values) for weight in model.weights()}


@settings(max_examples=15, deadline=None)
@given(st.floats(1.0, 6.0))
def test_without_samples_no_weight_takes_more_than_the_rate(rate: float) -> None:
    model = network()
    told = run(model, None, rate=rate)
    for name, bits in bits_of(model).items():
        assert bits <= rate + 0.01  # the step has 11 digits
        assert told[name].figures["entropy_bits"] == pytest.approx(bits, abs=1e-3)
        assert "rounded to nearest: no samples were given" in told[name].reason


@pytest.mark.parametrize("rate", [2.5, 4.0, 6.0])
def test_the_mean_is_the_rate(rate: float) -> None:
    model = network()
    told = run(model, feeds(), rate=rate)
    sizes = {weight.name: weight.size for weight in model.weights()}
    mean = sum(bits * sizes[name] for name, bits in bits_of(model).items()) / sum(sizes.values())
    assert told[TOTAL].figures["entropy_bits"] == pytest.approx(mean, abs=1e-3)
    # Steps of 11 digits and feedback move the entropy by hundredths.
    assert mean == pytest.approx(rate, abs=0.06)


def test_more_bits_are_nearer_to_float() -> None:
    found = []
    for rate in (2.0, 3.0, 4.0, 5.0):
        model = network()
        run(model, feeds(), rate=rate)
        found.append(sqnr(network(), model))
    # A bit gives 6 dB.
    assert (np.diff(found) > 4).all()


def test_bits_go_where_the_outputs_need_them() -> None:
    def network() -> Model:
        """Two products of equal size, of which one adds a twentieth to the outputs."""
        return model_of(
            "g (float[N,64] x, float factor) => (float[N,48] y) "
            "{ a = MatMul(x, loud) b = MatMul(x, faint) c = Mul(b, factor) y = Add(a, c) }",
            loud=noise(64, 48, seed=1),
            faint=noise(64, 48, seed=2),
        )

    def data(seed: int) -> Feeds:
        factor = np.array(0.05, np.float32)
        return [{"x": noise(8, 64, seed=seed + each), "factor": factor} for each in range(20)]

    found = {}
    for allocation in ("equal", "effects"):
        model = network()
        told = run(model, data(0), rate=4.0, allocation=allocation)
        with open_session(network()) as before, open_session(model) as after:
            found[allocation] = compare_outputs(before, after, data(100)).sqnr_db
    assert found["effects"] > found["equal"] + 5
    alone = [float(told[name].figures["alone_db"]) for name in ("faint", "loud")]
    bits = [bits_of(model)[name] for name in ("loud", "faint")]
    # A bit for each 6 dB between their effects.
    assert bits[0] - bits[1] == pytest.approx((alone[0] - alone[1]) / 6.02, abs=0.1)
    assert bits[0] > bits[1] + 3


def test_feedback_beats_rounding_to_nearest() -> None:
    """At the same rates: inputs that depend on each other let errors make up for each other."""
    nearest, fed_back = network(), network()
    run(nearest, feeds(), rate=4.0, allocation="equal", max_inputs=1)
    told = run(fed_back, feeds(), rate=4.0, allocation="equal")
    assert "least error of the layer's output" in told["first"].reason
    assert "its role is embedding" in told["table"].reason
    assert sqnr(network(), fed_back) > sqnr(network(), nearest) + 0.5


def test_the_file_takes_what_was_asked_for(tmp_path: Path) -> None:
    model = model_of(
        "g (float[N,256] x) => (float[N,512] y) { y = MatMul(x, w) }", w=noise(256, 512)
    )
    pipeline = Pipeline([QuantizeToRate(rate=4.0)])
    stored = pipeline.passes[-1]
    assert isinstance(stored, StoreWeights)
    assert stored.level == "smallest"
    data = Samples.from_feeds([{"x": noise(8, 256, seed=each)} for each in range(4)])
    result = pipeline.run(model, samples=data, measure=False)
    result.model.save(tmp_path / "small.onnx")
    bits = 8 * (tmp_path / "small.onnx").stat().st_size / (256 * 512)
    assert bits < 4.4  # tables, decoder and manifest of a small file


def test_outliers_keep_their_size() -> None:
    weight = noise(64, 64)
    weight.reshape(-1)[::41] *= 400
    model = model_of("g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=weight)
    run(model, None, rate=6.0)
    values = model.weights()[0].values
    assert np.unique(values).size <= 256
    large = np.abs(weight) > 20
    assert np.allclose(values[large], weight[large], rtol=0.07)


def test_overrides_and_refusals() -> None:
    model = network()
    before = model.weights()[0].values
    told = run(
        model,
        feeds(),
        rate=3.0,
        overrides=(RateOverride(nodes="table", rate=0), RateOverride(nodes="second", rate=5.5)),
    )
    assert told["table"].reason == "left alone by overrides"
    assert np.array_equal(model.weights()[0].values, before)
    assert bits_of(model)["second"] == pytest.approx(5.5, abs=0.06)
    assert bits_of(model)["first"] == pytest.approx(3.0, abs=0.06)
    again = run(model, feeds(), rate=3.0, exclude=("table",))
    assert again["first"].reason == "has no more than 256 distinct values already"
    assert TOTAL not in again
    with pytest.raises(UnknownNameError, match="tabel"):
        run(network(), feeds(), overrides=(RateOverride(nodes="tabel", rate=3),))


def test_inputs_that_are_not_finite_are_not_counted() -> None:
    text = "g (float[N,64] x) => (float[N,64] y) { l = Log(x) y = MatMul(l, w) }"
    model = model_of(text, w=noise(64, 64))
    told = run(model, [{"x": np.zeros((4, 64), np.float32)}])
    assert "rounded to nearest: its inputs hold NaN or infinity" in told["w"].reason


def test_weights_of_bodies_and_half_floats() -> None:
    half = noise(64, 64).astype(np.float16)
    text = "g (float16[N,64] x) => (float16[N,64] y) { y = MatMul(x, w) }"
    model = model_of(text, w=half)
    run(model, [{"x": noise(8, 64).astype(np.float16)}], rate=4.0)
    (weight,) = model.weights()
    assert weight.dtype == np.float16
    assert entropy_bits(weight.values) == pytest.approx(4.0, abs=0.06)
