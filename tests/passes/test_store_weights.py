"""store-weights: never larger, never another bit, nothing left to decode at run time."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session, optimized_graph
from tests.battery import check_on_model
from tests.zoo_small import SMALL

Array = npt.NDArray[Any]
RNG = np.random.default_rng(7)


def few(shape: tuple[int, ...], values: int = 11, density: float = 1.0) -> Array:
    """A weight of few distinct values and many zeros."""
    table = np.random.default_rng(values).normal(size=values).astype(np.float32)
    weight = table[RNG.integers(0, values, shape)]
    return np.where(RNG.random(shape) < density, weight, np.float32(0))


def noise(shape: tuple[int, ...]) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def pruned(shape: tuple[int, ...], density: float) -> Array:
    return np.where(RNG.random(shape) < density, noise(shape), np.float32(0))


def build(text: str, **weights: Array) -> Model:
    """A model of ONNX text, with weights where it names them."""
    proto = onnx.parser.parse_model(text)
    _give(proto.graph, weights)
    return Model.from_proto(proto)


def _give(graph: onnx.GraphProto, weights: dict[str, Array]) -> None:
    graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())


def mlp(first: Array, second: Array, opset: int = 17, ir_version: int = 8) -> Model:
    return build(
        f"""<ir_version: {ir_version}, opset_import: ["": {opset}]>
        g (float[N, {first.shape[0]}] x) => (float[N, {second.shape[1]}] y) {{
            h = MatMul(x, w1)  r = Relu(h)  y = MatMul(r, w2)
        }}""",
        w1=first,
        w2=second,
    )


def store(model: Model, **options: Any) -> PassResult:
    return StoreWeights(**options).apply(model, Context())


def encodings(result: PassResult) -> dict[str, object]:
    return {
        decision.where: decision.figures["encoding"]
        for decision in result.decisions
        if "encoding" in decision.figures
    }


def assert_same_at_run_time(before: Model, after: Model) -> None:
    """Same operators, same constants bit for bit."""

    def seen(model: Model) -> tuple[list[str], set[bytes]]:
        graph = optimized_graph(model.to_proto(dense=True), level="basic").graph
        arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
        return sorted(n.op_type for n in graph.node), {a.tobytes() for a in arrays}

    assert seen(before) == seen(after)


@pytest.mark.parametrize(
    ("opset", "weight", "encoding"),
    [
        (17, pruned((200, 100), 0.1), "rice"),
        (17, pruned((64, 64), 0.8), "bitmask"),
        (17, few((200, 200), 14, density=0.1), "rice"),
        (10, pruned((64, 64), 0.2), "sparse"),  # no CumSum yet
        (17, noise((64, 64)), "dense"),
        (17, np.full((64, 64), -0.0, np.float32), "fill"),
        (17, few((64, 64), 200), "codebook-uint8"),
        (21, few((64, 64), 14), "codebook-uint4"),
        (25, few((64, 64), 4), "codebook-uint2"),
        (17, few((64, 64), 14), "codebook-packed"),
        (9, few((64, 64), 14), "codebook-packed"),
    ],
)
def test_the_smallest_encoding_is_taken(opset: int, weight: Array, encoding: str) -> None:
    check_encoding(opset, weight, encoding)


@pytest.mark.parametrize(
    ("weight", "encoding"),
    [
        (pruned((64, 64), 0.2), "sparse"),
        (few((200, 100), 30, density=0.005), "codebook-sparse"),
        (few((64, 64), 14), "codebook-packed"),
    ],
)
def test_portable_files_have_tables_and_sparse_initializers(weight: Array, encoding: str) -> None:
    check_encoding(17, weight, encoding, level="portable")


def test_smallest_files_have_huffman_codes_and_one_function() -> None:
    values = np.array([0, 1, -1, 2, -2, 3], np.float32)
    frequencies = [0.9, 0.04, 0.03, 0.02, 0.005, 0.005]
    first, second = (RNG.choice(values, (256, 256), p=frequencies) for _ in range(2))
    compact, smallest = mlp(first, second), mlp(first, second)
    store(compact)
    result = store(smallest, level="smallest")
    assert set(encodings(result).values()) == {"pool"}
    assert {d.figures["pool"] for d in result.decisions if "pool" in d.figures} == {"rice"}
    assert [function.name for function in smallest.functions] == ["m"]
    assert smallest.to_proto().ByteSize() < 0.96 * compact.to_proto().ByteSize()
    assert_same_at_run_time(mlp(first, second), smallest)
    onnx.checker.check_model(smallest.to_proto())
    again = load(smallest.to_proto())
    assert not store(again, level="smallest").changed


@pytest.mark.parametrize("name", SMALL)
def test_the_battery_holds_for_the_smallest_level(name: str) -> None:
    check_on_model(StoreWeights(level="smallest", min_elements=2), SMALL[name]())


def test_small_weights_share_one_stream() -> None:
    shapes = [(40, 60), (60, 50), (50, 30), (30, 10)]
    values = [few(shape, 12, density=0.15) for shape in shapes]
    text = "; ".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(4)).replace("h0", "x")
    text = text.replace(";", "").replace("h4", "y")
    model = build(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 40] x) => (float[N, 10] y) {{ {text} }}""",
        **{f"w{i}": w for i, w in enumerate(values)},
    )
    dense, apart = model.copy(), model.copy()
    options = [name for name in StoreWeights(level="smallest").allowed if name != "pool"]
    store(apart, encodings=options)
    result = store(model, level="smallest")
    pooled = [d for d in result.decisions if d.figures.get("encoding") == "pool"]
    assert [d.where for d in pooled] == ["w0", "w1", "w2", "w3"]
    assert model.to_proto().ByteSize() < 0.95 * apart.to_proto().ByteSize()
    assert_same_at_run_time(dense, model)
    taken = [d.figures for d in result.decisions if d.taken and "names" not in d.figures]
    saved = sum(int(d.get("before_bytes", 0)) - int(d["after_bytes"]) for d in taken)
    names = result.decisions[-1].figures
    saved += int(names["before_bytes"]) - int(names["after_bytes"])
    # Prices assume two letters for each name, at its place and at each use.
    assert saved == pytest.approx(dense.nbytes() - model.nbytes(), abs=400)


def test_small_weights_of_many_values_share_one_mask() -> None:
    shapes = [(40, 60), (60, 50), (50, 30)]
    text = "a = MatMul(x, w0)  b = MatMul(a, w1)  y = MatMul(b, w2)"
    model = build(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 40] x) => (float[N, 30] y) {{ {text} }}""",
        **{f"w{i}": pruned(shape, 0.2) for i, shape in enumerate(shapes)},
    )
    dense, apart = model.copy(), model.copy()
    options = [name for name in StoreWeights(level="smallest").allowed if name != "pool"]
    store(apart, encodings=options)
    result = store(model, encodings=(*options, "pool"))
    pooled = [d for d in result.decisions if d.figures.get("encoding") == "pool"]
    assert [d.where for d in pooled] == ["w0", "w1", "w2"]
    assert pooled[0].figures["density"] == pytest.approx(0.2, abs=0.05)  # of 2,400 draws
    assert model.nbytes() < apart.nbytes() - 200
    assert_same_at_run_time(dense, model)
    assert not store(load(model.to_proto()), encodings=(*options, "pool")).changed


def test_smallest_files_keep_interfaces_and_lose_notes() -> None:
    model = mlp(few((96, 64), 14), few((64, 32), 5)).to_proto()
    model.graph.node[0].name = "/encoder/layer.0/attention/self/query/MatMul"
    model.graph.node[0].doc_string = "a stack trace"
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 64]))
    stored = Model.from_proto(model)
    decision = store(stored, level="smallest").decisions[-1]
    assert decision.where == "the whole file"
    assert decision.figures["notes"] == 2
    after = stored.to_proto()
    assert (after.graph.input, after.graph.output) == (model.graph.input, model.graph.output)
    assert not any(node.name or node.doc_string for node in after.graph.node)
    assert not [info for info in after.graph.value_info if info.name == "h"]
    assert_same_at_run_time(Model.from_proto(model), stored)


def check_encoding(opset: int, weight: Array, encoding: str, **options: Any) -> None:
    """The first of two weights gets this encoding, which folds to the same bits."""
    model = mlp(weight.astype(np.float32), noise((weight.shape[1], 8)), opset)
    before = model.copy()
    result = store(model, **options)
    assert encodings(result)["w1"] == encoding
    assert result.changed == (encoding != "dense")
    assert_same_at_run_time(before, model)
    onnx.checker.check_model(model.to_proto())


def test_outputs_are_identical_with_and_without_optimizations() -> None:
    model = mlp(few((96, 64), 14), few((64, 32), 5, density=0.1))
    feed = {"x": noise((3, 96))}
    expected = open_session(model).run(feed)["y"]
    store(model)
    for optimize in ("none", "all"):
        stored = open_session(model, optimize=optimize).run(feed)["y"]
        assert stored.tobytes() == expected.tobytes()


def test_storing_twice_changes_nothing() -> None:
    model = mlp(few((96, 64), 14), few((64, 32), 5, density=0.02), opset=21, ir_version=10)
    store(model)
    stored = model.to_proto().SerializeToString()
    again = load(stored)
    result = store(again)
    assert not result.changed
    assert again.to_proto().SerializeToString() == stored
    assert all("stored weight already" in d.reason for d in result.decisions if d.where == "a")


@settings(deadline=None, max_examples=25)
@given(
    clusters=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    density=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    opset=st.sampled_from([9, 17, 21]),
)
def test_files_never_grow(
    clusters: tuple[int, int], density: float, shape: tuple[int, int, int], opset: int
) -> None:
    first = few(shape[:2], clusters[0], density)
    model = mlp(first, few(shape[1:], clusters[1]), opset, ir_version=8)
    before = model.to_proto()
    result = store(model, min_elements=2)
    after = model.to_proto()
    grown = after.ByteSize() - before.ByteSize()
    assert grown < 0 if result.changed else grown == 0
    dense = open_session(before, optimize="none")
    feed = {"x": noise((2, shape[0]))}
    stored = open_session(after, optimize="none").run(feed)["y"]
    assert stored.tobytes() == dense.run(feed)["y"].tobytes()


def test_weights_in_bodies_are_stored_there() -> None:
    model = build(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 64] x, bool c) => (float[N, 64] y) {
            y = If (c) <
                then_branch = t () => (t_out) { t_out = MatMul(x, w_then) },
                else_branch = e () => (e_out) {
                    m = Constant <value_int = 3> ()
                    e_out = Loop (m, c, x) <body = b (int64 i, bool k, float[N, 64] v)
                        => (bool k_out, float[N, 64] v_out) {
                            k_out = Identity(k)  v_out = MatMul(v, w_loop)
                        }>
                }>
        }"""
    ).to_proto()
    branches = {a.name: a.g for a in model.graph.node[0].attribute}
    _give(branches["then_branch"], {"w_then": few((64, 64), 14)})
    loop = branches["else_branch"].node[-1].attribute[0].g
    _give(loop, {"w_loop": few((64, 64), 5, density=0.02)})
    dense = Model.from_proto(model)
    stored = dense.copy()
    result = store(stored)
    taken = {where.rsplit("/", 1)[-1]: how for where, how in encodings(result).items()}
    assert taken["w_then"] == "codebook-packed"
    assert taken["w_loop"] != "dense"
    assert_same_at_run_time(dense, stored)
    for flag in (True, False):
        feed = {"x": noise((2, 64)), "c": np.array(flag)}
        expected = open_session(dense).run(feed)["y"]
        assert open_session(stored).run(feed)["y"].tobytes() == expected.tobytes()


def test_weights_in_functions_get_no_sparse_initializers() -> None:
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(few((64, 64), 14))),
        helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(
            np.where(RNG.random((64, 64)) < 0.2, noise((64, 64)), np.float32(0)))),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "z"], ["y"]),
    ]  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Twice", ["x"], ["y"], body, opsets[:1])
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in "xy"]
    calls = [
        helper.make_node("Twice", ["x"], ["m"], domain="local"),
        helper.make_node("Twice", ["m"], ["y"], domain="local"),
    ]
    graph = helper.make_graph(calls, "g", tensors[:1], tensors[1:])
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    dense = Model.from_proto(proto)
    stored = dense.copy()
    result = store(stored)
    assert set(encodings(result).values()) == {"codebook-packed", "rice"}
    assert not any(constant.sparse for constant in stored.constants())
    assert_same_at_run_time(dense, stored)


def test_strip_safe_files_fold_without_declared_shapes() -> None:
    weights = few((200, 100), 14, density=0.1), pruned((100, 50), 0.2)
    for strip_safe in (False, True):
        model = mlp(*weights)
        dense = model.copy()
        store(model, strip_safe=strip_safe)
        proto = model.to_proto()
        assert bool(proto.graph.value_info) != strip_safe
        del proto.graph.value_info[:]
        left = Counter(n.op_type for n in optimized_graph(proto, level="basic").graph.node)
        assert (left == Counter(MatMul=2, Relu=1)) == strip_safe
        assert_same_at_run_time(dense, model)


def test_integers_behind_dequantize_linear() -> None:
    quantized = RNG.integers(-3, 4, (64, 64)).astype(np.int8)
    model = build(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 64] x) => (float[N, 64] y) {
            w = DequantizeLinear(q, s, z)  h = MatMul(x, w)  y = Add(h, b)
        }""",
        q=quantized,
        s=np.float32(0.1),
        z=np.int8(0),
        b=RNG.integers(0, 2, 64).astype(np.float32),
    )
    dense = model.copy()
    # 49 pairs of 7 values: 6 bits a pair, without a sum of planes.
    assert encodings(store(model))["q"] == "codebook-vectors"
    assert_same_at_run_time(dense, model)


def test_float16_and_codebooks_per_channel() -> None:
    rows = RNG.normal(size=(48, 4)).astype(np.float16)
    weight = np.take_along_axis(rows, RNG.integers(0, 4, (48, 8 * 9)), 1).reshape(48, 8, 3, 3)
    model = build(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[N, 8, H, W] x) => (float16[N, 48, P, Q] y) { y = Conv(x, w) }""",
        w=weight,
    )
    dense = model.copy()
    (decision, *_) = (d for d in store(model).decisions if d.taken)
    assert decision.figures["per"] == "channel"
    assert decision.figures["bits"] == 2
    assert decision.figures["after_bytes"] < weight.nbytes / 4
    assert_same_at_run_time(dense, model)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[64, 64] x, float[64, 64] w) => (float[64, 64] y) { y = Add(x, w) }", "input"),
        ("g (float[64, 64] x) => (float[64, 64] w, float[64, 64] y) { y = Add(x, w) }", "output"),
        ("g (float[64, 64] x) => (float[64, 64] y) { y = Identity(x) }", "no node takes it"),
    ],
)
def test_constants_that_must_stay_constants(text: str, reason: str) -> None:
    model = build(f'<ir_version: 8, opset_import: ["": 17]> {text}', w=few((64, 64), 4))
    result = store(model)
    assert not result.changed
    assert reason in next(d.reason for d in result.decisions if d.where == "w")


def test_a_model_the_runtime_refuses_is_left_alone_aloud() -> None:
    model = build(
        """<ir_version: 8, opset_import: ["": 17, "nobody.knows": 1]>
        g (float[N, 64] x) => (float[N, 64] y) { y = nobody.knows.Mix(x, w) }""",
        w=few((64, 64), 14),
    )
    before = model.to_proto().SerializeToString()
    result = store(model)
    assert not result.changed
    assert "folding cannot be proved" in result.decisions[0].reason
    assert model.to_proto().SerializeToString() == before


def test_what_the_runtime_does_not_fold_gets_the_next_best_encoding() -> None:
    """A grid along the last axis ends in a Transpose, which is fused with the Gemm, not folded."""
    codes = np.rint(np.random.default_rng(0).normal(0, 30, (100, 10)))
    weight = (codes * (2049 / 2**17)).astype(np.float32)  # exact, but not in float16
    text = """<ir_version: 9, opset_import: ["": 20]>
        g (float[N, 100] x) => (float[N, 10] y) { y = Gemm(x, w) }"""
    model = build(text, w=weight + np.float32(0))
    dense = model.copy()
    (decision,) = [d for d in store(model).decisions if d.where == "w"]
    assert decision.taken
    assert decision.figures["encoding"] == "codebook-uint8"
    assert "grid was rejected: with it stored, ONNX Runtime would run other" in decision.reason
    assert model.to_proto().ByteSize() < dense.to_proto().ByteSize() / 2
    assert_same_at_run_time(dense, model)
    # With nothing else to choose it stays as it was, aloud.
    alone = dense.copy()
    (decision,) = [
        d for d in store(alone, encodings=("grid", "narrow")).decisions if d.where == "w"
    ]
    assert not decision.taken
    assert "grid was rejected" in decision.reason
    assert alone.to_proto().ByteSize() == dense.to_proto().ByteSize()


def test_options_restrict_the_choice() -> None:
    def taken(**options: Any) -> dict[str, object]:
        return encodings(store(mlp(few((64, 64), 14), few((64, 8), 3)), **options))

    assert taken(encodings=("codebook-uint8",))["w1"] == "codebook-uint8"
    assert set(taken(encodings=()).values()) == {"dense"}
    assert set(taken(exclude=("w1",))) == {"w2"}
    assert set(taken(include=("w1",))) == {"w1"}
    assert set(taken(min_elements=1000)) == {"w1"}


def test_decisions_account_for_all_bytes() -> None:
    model = mlp(few((96, 64), 14), few((64, 32), 5))
    before = model.to_proto().ByteSize()
    decisions = [d for d in store(model).decisions if d.taken]
    after = sum(int(d.figures["after_bytes"]) for d in decisions)
    saved = sum(int(d.figures.get("before_bytes", 0)) for d in decisions) - after
    # Prices assume two letters for each new name, of which the first 52 need one,
    # in the tensor and in each use.
    assert 0 <= (before - model.to_proto().ByteSize()) - saved < 160
    entropy = decisions[0].figures["entropy_bits"]
    assert entropy == pytest.approx(np.log2(14), abs=0.05)


@pytest.mark.parametrize(
    "name", ["models/lenet300.onnx", "models/silero_vad_16k_op15.onnx", "models/ppocr_v4_rec.onnx"]
)
def test_real_models_with_few_values(shared_models: Path, name: str) -> None:
    model = load(shared_models / name)
    for weight in model.weights():
        if weight.size > 500 and weight.dtype == np.float32:
            step = np.std(weight.values) / 3 or np.float32(1)
            weight.values = np.clip(np.round(weight.values / step), -7, 7) * step + np.float32(0)
    dense = model.copy()
    result = store(model)
    assert model.to_proto().ByteSize() < 0.7 * dense.to_proto().ByteSize()
    assert not [d.reason for d in result.decisions if "rejected" in d.reason]
    assert_same_at_run_time(dense, model)


def test_names_of_weights_are_kept_and_new_ones_are_short() -> None:
    model = mlp(few((96, 64), 14), few((64, 32), 14))
    store(model)
    graph = model.to_proto().graph
    made = {name for node in graph.node for name in node.output}
    assert {"w1", "w2"} <= made
    new = made | {tensor.name for tensor in graph.initializer}
    assert max(len(name) for name in new) == 2


def test_declarations_that_fusing_needs_stay() -> None:
    model = build(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, S, 64] x, int64[3] sizes) => (float[B, S, 64] output_of_all)
        <float[B, S, 64] with_a_long_name> {
            with_a_long_name = Reshape(x, sizes)
            summed_up_of_both = Add(with_a_long_name, x)
            output_of_all = LayerNormalization(summed_up_of_both, scales_of_it, shifts_of_it)
        }""",
        scales_of_it=np.ones(64, np.float32),
        shifts_of_it=np.full(64, 2, np.float32),
    )
    fused = [node.op_type for node in optimized_graph(model).graph.node]
    assert "SkipLayerNormalization" in fused
    result = store(model, level="smallest")
    assert "declarations stay" in result.decisions[-1].reason
    assert [node.op_type for node in optimized_graph(model).graph.node] == fused
    assert {len(node.outputs[0].name) for node in model.nodes()} == {1, len("output_of_all")}
