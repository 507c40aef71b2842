"""prune-magnitude: how many zeros, where, and what it says."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 1.0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(dtype)


def network(w1: Array, w2: Array) -> Model:
    """A Gemm with a bias, a MatMul, a normalization and a table of embeddings."""
    kind = {"float32": "float", "float16": "float16"}[w1.dtype.name]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17]>
        g (int64[N] ids) => ({kind}[N, {w2.shape[1]}] y) {{
            e = Gather(table, ids)  h = Gemm(e, w1, b1)  n = LayerNormalization(h, s, t)
            y = MatMul(n, w2)
        }}"""
    )
    hidden = w1.shape[1]
    others = {"table": (10, w1.shape[0]), "b1": (hidden,), "s": (hidden,), "t": (hidden,)}
    values = {name: noise(*shape, seed=3, dtype=w1.dtype) for name, shape in others.items()}
    for name, array in (values | {"w1": w1, "w2": w2}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def prune(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = PruneMagnitude(**{"min_elements": 1} | options).apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def values(model: Model, name: str) -> Array:
    return next(weight.values for weight in model.weights() if weight.name == name)


def zeros(array: Array) -> float:
    return float((array == 0).mean())


def test_half_of_each_weight_by_default() -> None:
    w1, w2 = noise(30, 20), noise(20, 40, scale=100)
    model = network(w1, w2)
    result, decisions = prune(model)
    assert result.changed
    for name, before in (("w1", w1), ("w2", w2)):
        after = values(model, name)
        assert zeros(after) == 0.5
        assert np.array_equal(after[after != 0], before[after != 0])
        assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
        assert not np.signbit(after[after == 0]).any()
        assert decisions[name].reason == "the smallest 0.5 of its magnitudes became zero"
        assert decisions[name].figures["sparsity"] == 0.5
        assert decisions[name].figures["nonzero"] == before.size // 2
    open_session(model).run({"ids": np.arange(10)})


def test_every_weight_gets_a_decision_in_the_model_s_order() -> None:
    model = network(noise(30, 20), noise(20, 40))
    result, decisions = prune(model)
    assert [decision.where for decision in result.decisions] == [w.where for w in model.weights()]
    assert "an embedding table (taken by Gather)" in decisions["table"].reason
    assert "a bias (taken by Gemm)" in decisions["b1"].reason
    for name in ("s", "t"):
        assert "a normalization parameter" in decisions[name].reason


def test_embeddings_on_request() -> None:
    model = network(noise(30, 20), noise(20, 40))
    _, decisions = prune(model, embeddings=True)
    assert decisions["table"].taken
    assert zeros(values(model, "table")) == 0.5


def test_one_threshold_for_all_weights() -> None:
    w1, w2 = noise(30, 20, scale=0.01), noise(20, 40, seed=1, scale=1.0)
    model = network(w1, w2)
    _, decisions = prune(model, sparsity=0.6, scope="global")
    pruned = sum(int((values(model, name) == 0).sum()) for name in ("w1", "w2"))
    assert pruned == round(0.6 * (w1.size + w2.size))
    assert zeros(values(model, "w1")) > 0.99
    assert "the smallest 0.6 of all weights" in decisions["w2"].reason


def test_a_weight_that_vanishes_is_pointed_out() -> None:
    model = network(noise(30, 20, scale=1e-6), noise(20, 40))
    _, decisions = prune(model, sparsity=0.6, scope="global")
    assert decisions["w1"].figures["nonzero"] == 0
    assert "nothing is left of it: exclude it, or ask for less" in decisions["w1"].reason


def test_standard_deviations() -> None:
    model = network(noise(100, 100), noise(100, 200, scale=0.1))
    prune(model, threshold=1.0)
    for name in ("w1", "w2"):
        assert zeros(values(model, name)) == pytest.approx(0.6827, abs=0.02)


@settings(max_examples=30)
@given(
    st.sampled_from(
        [{}, {"sparsity": 0.9}, {"sparsity": 0.7, "scope": "global"}, {"threshold": 1.2}]
    ),
    st.integers(0, 100),
)
def test_a_second_run_changes_nothing(options: dict[str, Any], seed: int) -> None:
    model = network(noise(7, 9, seed=seed), noise(9, 5, seed=seed + 1, scale=3))
    first, _ = prune(model, **options)
    saved = model.to_proto().SerializeToString(deterministic=True)
    second, decisions = prune(model, **options)
    assert first.changed
    assert not second.changed
    assert not any(decision.taken for decision in decisions.values())
    assert model.to_proto().SerializeToString(deterministic=True) == saved


def test_sparse_enough_already() -> None:
    w1 = noise(30, 20)
    w1[10:] = 0
    model = network(w1, noise(20, 40))
    _, decisions = prune(model)
    assert not decisions["w1"].taken
    assert decisions["w1"].reason == "is as sparse as sparsity=0.5 asks for already"
    assert decisions["w1"].figures["sparsity"] == pytest.approx(2 / 3, abs=1e-5)


def test_no_sparsity_is_no_change() -> None:
    model = network(noise(30, 20), noise(20, 40))
    result, decisions = prune(model, sparsity=0.0)
    assert not result.changed
    assert decisions["w1"].reason == "sparsity=0 of 600 elements is none"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_left_alone(bad: float) -> None:
    w1 = noise(30, 20)
    w1[2, 3] = bad
    model = network(w1, noise(20, 40))
    _, decisions = prune(model)
    assert not decisions["w1"].taken
    assert decisions["w1"].reason.startswith(f"w1[2, 3] is {bad}")
    assert decisions["w2"].taken


def test_small_weights_are_left_alone_by_default() -> None:
    model = network(noise(30, 10), noise(10, 60))
    decisions = {d.where: d for d in PruneMagnitude().apply(model, Context()).decisions}
    assert decisions["w1"].reason == "has fewer elements than min_elements=512"
    assert decisions["w2"].taken


def test_half_precision_stays() -> None:
    model = network(noise(30, 20, dtype=np.float16), noise(20, 40, dtype=np.float16))
    prune(model, sparsity=0.8)
    assert values(model, "w1").dtype == np.float16
    assert zeros(values(model, "w1")) == 0.8


def test_bfloat16_stays() -> None:
    weight = noise(30, 20).astype(ml_dtypes.bfloat16)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.BFLOAT16, ["N", size])
        for name, size in (("x", 30), ("y", 20))
    )
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = Model.from_proto(helper.make_model(graph))
    prune(model, sparsity=0.8)
    assert values(model, "w").dtype == ml_dtypes.bfloat16
    assert zeros(values(model, "w")) == 0.8


def test_weights_in_branches(if_model: onnx.ModelProto) -> None:
    model = Model.from_proto(if_model)
    result, decisions = prune(model, sparsity=0.5)
    assert result.changed
    pruned = [where for where, decision in decisions.items() if decision.taken]
    assert len(pruned) == 2
    for weight in model.weights():
        assert zeros(weight.values) == (0.5 if weight.where in pruned else 0.0)
    assert "not the weight of a layer" in decisions["outer"].reason


def test_a_weight_that_is_an_output_is_left_alone() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] y, float[4, 4] w) { y = MatMul(x, w) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(4, 4), "w"))
    _, decisions = prune(Model.from_proto(proto))
    assert decisions["w"].reason == "is an output of its graph, too"


@pytest.mark.parametrize("transposed", [False, True])
def test_two_of_four_along_the_input_channels(transposed: bool) -> None:
    """Groups lie along the axis that the product sums over, whatever the layout."""
    model = gemm(noise(8, 12).T.copy() if transposed else noise(8, 12), transposed)
    _, decisions = prune(model, n_of_m="2:4")
    kept = values(model, "w") != 0
    kept = kept.T if transposed else kept
    assert (kept.reshape(2, 4, 12).sum(axis=1) == 2).all()
    assert decisions["w"].reason == "all but 2 of every 4 input channels became zero"
    second, decisions = prune(model, n_of_m="2:4")
    assert not second.changed
    assert decisions["w"].reason == "has no more than 2 of every 4 already"


def test_two_of_four_input_channels_of_a_kernel() -> None:
    model = convolution(noise(6, 8, 3, 3))
    prune(model, n_of_m="2:4")
    assert ((values(model, "w") != 0).reshape(6, 2, 4, 3, 3).sum(axis=2) == 2).all()


def test_blocks_of_kernels() -> None:
    model = convolution(noise(6, 8, 3, 3))
    _, decisions = prune(model, sparsity=0.5, block=(2, 4))
    blocks = (values(model, "w") != 0).reshape(3, 2, 2, 4, 9).transpose(0, 2, 1, 3, 4)
    filled = blocks.reshape(6, -1).mean(axis=1)
    assert sorted(filled.tolist()) == [0, 0, 0, 1, 1, 1]
    assert decisions["w"].reason == "the smallest 0.5 of its 2x4 blocks became zero"


def test_blocks_by_one_threshold() -> None:
    w1, w2 = noise(30, 20, scale=0.01), noise(20, 40, seed=1)
    model = network(w1, w2)
    _, decisions = prune(model, sparsity=0.4, block=(4, 1), scope="global")
    assert zeros(values(model, "w1")) > zeros(values(model, "w2"))
    blocks = (values(model, "w2") != 0).reshape(20, 10, 4)
    assert np.isin(blocks.sum(axis=2), (0, 4)).all()
    assert "4x1 blocks among the smallest 0.4 of all weights" in decisions["w1"].reason


@pytest.mark.parametrize("scope", ["weight", "global"])
def test_overrides(scope: str) -> None:
    model = network(noise(30, 20), noise(20, 40))
    _, decisions = prune(
        model, sparsity=0.5, scope=scope, overrides=[{"nodes": "w1", "sparsity": 0.9}]
    )
    assert zeros(values(model, "w1")) == 0.9
    assert zeros(values(model, "w2")) == 0.5
    assert decisions["w1"].reason == "the smallest 0.9 of its magnitudes became zero"


def test_an_override_of_zero_leaves_a_weight() -> None:
    model = network(noise(30, 20), noise(20, 40))
    _, decisions = prune(model, overrides=[{"nodes": "w1", "sparsity": 0}])
    assert not decisions["w1"].taken
    assert decisions["w1"].reason == "sparsity=0 of 600 elements is none"


def test_overrides_of_a_threshold() -> None:
    model = network(noise(100, 100), noise(100, 200))
    prune(model, threshold=1.0, overrides=[{"nodes": "w2", "threshold": 0.5}])
    assert zeros(values(model, "w2")) == pytest.approx(0.3829, abs=0.02)


def test_an_override_takes_another_measure() -> None:
    model = network(noise(100, 100), noise(100, 200))
    prune(model, n_of_m="1:4", overrides=[{"nodes": "w2", "sparsity": 0.3}])
    assert zeros(values(model, "w1")) == 0.75
    assert zeros(values(model, "w2")) == 0.3


def test_groups_need_an_axis_of_output_channels() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] y, float[4, N] z) {
            t = Transpose (x)  y = MatMul (x, w)  z = MatMul (w, t)
        }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(4, 4), "w"))
    _, decisions = prune(Model.from_proto(proto), n_of_m="1:2")
    assert "no one axis of output channels" in decisions["w"].reason


def gemm(weight: Array, transposed: bool) -> Model:
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17]>
        g (float[N, {inputs}] x) => (float[N, {outputs}] y) {{
            y = Gemm <transB = {int(transposed)}> (x, w)
        }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


def convolution(weight: Array) -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17]>
        g (float[N, {weight.shape[1]}, 8, 8] x) => (float[N, {weight.shape[0]}, 6, 6] y) {{
            y = Conv (x, w)
        }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


def test_misspelt_names_are_errors() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean"):
        prune(network(noise(30, 20), noise(20, 40)), include=["w11"])
    with pytest.raises(UnknownNameError, match="Did you mean 'w1'"):
        prune(network(noise(30, 20), noise(20, 40)), overrides=[{"nodes": "w11", "sparsity": 0.5}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"threshold": 0.0}, "greater than 0"),
        ({"sparsity": 0.5, "threshold": 1.0}, "exclude each other"),
        ({"scope": "global", "threshold": 1.0}, "drop scope"),
        ({"n_of_m": "2:4", "sparsity": 0.5}, "exclude each other"),
        ({"n_of_m": "4:4"}, "expected N:M with 0 < N < M"),
        ({"n_of_m": "two of four"}, "expected N:M"),
        ({"n_of_m": "2:4", "scope": "global"}, "drop scope"),
        ({"n_of_m": "2:4", "block": (2, 2)}, "block goes with sparsity"),
        ({"threshold": 1.0, "block": (2, 2)}, "block goes with sparsity"),
        ({"block": (0, 2)}, "greater than or equal to 1"),
        ({"overrides": [{"nodes": "w1"}]}, "changes nothing; give one of sparsity, threshold"),
        ({"overrides": [{"nodes": "w1", "sparsity": 1.5}]}, "less than 1"),
        (
            {"overrides": [{"nodes": "w1", "sparsity": 0.5, "threshold": 1.0}]},
            "sparsity and threshold; give one",
        ),
        ({"scope": "layer"}, "'weight' or 'global'"),
        ({"sparcity": 0.5}, "sparcity"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        PruneMagnitude(**options)
