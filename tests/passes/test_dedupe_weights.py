"""dedupe-weights: one copy of what is equal bit for bit, where all consumers can see it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.model import Model, check_model, load
from onnxslim_passes.model.payload import ExternalPayload
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.dedupe_weights import DedupeWeights
from onnxslim_passes.runtime import open_session
from tests.zoo_small import SMALL, feeds, noise, parsed

Array = npt.NDArray[Any]

CHAIN = """
    g (float[N, 8] x) => (float[N, 8] y) {
        a = MatMul (x, w1)  b = MatMul (a, w2)  y = MatMul (b, w3)
    }"""


def chain(w1: Array, w2: Array, w3: Array) -> Model:
    return Model.from_proto(parsed(CHAIN, {"w1": w1, "w2": w2, "w3": w3}))


def dedupe(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = DedupeWeights(**options).apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def kept(model: Model) -> list[str]:
    return [held.where for held in model.constants()]


def assert_same(proto: onnx.ModelProto, after: Model, runs: Any) -> None:
    check_model(after)
    with open_session(Model.from_proto(proto)) as a, open_session(after) as b:
        for feed in runs:
            for name, array in a.run(feed).items():
                assert np.array_equal(b.run(feed)[name], array)


def test_the_first_stays() -> None:
    w = noise(8, 8)
    model = chain(w, noise(8, 8, seed=1), w.copy())
    before = model.to_proto()
    result, decisions = dedupe(model)
    assert result.changed
    assert kept(model) == ["w1", "w2"]
    assert decisions["w1"].reason == "stored once for 'w3', too"
    assert decisions["w1"].figures["copies"] == 1
    assert int(decisions["w1"].figures["saved_bytes"]) >= 256
    assert_same(before, model, feeds(x=(3, 8)))


def altered(w: Array, how: str) -> Array:
    if how == "last bit":
        return np.nextafter(w, np.float32(9))
    if how == "type":
        return w.astype(np.float64)
    return np.where(w == 0, np.float32(-0.0), w)


@pytest.mark.parametrize("how", ["last bit", "zero's sign"])
def test_equal_means_every_bit(how: str) -> None:
    w = noise(8, 8)
    w[0, 0] = 0
    model = chain(w, altered(w, how), noise(8, 8, seed=1))
    result, _ = dedupe(model)
    assert not result.changed


def test_nan_is_equal_to_itself() -> None:
    w = np.full((8, 8), np.nan, np.float32)
    assert dedupe(chain(w, w.copy(), w.copy()))[0].changed


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_as_many_stay_as_there_are_values(kinds: list[int]) -> None:
    model = chain(*(noise(8, 8, seed=kind) for kind in kinds))
    result, _ = dedupe(model)
    assert len(kept(model)) == len(set(kinds))
    assert result.changed == (len(set(kinds)) < 3)


def test_small_ones_are_counted_only() -> None:
    w = noise(8, 8)
    result, decisions = dedupe(chain(w, w.copy(), w.copy()), min_bytes=257)
    assert not result.changed
    assert decisions["graph"].reason == "constants of fewer than min_bytes=257 bytes: 3"


def test_a_branch_takes_the_outer_weight() -> None:
    small = SMALL["if_weights"]()
    model = Model.from_proto(small.proto)
    result, decisions = dedupe(model)
    assert result.changed
    assert kept(model) == ["outer", "choose/then_branch/inner"]
    assert "'choose/else_branch/inner'" in decisions["outer"].reason
    assert_same(small.proto, model, small.feeds)


def test_equal_weights_of_two_branches_move_outwards() -> None:
    def branch(label: str, op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{label}_y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["x", "inner"], ["m"]),
            helper.make_node(op, ["m"], [f"{label}_y"]),
        ]
        tensor = numpy_helper.from_array(noise(8, 8), "inner")
        return helper.make_graph(nodes, label, [], [made], [tensor])

    proto = parsed("g (float[N, 8] x, bool f) => (float[N, 8] y) { }", {})
    then, otherwise = branch("then", "Relu"), branch("else", "Tanh")
    choose = helper.make_node(
        "If", ["f"], ["y"], name="choose", then_branch=then, else_branch=otherwise
    )
    proto.graph.node.append(choose)
    model = Model.from_proto(proto)
    _, decisions = dedupe(model)
    assert len(kept(model)) == 1
    assert "/" not in kept(model)[0]
    assert decisions["choose/else_branch/inner"].figures["copies"] == 1
    runs = [{"x": noise(3, 8), "f": np.array(flag)} for flag in (True, False)]
    assert_same(proto, model, runs)


def test_functions_keep_their_own() -> None:
    text = """
        g (float[N, 8] x) => (float[N, 8] y) { a = MatMul (x, w)  y = local.f (a) }
        <domain: "local", opset_import: ["": 17]>
        f (a) => (d) { b = MatMul (a, u)  c = MatMul (b, v)  d = Relu (c) }"""
    w = noise(8, 8)
    proto = parsed(text, {"w": w}, head=', "local": 1')
    for name in ("u", "v"):
        tensor = numpy_helper.from_array(w)
        proto.functions[0].node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    model = Model.from_proto(proto)
    dedupe(model)
    assert len(kept(model)) == 2
    assert kept(model)[0] == "w"
    assert_same(proto, model, feeds(x=(3, 8)))


@pytest.mark.parametrize(
    ("role", "reason"),
    [("input", "a graph input, whose value a caller may override"), ("output", "an output")],
)
def test_what_callers_see_stays(role: str, reason: str) -> None:
    w = noise(8, 8)
    proto = parsed(CHAIN, {"w1": w, "w2": w, "w3": noise(8, 8, seed=1)})
    info = helper.make_tensor_value_info("w1", TensorProto.FLOAT, [8, 8])
    (proto.graph.input if role == "input" else proto.graph.output).append(info)
    result, decisions = dedupe(Model.from_proto(proto))
    assert not result.changed
    assert f"equals 'w2', but is {reason}" in decisions["w1"].reason


def test_external_data_is_read_in_pieces(tmp_path: Path) -> None:
    w = noise(64, 64)
    chain(w, noise(64, 64, seed=1), w.copy()).save(tmp_path / "m.onnx", external=True)
    model = load(tmp_path / "m.onnx")
    result, _ = dedupe(model)
    assert result.changed
    assert [type(held.payload) for held in model.constants()] == [ExternalPayload] * 2
    model.save(tmp_path / "small.onnx", external=True)
    assert (tmp_path / "small.onnx.data").stat().st_size < (tmp_path / "m.onnx.data").stat().st_size


def test_sparse_and_dense_are_not_mixed() -> None:
    w = np.zeros((8, 8), np.float32)
    w[0, :] = 1
    model = chain(w, w.copy(), w.copy())
    model.graph.initializers[0].sparse = True
    result, _ = dedupe(model)
    assert result.changed
    assert kept(model) == ["w1", "w2"]


def test_equal_weights_of_a_real_model(shared_models: Path) -> None:
    """Parameters of normalization that are all zero or all one."""
    model = load(shared_models / "robust" / "ultraface_rfb320.onnx")
    model.fix_overridable_weights()
    work = model.copy()
    result, _ = dedupe(work)
    assert result.changed
    assert work.nbytes() < model.nbytes()
    assert_same(model.to_proto(), work, feeds(input=(1, 3, 240, 320))[:1])
