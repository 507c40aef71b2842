"""Weight-only quantization: values on grids, stored as packed codes, run as before."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pydantic
import pytest
from onnx import numpy_helper

from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.numerics.weight_formats import block_layout, find_grid
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.quantize_weights import QuantizeWeights, WeightOverride
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 0.1, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).laplace(0, scale, shape).astype(dtype)


def network(dtype: Any = np.float32, opset: int = 17, **changes: Array) -> Model:
    """A Conv, a Gemm of its pooled output, an embedding, and a GRU over all of it."""
    kind = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        g ({kind}[N, 8, 8, 8] x, int64[N] ids) => ({kind}[1, 1, N, 32] y) {{
            h = Conv(x, conv, bias)  p = GlobalAveragePool(h)  f = Flatten(p)
            z = Gemm<transB = 1>(f, fc)  e = Gather(table, ids)  s = Add(z, e)
            t = Reshape(s, shape)
            y, last = GRU<hidden_size = 32>(t, input_gates, hidden_gates)
        }}"""
    )
    arrays = {
        "conv": noise(32, 8, 3, 3, dtype=dtype),
        "bias": noise(32, dtype=dtype),
        "fc": noise(64, 32, dtype=dtype, seed=1),
        "table": noise(50, 64, dtype=dtype, seed=2),
        "input_gates": noise(1, 96, 64, dtype=dtype, seed=3),
        "hidden_gates": noise(1, 96, 32, dtype=dtype, seed=4),
        "shape": np.array([1, -1, 64]),
    } | changes
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


WEIGHTS = ("conv", "fc", "table", "input_gates", "hidden_gates")


def quantize(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = QuantizeWeights(**options).apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def values(model: Model, name: str) -> Array:
    return next(weight.values for weight in model.weights() if weight.name == name)


def feeds() -> list[dict[str, Array]]:
    return [{"x": noise(3, 8, 8, 8, seed=5, scale=1), "ids": np.array([1, 7, 49])}]


def fidelity(before: Model, after: Model) -> float:
    return compare_outputs(open_session(before), open_session(after), feeds()).sqnr_db


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("per", ["tensor", "channel", "block"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_every_kind_of_weight_and_format(bits: int, per: Any, scheme: Any) -> None:
    before, after = network(), network()
    result, decisions = quantize(after, bits=bits, per=per, scheme=scheme)
    assert result.changed
    assert [decision.where for decision in result.decisions] == [w.where for w in before.weights()]
    for name in WEIGHTS:
        assert decisions[name].taken, decisions[name].reason
        assert decisions[name].figures["bits"] == bits
        assert float(decisions[name].figures["sqnr_db"]) > {8: 30, 4: 10, 2: 2, 1: 0}[bits]
    assert "a bias" in decisions["bias"].reason
    assert np.array_equal(values(after, "bias"), values(before, "bias"))
    assert fidelity(before, after) > {8: 30, 4: 8, 2: 0, 1: -6}[bits]


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_stored_in_so_many_bits_and_run_as_before(bits: int, opset: int) -> None:
    text = "g (float[N, 256] x) => (float[N, 512] y) { y = MatMul(x, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.append(numpy_helper.from_array(noise(256, 512), "w"))
    model = Model.from_proto(proto)
    quantize(model, bits=bits, per="block", block_size=32, scheme="asymmetric")
    quantized = model.copy()
    StoreWeights().apply(model, Context())
    # A scale of up to 7 bits and a zero point for 32 weights, 4 kB of nodes and tables.
    assert model.nbytes() < 256 * 512 * (bits + (7 + bits) / 32) / 8 + 4096
    left = [node.op_type for node in optimized_graph(model, level="basic").graph.node]
    assert left == ["MatMul"]
    feed = {"x": noise(4, 256, seed=9)}
    expected = open_session(quantized).run(feed)["y"]
    assert np.array_equal(open_session(model).run(feed)["y"], expected)
    again = StoreWeights().apply(model, Context())
    assert not again.changed


def test_better_scales_and_shorter_blocks_are_better() -> None:
    def weight_db(**options: Any) -> float:
        model = network()
        _, decisions = quantize(model, bits=4, **options)
        return float(decisions["table"].figures["sqnr_db"])

    plain = weight_db(scales="max")
    assert weight_db() > plain + 0.5
    assert weight_db(per="block", block_size=16) > weight_db() + 1
    assert weight_db(scheme="asymmetric") > weight_db()


def test_scales_go_along_output_channels() -> None:
    model = network()
    _, decisions = quantize(model, bits=4)
    axes = {"conv": 0, "fc": 0, "table": 0, "input_gates": 1, "hidden_gates": 1}
    for name, axis in axes.items():
        array = values(model, name)
        assert decisions[name].reason.endswith(f"a scale for each channel along axis {axis}")
        found = find_grid(array, block_layout(array.shape, axis))
        assert found is not None
        assert np.abs(found.codes).max() == 7


def test_blocks_that_do_not_divide_are_shortened_and_said_so() -> None:
    model = network()
    _, decisions = quantize(model, bits=4, per="block", block_size=64)
    assert "a scale for 8 elements" in decisions["conv"].reason
    assert "as 64 do not divide the 72 of a channel" in decisions["conv"].reason


@pytest.mark.parametrize("per", ["channel", "block"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_second_run_changes_nothing(per: Any, dtype: Any) -> None:
    model = network(dtype)
    options: dict[str, Any] = {"bits": 4, "per": per, "scheme": "asymmetric"}
    quantize(model, **options)
    saved = model.to_proto().SerializeToString(deterministic=True)
    result, decisions = quantize(model, **options)
    assert not result.changed
    assert decisions["fc"].reason == "is on a grid of 4 bits already"
    assert model.to_proto().SerializeToString(deterministic=True) == saved
    # Fewer bits are on the grid of more.
    assert not quantize(model, **(options | {"bits": 8}))[0].changed


def test_grids_of_other_blocks_are_kept() -> None:
    model = network()
    quantize(model, bits=4, per="block", block_size=8)
    result, decisions = quantize(model, bits=4, per="block", block_size=32)
    assert not result.changed
    assert decisions["fc"].reason == "is on a grid of 4 bits already, in blocks of 8"


def test_embeddings_may_have_other_bits() -> None:
    _, decisions = quantize(
        network(), embedding_bits=6, overrides=[WeightOverride(nodes="conv", bits=5)]
    )
    bits = {name: decisions[name].figures["bits"] for name in ("conv", "fc", "table")}
    assert bits == {"conv": 5, "fc": 8, "table": 6}


def test_half_precision_stays() -> None:
    model = network(np.float16)
    quantize(model)
    assert values(model, "fc").dtype == np.float16
    plain, stored = model.copy(), model.copy()
    StoreWeights().apply(stored, Context())
    feed = {name: array.astype(np.float16) if name == "x" else array
            for name, array in feeds()[0].items()}  # fmt: skip
    assert np.array_equal(open_session(plain).run(feed)["y"], open_session(stored).run(feed)["y"])


def test_overrides_and_their_order() -> None:
    model = network()
    bits = {"conv": 0, "*gates": 2, "input*": 4}
    overrides = [WeightOverride(nodes=pattern, bits=number) for pattern, number in bits.items()]
    _, decisions = quantize(model, overrides=overrides)
    assert decisions["conv"].reason == "left alone by overrides"
    assert decisions["input_gates"].figures["bits"] == 2
    assert decisions["hidden_gates"].figures["bits"] == 2
    assert decisions["fc"].figures["bits"] == 8
    with pytest.raises(UnknownNameError, match=r"'convv'.*'conv'"):
        quantize(network(), overrides=[WeightOverride(nodes="convv", bits=4)])


def test_an_override_of_everything() -> None:
    """Each option by itself, from the first override that gives it."""
    overrides = (
        WeightOverride(nodes="fc", bits=4, scheme="asymmetric"),
        WeightOverride(nodes="f*", per="block", block_size=16, bits=2),
        WeightOverride(nodes="conv", per="tensor", scales="max"),
    )
    _, decisions = quantize(network(), overrides=overrides)
    assert decisions["fc"].reason.startswith("4-bit codes, asymmetric, a scale for 16 elements")
    assert decisions["conv"].reason == "8-bit codes, symmetric, one scale"
    assert decisions["table"].reason.startswith("8-bit codes, symmetric, a scale for each channel")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_left_alone(bad: float) -> None:
    fc = noise(64, 32)
    fc[1, 2] = bad
    _, decisions = quantize(network(fc=fc))
    assert decisions["fc"].reason.startswith(f"fc[1, 2] is {bad}")
    assert decisions["conv"].taken


def test_dead_channels_and_outliers() -> None:
    conv, fc = noise(32, 8, 3, 3), noise(64, 32)
    conv[3] = 0
    fc[0, 0] = 1e6
    model = network(conv=conv, fc=fc)
    quantize(model, bits=4, per="block", scheme="asymmetric")
    assert not values(model, "conv")[3].any()
    assert np.isfinite(values(model, "fc")).all()
    np.testing.assert_allclose(values(model, "fc")[1:], fc[1:], atol=0.1)


def test_clustered_weights_are_left_as_they_are() -> None:
    table = np.random.default_rng(0).choice(noise(16), (50, 64))
    _, decisions = quantize(network(table=table), bits=4)
    assert decisions["table"].reason == "has no more than 16 distinct values already"


def test_scales_that_cost_more_than_they_save() -> None:
    _, decisions = quantize(network(conv=noise(32, 8, 3, 3), fc=noise(64, 32)), min_elements=1)
    assert decisions["fc"].taken
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (float[N, 2] x) => (float[N, 300] y) { y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(2, 30), "w"))
    _, decisions = quantize(Model.from_proto(proto), min_elements=1)
    assert decisions["w"].reason == "8-bit codes and 30 scales take no less than it does"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "greater than or equal to 1"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"per": "row"}, "'tensor', 'channel' or 'block'"),
        ({"overrides": [{"nodes": "conv", "bits": 9}]}, "less than or equal to 8"),
        ({"overrides": [{"nodes": "conv"}]}, "the override of 'conv' changes nothing; give one of"),
        ({"scheme": "signed"}, "'symmetric' or 'asymmetric'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        QuantizeWeights(**options)


@pytest.mark.parametrize(("recipe", "ratio"), [("int8-weights", 3.5), ("int4-weights", 6.5)])
def test_recipes(recipe: str, ratio: float) -> None:
    text = "g (float[N, 512] x) => (float[N, 512] y) { y = MatMul(x, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.append(numpy_helper.from_array(noise(512, 512), "w"))
    model = Model.from_proto(proto)
    result = Pipeline(Recipe.open(recipe).passes).run(model, measure=False)
    assert model.nbytes() / result.model.nbytes() > ratio
    # Storing twice changes nothing, nor does what quantizes find a weight to quantize.
    assert not StoreWeights().apply(result.model, Context()).changed


def test_a_real_recurrent_model(shared_models: Path) -> None:
    model = load(shared_models / "models" / "silero_vad_16k_op15.onnx")
    size = model.nbytes()
    for pass_ in Recipe.open("int8-weights").passes:
        decisions = pass_.apply(model, Context()).decisions
    taken = [decision.where for decision in decisions if decision.taken]
    assert len(taken) >= 7  # the STFT, four convolutions, and both weights of the LSTM
    StoreWeights().apply(model, Context())
    assert model.nbytes() < 0.35 * size
    open_session(model)
