"""fold-constants: what is computed, what is left to the runtime, and why."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.fold_constants import FoldConstants
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session
from tests.roundtrip.cases import node_cases
from tests.zoo_small import SMALL, feeds, noise, parsed

Array = npt.NDArray[Any]


def model_of(text: str, **weights: Array) -> Model:
    return Model.from_proto(parsed(text, weights))


def fold(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = FoldConstants(**options).apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def operators(model: Model) -> list[str]:
    return [node.op for node in model.nodes()]


def constant(model: Model, name: str) -> Array:
    return next(held.values for held in model.constants() if held.name == name)


CHAIN = """
    g (float[N, 8] x) => (float[N, 4] y) {
        half = Cast <to = 10> (w)
        full = Cast <to = 1> (half)
        turned = Transpose <perm = [1, 0]> (full)
        y = MatMul (x, turned)
    }"""


def test_a_chain_becomes_one_constant_under_its_name() -> None:
    w = noise(4, 8)
    model = model_of(CHAIN, w=w)
    result, _ = fold(model)
    assert result.changed
    assert operators(model) == ["MatMul"]
    assert [held.name for held in model.constants()] == ["turned"]
    assert np.array_equal(constant(model, "turned"), w.astype(np.float16).astype(np.float32).T)


def test_shapes_that_are_known_count_as_constants() -> None:
    text = """
        g (float[N, 3, 5] x, float[2, 3] s) => (float[2, 3] y, int64[1] n, int64[3] z) {
            a = Shape (s)  b = Size (s)  f = Cast <to = 1> (a)  c = ReduceSum <keepdims = 0> (f)
            d = Cast <to = 1> (b)  e = Add (c, d)  y = Add (s, e)
            last = Shape <start = -1> (s)  n = Mul (last, two)
            z = Shape (x)
        }"""
    model = model_of(text, two=np.array([2]))
    _, decisions = fold(model)
    # The sum of the sizes 2 + 3 and the count 6; the batch of x is open.
    assert constant(model, "e") == 11
    assert sorted(operators(model)) == ["Add", "Mul", "Shape"]
    assert "output of its graph" in decisions["Mul#8"].reason
    feed = {"x": noise(4, 3, 5), "s": np.zeros((2, 3), np.float32)}
    outputs = open_session(model).run(feed)
    assert outputs["n"].tolist() == [6]
    assert outputs["z"].tolist() == [4, 3, 5]
    assert (outputs["y"] == 11).all()


def test_declared_sizes_inside_the_graph_are_not_believed() -> None:
    """Exporters declare the sizes they saw in one run."""
    proto = parsed("g (float[N, 4] x) => (int64[2] y) { r = Relu (x)  s = Shape (r) "
                   " y = Add (s, s) }", {})  # fmt: skip
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 4]))
    model = Model.from_proto(proto)
    result, _ = fold(model)
    assert not result.changed


REFUSED = {
    "random": (
        "g () => (float[3] y) { r = RandomNormalLike (w)  y = Relu (r) }",
        "draws random numbers",
    ),
    "integers": (
        "g () => (float[3] y) { r = DequantizeLinear (q, s)  y = Relu (r) }",
        "integers are the smaller form",
    ),
    "output": ("g () => (float[3] y) { y = Relu (w) }", "output of its graph"),
    "growth": (
        "g (float[1000] x) => (float[1000] y) { r = Expand (s, n)  y = Add (x, r) }",
        "result of 4,000 bytes is larger than the constants that would be spared",
    ),
    "memory": (
        "g (float[1] x) => (float[1] y) { r = ConstantOfShape (huge)  t = ReduceMax (r) "
        "y = Add (x, t) }",
        "out of proportion",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left_alone_with_a_reason(name: str) -> None:
    text, reason = REFUSED[name]
    model = model_of(
        text,
        w=noise(3, scale=1.0),
        q=np.array([1, 2, 3], np.int8),
        s=np.array(0.5, np.float32),
        n=np.array([1000]),
        huge=np.array([1 << 40]),
    )
    model.remove_unused()
    result, _ = fold(model)
    assert not result.changed
    assert reason in result.decisions[0].reason


def test_a_weight_is_not_stored_twice() -> None:
    """A transposed copy beside the weight itself would double it."""
    text = """
        g (float[N, 40] x) => (float[N, 40] y) {
            t = Transpose (w)  h = MatMul (x, t)  y = MatMul (h, w)
        }"""
    model = model_of(text, w=noise(40, 40))
    result, decisions = fold(model)
    assert not result.changed
    assert "left to the runtime" in decisions["Transpose#0"].reason
    result, _ = fold(model, max_growth=1 << 20)
    assert result.changed


def test_branches_that_compute_alike_share_the_result() -> None:
    def branch(label: str, op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{label}_y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["m"]),
            helper.make_node(op, ["m"], [f"{label}_y"]),
        ]
        return helper.make_graph(nodes, label, [], [made])

    proto = parsed("g (float[N, 40] x, bool f) => (float[N, 40] y) { }", {"w": noise(40, 40)})
    then, otherwise = branch("then", "Relu"), branch("else", "Tanh")
    choose = helper.make_node("If", ["f"], ["y"], then_branch=then, else_branch=otherwise)
    proto.graph.node.append(choose)
    model, before = Model.from_proto(proto), Model.from_proto(proto)
    size = model.nbytes()
    result, _ = fold(model)
    assert result.changed
    assert "Transpose" not in operators(model)
    assert len(model.graph.initializers) == 1
    assert model.nbytes() < size
    for flag in (True, False):
        feed = {"x": noise(3, 40), "f": np.array(flag)}
        with open_session(before) as a, open_session(model) as b:
            assert np.array_equal(a.run(feed)["y"], b.run(feed)["y"])


def test_a_model_that_the_runtime_would_refuse_stays() -> None:
    """A fault that the runtime sees only when it knows which branch runs."""
    case = next(c for c in node_cases() if c.name == "test_affine_grid_2d_expanded")
    model = Model.from_proto(case.model())
    result, decisions = fold(model)
    assert not result.changed
    assert "with the constants in place, ONNX Runtime refuses" in decisions["Size#13"].reason
    open_session(model).close()


def test_values_in_functions() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y) { y = local.f (x) }
        <domain: "local", opset_import: ["": 17]>
        f (a) => (b) {
            c = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
            d = Exp (c)
            b = Mul (a, d)
        }"""
    model = Model.from_proto(parsed(text, {}, head=', "local": 1'))
    result, decisions = fold(model)
    assert result.changed
    assert any(where.startswith("local::f") for where in decisions)
    given = open_session(model).run({"x": np.ones((1, 4), np.float32)})["y"]
    assert np.allclose(given, np.exp([1, 2, 3, 4]))


def test_what_the_runtime_cannot_compute_does_not_stop_the_rest() -> None:
    """A Reshape that does not fit, between two chains that do."""
    text = """
        g (float[N, 4] x) => (float[N, 4] y, float[3, 3] z) {
            a = Exp (w)  y = Mul (x, a)
            bad = Reshape (w, three)  worse = Exp (bad)  z = Relu (worse)
        }"""
    model = model_of(text, w=noise(4, scale=1.0), three=np.array([3, 3]))
    result, decisions = fold(model)
    assert decisions["Exp#0"].taken
    assert not decisions["Reshape#2"].taken
    assert result.changed
    assert sorted(operators(model)) == ["Exp", "Mul", "Relu", "Reshape"]


def test_stored_weights_are_unpacked_on_request_only() -> None:
    rng = np.random.default_rng(0)
    w = np.array([-1, 0, 0.5, 2], np.float32)[rng.integers(0, 4, (64, 64))]
    model = model_of("g (float[N, 64] x) => (float[N, 64] y) { y = MatMul (x, w) }", w=w)
    StoreWeights().apply(model, Context())
    assert len(operators(model)) > 1
    result, _ = fold(model, unpack=False)
    assert not result.changed
    fold(model)
    assert operators(model) == ["MatMul"]
    assert np.array_equal(model.weights()[0].values, w)


def test_what_nothing_uses_goes() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { z = Exp (x)  y = Relu (x) }"
    result, decisions = fold(model_of(text, idle=noise(4)))
    assert result.changed
    assert decisions["graph"].figures == {"removed": 2}


def test_overridable_inputs_are_no_constants() -> None:
    proto = parsed(CHAIN, {"w": noise(4, 8)})
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 8]))
    result, decisions = fold(Model.from_proto(proto))
    assert not result.changed
    assert "a caller may override" in decisions["Cast#0"].reason


def test_no_folding_inside_a_loop_of_shapes_that_may_change() -> None:
    """The sizes of what a Loop carries are those of one round only."""
    small = SMALL["loop_weights"]()
    model = Model.from_proto(small.proto)
    body = next(graph for graph in model.graphs() if graph.path)
    body.add_node("Shape", [body.inputs[2]], outputs=["sizes"])
    sizes = body.nodes[-1].outputs[0]
    body.add_node("Cast", [sizes], outputs=["as_float"], attrs={"to": TensorProto.FLOAT})
    result, decisions = fold(model)
    assert not any("Shape" in where for where in decisions)
    assert result.changed  # the two nodes have no consumer


NODES_AFTER = {
    "models/efficientnet_lite0.onnx": (369, 164),
    "models/silero_vad_16k_op15.onnx": (190, 125),
    "robust/ppocr_cls_paddle_opset11.onnx": (258, 239),
    "robust/ultraface_rfb320.onnx": (211, 163),
}


@pytest.mark.parametrize("name", NODES_AFTER)
def test_real_models(shared_models: Path, name: str) -> None:
    model = load(shared_models / name)
    work = model.copy()
    before, after = NODES_AFTER[name]
    assert len(operators(work)) == before
    fold(work)
    assert len(operators(work)) <= after
    assert work.nbytes() <= model.nbytes()
    shapes = {
        "image": (1, 3, 224, 224),
        "x": (1, 3, 48, 192),
        "input": (1, 576) if "silero" in name else (1, 3, 240, 320),
        "state": (2, 1, 128),
    }
    with open_session(model) as a, open_session(work) as b:
        runs = []
        for feed in feeds(**{i.name: shapes[i.name] for i in a.inputs if i.name in shapes}):
            runs.append(feed | ({"sr": np.array(16000)} if "silero" in name else {}))
        assert compare_outputs(a, b, runs).max_error == 0


def test_large_sizes_are_read_from_small_constants_only() -> None:
    """A result whose shape hangs on another result is known after that one is computed."""
    text = """
        g (float[4, 4] x) => (float[4, 4] y) {
            places = NonZero (w)  size = Shape (places)  two = Gather <axis = 0> (size, one)
            square = Concat <axis = 0> (two, two)  ones = ConstantOfShape (square)
            f = Cast <to = 1> (ones)  y = Add (x, f)
        }"""
    w = np.array([1, 0, 2, 3, 0, 4], np.float32)
    model = model_of(text, w=w, one=np.array([1]))
    fold(model)
    assert operators(model) == ["Add"]
    assert constant(model, "f").shape == (4, 4)


def test_constants_keep_their_bits() -> None:
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-42], np.float32)
    text = "g (float[5] x) => (float[5] y) { r = Reshape (w, five)  y = Add (x, r) }"
    model = model_of(text, w=special.reshape(1, 5), five=np.array([5]))
    fold(model)
    assert constant(model, "r").tobytes() == special.tobytes()
    assert numpy_helper.from_array(constant(model, "r")).raw_data == special.tobytes()
