"""remove-dead-channels: what goes, what stays and why; ONNX Runtime says whether outputs stay."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.remove_dead_channels import RemoveDeadChannels
from onnxslim_passes.runtime import open_session
from tests.battery import check_on_model
from tests.zoo_small import SMALL, Small, feeds, noise, normalization, parsed

Array = npt.NDArray[Any]


def remove(model: Model) -> dict[str, Decision]:
    decisions = RemoveDeadChannels().apply(model, Context()).decisions
    return {decision.where: decision for decision in decisions}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {constant.name: constant.shape for constant in model.constants()}


def check_same(proto: onnx.ModelProto, runs: tuple[dict[str, Array], ...]) -> Model:
    """Removes what is dead and compares outputs; float32 sums in another order differ by 1e-5."""
    model = Model.from_proto(proto)
    remove(model)
    with open_session(proto) as before, open_session(model) as after:
        for feed in runs:
            for name, expected in before.run(feed).items():
                assert np.allclose(after.run(feed)[name], expected, rtol=1e-4, atol=1e-5), name
    return model


def initializer(proto: onnx.ModelProto, name: str) -> Array:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    return numpy_helper.to_array(tensor).copy()


def put(proto: onnx.ModelProto, name: str, values: Array) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def zero(proto: onnx.ModelProto, name: str, index: Any) -> None:
    values = initializer(proto, name)
    values[index] = 0
    put(proto, name, values)


# ---------------- one layer behind another


def mlp(activation: str = "Relu", *, trans: int = 0) -> tuple[onnx.ModelProto, Any]:
    text = f"""
        g (float[N, 6] x) => (float[N, 4] y) {{
            h = Gemm <transB = {trans}, beta = 0.5> (x, w1, b1)
            a = {activation} (h)
            y = Gemm <transB = {trans}, alpha = 2.0> (a, w2, b2)
        }}"""
    w1, w2 = noise(6, 8, seed=1), noise(8, 4, seed=2)
    weights = {
        "w1": w1.T.copy() if trans else w1,
        "b1": noise(8, seed=3, scale=1),
        "w2": w2.T.copy() if trans else w2,
        "b2": noise(4, seed=4, scale=1),
    }
    return parsed(text, weights), feeds(x=(5, 6))


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Softplus", "Elu", "Identity"])
@pytest.mark.parametrize("trans", [0, 1])
def test_neurons_without_input_go_into_the_bias_behind(activation: str, trans: int) -> None:
    proto, runs = mlp(activation, trans=trans)
    zero(proto, "w1", np.s_[[2, 5]] if trans else np.s_[:, [2, 5]])
    model = check_same(proto, runs)
    assert shapes(model)["w1"] == (6, 6)
    assert shapes(model)["b1"] == (6,)
    assert shapes(model)["w2"] == ((4, 6) if trans else (6, 4))
    after = next(c.values for c in model.constants() if c.name == "b2")
    if activation != "Relu":
        assert not np.array_equal(after, initializer(proto, "b2"))


def test_neurons_without_output_go() -> None:
    proto, runs = mlp("Sigmoid")
    zero(proto, "w2", [0, 3, 4])
    first, second = remove(Model.from_proto(proto)).values()
    assert first.reason == "3 of 8 channels have no effect and went"
    assert first.figures == {"channels": 8, "removed": 3, "without_input": 0}
    assert second.reason == "all 4 channels have an effect"
    model = check_same(proto, runs)
    assert shapes(model) == {"w1": (6, 5), "b1": (5,), "w2": (5, 4), "b2": (4,)}
    assert np.array_equal(
        next(c.values for c in model.constants() if c.name == "b2"), initializer(proto, "b2")
    )


def test_death_spreads_through_layers() -> None:
    text = """
        g (float[N, 6] x) => (float[N, 4] y) {
            h = MatMul (x, w1)  a = Relu (h)  i = MatMul (a, w2)  b = Tanh (i)  y = MatMul (b, w3)
        }"""
    weights = {"w1": noise(6, 8, seed=1), "w2": noise(8, 7, seed=2), "w3": noise(7, 4, seed=3)}
    weights["w3"][2] = 0  # neuron 2 of the second layer has no output ...
    weights["w2"][5] = 0
    weights["w2"][5, 2] = 1  # ... and is all that neuron 5 of the first one reaches
    weights["w1"][:, 0] = 0  # neuron 0 of the first layer is zero: no bias
    weights["w2"][:, 6] = 0
    weights["w2"][0, 6] = 1  # and all that neuron 6 takes
    model = check_same(parsed(text, weights), feeds(x=(3, 6)))
    assert shapes(model) == {"w1": (6, 6), "w2": (6, 5), "w3": (5, 4)}


def test_a_matmul_gets_a_bias_when_a_constant_needs_it() -> None:
    text = """
        g (float[N, 6] x) => (float[N, 4] y) {
            h = MatMul (x, w1)  a = Sigmoid (h)  y = MatMul (a, w2)
        }"""
    weights = {"w1": noise(6, 8, seed=1), "w2": noise(8, 4, seed=2)}
    weights["w1"][:, :3] = 0
    model = check_same(parsed(text, weights), feeds(x=(3, 6)))
    assert [node.op for node in model.nodes()].count("Add") == 1
    assert shapes(model)["w2"] == (5, 4)


def test_the_addition_behind_a_matmul_takes_the_constant() -> None:
    text = """
        g (float[N, 6] x) => (float[N, 4] y) {
            h = MatMul (x, w1)  hb = Add (h, b1)  a = Relu (hb)  m = MatMul (a, w2)  y = Add (b2, m)
        }"""
    weights = {"w1": noise(6, 8, seed=1), "w2": noise(8, 4, seed=2)}
    weights |= {"b1": np.ones(8, np.float32), "b2": noise(4, seed=5)}
    weights["w1"][:, :3] = 0
    model = check_same(parsed(text, weights), feeds(x=(3, 6)))
    assert len(list(model.nodes())) == 5
    assert shapes(model) == {"w1": (6, 5), "b1": (5,), "w2": (5, 4), "b2": (4,)}


def test_a_shared_bias_is_copied() -> None:
    text = """
        g (float[N, 6] x) => (float[N, 6] y, float[N, 6] z) {
            h = Gemm (x, w1, b)  a = Sigmoid (h)  y = Gemm (a, w2, b)  z = Gemm (x, w3, b)
        }"""
    weights = {f"w{i}": noise(6, 6, seed=i) for i in (1, 2, 3)} | {"b": noise(6, seed=9)}
    weights["w1"][:, 1] = 0
    proto = parsed(text, weights)
    decisions = remove(Model.from_proto(proto))
    check_same(proto, feeds(x=(3, 6)))
    assert "'y' is an output" in next(iter(decisions.values())).reason


def test_a_layer_keeps_one_channel() -> None:
    proto, runs = mlp()
    zero(proto, "w2", np.s_[:])
    model = check_same(proto, runs)
    assert shapes(model)["w2"] == (1, 4)


# ---------------- convolutions


def convolutions(*, pads: int, bias: float) -> tuple[onnx.ModelProto, Any]:
    text = f"""
        g (float[N, 2, 8, 8] x) => (float[N, 5] y) {{
            c = Conv (x, w1, b1)
            n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)
            r = Relu (n)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
            d = Conv <pads = [{pads}, {pads}, {pads}, {pads}]> (p, w2)
            t = Tanh (d)
            f = Flatten (t)
            y = Gemm (f, w3, b3)
        }}"""
    side = 2 * pads + 1
    parameters = normalization("bn", 6, seed=7)
    # The constant of a channel without input is the shift less the scaled mean.
    parameters |= {"bn_b": np.full(6, bias, np.float32), "bn_m": np.zeros(6, np.float32)}
    weights = {
        "w1": noise(6, 2, 3, 3, seed=1),
        "b1": np.zeros(6, np.float32),
        "w2": noise(4, 6, 3, 3, seed=2),
        "w3": noise(4 * side * side, 5, seed=3),
        "b3": noise(5, seed=4),
        **parameters,
    }
    return parsed(text, weights), feeds(x=(2, 2, 8, 8))


@pytest.mark.parametrize(
    ("pads", "bias", "left"), [(0, 0.7, 4), (1, 0.7, 6), (1, -0.7, 4), (0, -0.7, 4)]
)
def test_a_constant_does_not_pass_padding(pads: int, bias: float, left: int) -> None:
    """What is zero behind Relu may go anywhere, another constant only where nothing is padded."""
    proto, runs = convolutions(pads=pads, bias=bias)
    zero(proto, "w1", [1, 4])
    model = check_same(proto, runs)
    assert shapes(model)["w1"][0] == left
    assert shapes(model)["w2"][1] == left
    assert shapes(model)["bn_v"] == (left,)


def test_maps_are_flattened() -> None:
    proto, runs = convolutions(pads=1, bias=0.1)
    zero(proto, "w3", np.s_[9:18])  # all positions of channel 1
    zero(proto, "w3", np.s_[18:20])  # two positions of channel 2: it stays
    model = check_same(proto, runs)
    assert shapes(model)["w2"] == (3, 6, 3, 3)
    assert shapes(model)["w3"] == (27, 5)


@pytest.mark.parametrize("shape", [[-1, 36], [0, -1], [2, -1], [0, 36]])
def test_reshape_follows(shape: list[int]) -> None:
    proto, runs = convolutions(pads=1, bias=0.1)
    node = next(node for node in proto.graph.node if node.op_type == "Flatten")
    node.op_type = "Reshape"
    node.input.append("shape")
    proto.graph.initializer.append(numpy_helper.from_array(np.array(shape), "shape"))
    zero(proto, "w3", np.s_[9:18])
    if shape[0] == 2:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert shapes(check_same(proto, runs))["w3"] == (27, 5)


def test_depthwise_convolutions_shrink() -> None:
    text = """
        g (float[N, 2, 6, 6] x) => (float[N, 3, 2, 2] y) {
            c = Conv (x, w1, b1)
            d = Conv <group = 6, pads = [0, 0, 0, 0]> (c, w2, b2)
            r = HardSwish (d)
            y = Conv (r, w3)
        }"""
    weights = {
        "w1": noise(6, 2, 3, 3, seed=1),
        "b1": noise(6, seed=2),
        "w2": noise(6, 1, 3, 3, seed=3),
        "b2": noise(6, seed=4),
        "w3": noise(3, 6, 1, 1, seed=5),
    }
    weights["w1"][0] = 0  # constant before the depthwise convolution
    weights["w2"][2] = 0  # constant behind it
    weights["w3"][:, 5] = 0  # without output
    model = check_same(parsed(text, weights), feeds(x=(2, 2, 6, 6)))
    assert shapes(model)["w2"] == (3, 1, 3, 3)
    assert next(n for n in model.nodes() if n.outputs[0].name == "d").attrs["group"] == 3


def test_transposed_convolutions() -> None:
    text = """
        g (float[N, 2, 4, 4] x) => (float[N, 3, 8, 8] y) {
            c = ConvTranspose <strides = [2, 2]> (x, w1, b1)
            r = Relu (c)
            y = Conv (r, w2)
        }"""
    weights = {"w1": noise(2, 6, 3, 3, seed=1), "b1": np.ones(6, np.float32)}
    weights["w2"] = noise(3, 6, 2, 2, seed=2)
    weights["w1"][:, [1, 2]] = 0
    proto = parsed(text, weights)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert shapes(check_same(proto, feeds(x=(1, 2, 4, 4))))["w1"] == (2, 4, 3, 3)


# ---------------- what ties channels together


def test_residual_sums_go_together() -> None:
    text = """
        g (float[N, 6] x) => (float[N, 3] y) {
            a = Gemm (x, w1, b1)  r = Relu (a)
            b = Gemm (r, w2, b2)
            s = Add (r, b)
            y = Gemm (s, w3, b3)
        }"""
    weights = {
        "w1": noise(6, 8, seed=1),
        "b1": noise(8, seed=2),
        "w2": noise(8, 8, seed=3),
        "b2": noise(8, seed=4),
        "w3": noise(8, 3, seed=5),
        "b3": noise(3, seed=6),
    }
    weights["w3"][[0, 1]] = 0  # no output behind the sum ...
    weights["w2"][0] = 0  # ... but the inner layer takes channel 1
    weights["w1"][:, 7] = 0  # constant on both ways
    weights["w2"][:, 7] = 0
    weights["w1"][:, 6] = 0  # constant on one way only
    model = check_same(parsed(text, weights), feeds(x=(3, 6)))
    assert shapes(model)["w2"] == (6, 6)
    assert shapes(model)["w1"] == (6, 6)


@pytest.mark.parametrize("axis", [1, 2])
def test_concatenation(axis: int) -> None:
    text = f"""
        g (float[N, 2, 4, 4] x) => (float[N, 3, M, 4] y) {{
            a = Conv (x, w1, b1)  b = Conv (x, w2, b2)
            c = Concat <axis = {axis}> (a, b)  t = Sigmoid (c)
            y = Conv (t, w3)
        }}"""
    width = 10 if axis == 1 else 5
    weights = {
        "w1": noise(5, 2, 1, 1, seed=1),
        "b1": noise(5, seed=2),
        "w2": noise(5, 2, 1, 1, seed=3),
        "b2": noise(5, seed=4),
        "w3": noise(3, width, 1, 1, seed=5),
    }
    weights["w1"][0] = 0
    weights["w2"][[0, 1]] = 0
    weights["b2"][0] = weights["b1"][0]
    model = check_same(parsed(text, weights), feeds(x=(2, 2, 4, 4)))
    left = 7 if axis == 1 else 4
    assert shapes(model)["w3"] == (3, left, 1, 1)


def test_a_weight_of_two_layers() -> None:
    text = """
        g (float[N, 6] x, float[N, 6] z) => (float[N, 3] y) {
            a = MatMul (x, w)  b = MatMul (z, w)
            u = MatMul (a, p)  v = MatMul (b, q)
            y = Add (u, v)
        }"""
    weights = {"w": noise(6, 8, seed=1), "p": noise(8, 3, seed=2), "q": noise(8, 3, seed=3)}
    weights["p"][[0, 1, 2]] = 0
    weights["q"][[1, 2, 3]] = 0  # only channels 1 and 2 have no output on both sides
    model = check_same(parsed(text, weights), feeds(x=(3, 6), z=(3, 6)))
    assert shapes(model) == {"w": (6, 6), "p": (6, 3), "q": (6, 3)}


def test_transposed_maps() -> None:
    """Channels last, as Keras exports: the axis moves and comes back."""
    text = """
        g (float[N, 4, 4, 2] x) => (float[N, 3] y) {
            i = Transpose <perm = [0, 3, 1, 2]> (x)
            c = Conv (i, w1, b1)
            o = Transpose <perm = [0, 2, 3, 1]> (c)
            m = Mul (o, scale)
            r = Relu (m)
            p = ReduceMean <axes = [1, 2], keepdims = 0> (r)
            y = MatMul (p, w2)
        }"""
    weights = {
        "w1": noise(6, 2, 1, 1, seed=1),
        "b1": noise(6, seed=2, scale=1),
        "scale": noise(6, seed=3, scale=1),
        "w2": noise(6, 3, seed=4),
    }
    weights["w1"][[1, 3]] = 0
    weights["w2"][5] = 0
    model = check_same(parsed(text, weights), feeds(x=(2, 4, 4, 2)))
    assert shapes(model)["scale"] == (3,)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y = Softmax <axis = 1> (h)", "is not an operator that channels go through"),
        ("y = Identity (h)", "'y' is an output"),
        ("t = Transpose (h) y = Transpose (t)", "'y' is an output"),
        ("s, u = Split <axis = 1, num_outputs = 2> (h) y = Identity (s)", "Split "),
    ],
)
def test_why_channels_stay(line: str, reason: str) -> None:
    text = f"g (float[N, 6] x) => (float y) {{ h = MatMul (x, w) {line} }}"
    weights = {"w": noise(6, 8, seed=1)}
    weights["w"][:, 3] = 0
    proto = parsed(text, weights, opset=18)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = Model.from_proto(proto)
    decision = next(iter(remove(model).values()))
    assert not decision.taken
    assert reason in decision.reason
    assert shapes(model)["w"] == (6, 8)


@pytest.mark.parametrize("kind", ["output", "input", "other"])
def test_weights_that_others_see_stay(kind: str) -> None:
    proto, runs = mlp()
    zero(proto, "w2", [0, 3])
    if kind == "output":
        proto.graph.output.append(onnx.helper.make_tensor_value_info("b1", 1, [8]))
    elif kind == "input":
        proto.graph.input.append(onnx.helper.make_tensor_value_info("w1", 1, [6, 8]))
    else:
        proto.graph.node.append(onnx.helper.make_node("Softmax", ["b1"], ["z"], axis=0))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, [8]))
    assert shapes(check_same(proto, runs))["w1"] == (6, 8)


# ---------------- laws


def pruned(small: Small, sparsity: float) -> Small:
    model = Model.from_proto(small.proto)
    pass_ = PruneMagnitude(sparsity=sparsity, min_elements=1, scope="global")
    pass_.apply(model, Context())
    return Small(model.to_proto(), small.feeds)


@pytest.mark.parametrize("network", SMALL)
def test_on_pruned_networks(network: str) -> None:
    small = pruned(SMALL[network](), 0.97)
    check_on_model(RemoveDeadChannels(), small)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_outputs_stay_whatever_is_zero(data: st.DataObject) -> None:
    """Zeros anywhere, in any pattern; constants and dead ends arise by themselves."""
    builders: dict[str, Callable[[], tuple[onnx.ModelProto, Any]]] = {
        "mlp": lambda: mlp(data.draw(st.sampled_from(["Relu", "Sigmoid", "Clip"]))),
        "padded": lambda: convolutions(pads=1, bias=data.draw(st.sampled_from([-0.5, 0.5]))),
        "unpadded": lambda: convolutions(pads=0, bias=0.5),
    }
    proto, runs = builders[data.draw(st.sampled_from(sorted(builders)))]()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    density = data.draw(st.sampled_from([0.05, 0.2, 0.5]))
    before: Mapping[str, Array] = {
        t.name: numpy_helper.to_array(t) for t in proto.graph.initializer
    }
    for name, values in before.items():
        if name.startswith(("w", "b1", "b3")):
            put(proto, name, values * (rng.random(values.shape) < density))
    model = check_same(proto, runs)
    again = remove(model)
    assert not any(decision.taken for decision in again.values())
