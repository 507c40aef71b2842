"""quantize-static in bodies: what runs there runs on integers, what never runs stays float."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Model, check_model, load
from onnxslim_passes.model.bodies import bodies
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]

SIZE = 128  # a matrix product of it is far on the integers' side of the estimated costs

BRANCHES = """g (float[8, 128] x, bool flag) => (float[8, 128] y) {
  h = Neg(x)
  y = If (flag) <
    then_branch = g1 () => (float[8, 128] a) { p = MatMul(h, v) a = Relu(p) },
    else_branch = g2 () => (float[8, 128] b) { q = MatMul(h, w) b = Tanh(q) }
  >
}"""

LOOP = """g (float[8, 128] x, int64 steps) => (float[8, 128] last) {
  go = Constant <value = bool {1}> ()
  last = Loop (steps, go, x) <
    body = g1 (int64 step, bool ready, float[8, 128] s) => (bool more, float[8, 128] next) {
      more = Identity(ready)
      m = MatMul(s, w)
      next = Tanh(m)
    }
  >
}"""

# Sub, because the runtime makes one Gemm of MatMul and Add.
SCAN = """g (float[4, 8, 128] x, float[8, 128] start) => (float[8, 128] last, float[T, N, M] all) {
  last, all = Scan <num_scan_inputs = 1,
    body = g1 (float[8, 128] s, float[8, 128] row) => (float[8, 128] next, float[N, M] out) {
      m = MatMul(row, w)
      next = Sub(s, m)
      out = Tanh(next)
    }
  > (start, x)
}"""


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def build(text: str, *, opset: int = 18) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>{text}')
    for seed, name in enumerate("wv"):
        if f", {name})" in text:
            weight = noise(SIZE, SIZE, seed=seed + 5, scale=0.1)
            proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    return load(proto)


def quantize(model: Model, feeds: list[dict[str, Array]], **options: Any) -> PassResult:
    return QuantizeStatic(**options).apply(model, Context(samples=Samples.from_feeds(feeds)))


def flags(*taken: bool) -> list[dict[str, Array]]:
    return [
        {"x": noise(8, SIZE, seed=seed), "flag": np.array(flag)} for seed, flag in enumerate(taken)
    ]


def loops(*steps: int) -> list[dict[str, Array]]:
    return [{"x": noise(8, SIZE, seed=n), "steps": np.array(n)} for n in steps]


def scans() -> list[dict[str, Array]]:
    return [{"x": noise(4, 8, SIZE, seed=n), "start": noise(8, SIZE, seed=9)} for n in range(3)]


def decision(result: PassResult, operator: str) -> Decision:
    (found,) = [d for d in result.decisions if operator in d.where and "weights" in d.figures]
    return found


def sqnr_db(reference: Model, candidate: Model, feed: dict[str, Array]) -> float:
    with open_session(reference) as one, open_session(candidate) as other:
        before, after = (next(iter(s.run(feed).values())) for s in (one, other))
    error = np.square(before.astype(np.float64) - after).sum()
    return float(10 * np.log10(np.square(before.astype(np.float64)).sum() / error))


def inner_operators(model: Model) -> set[str]:
    """The operators that the runtime executes in bodies."""
    graph = optimized_graph(model, weights=False).graph
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return {node.op_type for body in inner for node in body.node}


@pytest.mark.parametrize(
    ("text", "feeds"),
    [(BRANCHES, flags(True, False, True)), (LOOP, loops(2, 3)), (SCAN, scans())],
    ids=["If", "Loop", "Scan"],
)
def test_bodies_run_on_integers(text: str, feeds: list[dict[str, Array]]) -> None:
    model = build(text)
    reference, before = model.copy(), model.nbytes()
    result = quantize(model, feeds)
    assert result.changed
    check_model(model)
    assert all(d.taken for d in result.decisions if "weights" in d.figures)
    made = inner_operators(model)
    assert made & {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
    assert not made & {"MatMul", "Gemm", "FusedGemm"}
    assert min(sqnr_db(reference, model, feed) for feed in feeds) > 25  # 8 bits of normal noise
    assert model.nbytes() < before / 2


def test_a_branch_that_is_never_reached_stays_float() -> None:
    model = build(BRANCHES)
    reference = model.copy()
    result = quantize(model, flags(True, True))
    assert decision(result, "then_branch").taken
    (left,) = [d for d in result.decisions if "else_branch" in d.where]
    assert not left.taken
    assert "never reach" in left.reason
    other = flags(False)[0]
    with open_session(reference) as one, open_session(model) as two:
        assert np.array_equal(one.run(other)["y"], two.run(other)["y"])


def test_a_loop_without_steps_stays_as_it_is() -> None:
    model = build(LOOP)
    before = model.to_proto().SerializeToString(deterministic=True)
    result = quantize(model, loops(0))
    assert not result.changed
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert "never reach" in result.decisions[0].reason


def test_ranges_are_those_of_all_steps() -> None:
    feed, reached = loops(6)[0], []
    for steps in (1, 6):
        model = build(LOOP.replace("next = Tanh(m)", "next = Sub(m, s)"))
        reference = model.copy()
        assert quantize(model, [feed | {"steps": np.array(steps)}]).changed
        reached.append(sqnr_db(reference, model, feed))
    # The state grows from step to step: ranges of the first one saturate.
    assert reached[1] > reached[0] + 6


def test_a_weight_that_the_main_graph_shares_with_a_body_stays_whole() -> None:
    model = build(BRANCHES.replace("h = Neg(x)", "z = MatMul(x, w) h = Tanh(z)"))
    result = quantize(model, flags(True, False))
    (main,) = [d for d in result.decisions if not d.taken and "also feeds" in d.reason]
    assert "else_branch" in main.reason


def test_old_opsets_are_converted_with_the_whole_model() -> None:
    model = build(BRANCHES, opset=11)
    reference, feeds = model.copy(), flags(True, False)
    assert quantize(model, feeds).changed
    assert model.opset == 13
    check_model(model)
    assert min(sqnr_db(reference, model, feed) for feed in feeds) > 25


def test_bodies_are_quantized_behind_quantized_outputs() -> None:
    """placement=all renames what the If makes; its bodies are found all the same."""
    model = build(BRANCHES)
    context = Context(samples=Samples.from_feeds(flags(True, False)), target="qnn")
    result = QuantizeStatic(hold_db=0).apply(model, context)
    taken = [d.where for d in result.decisions if d.taken and "weights" in d.figures]
    assert len(taken) == 2
    check_model(model)


def test_overrides_reach_into_bodies() -> None:
    model = build(BRANCHES)
    node = next(node for body in bodies(model) for node in body.nodes if node.op == "MatMul")
    override = {"nodes": node.where, "per_channel": False}
    result = quantize(model, flags(True, False), overrides=[override])
    assert "per tensor" in decision(result, node.where).reason
    assert not [d for d in result.decisions if "overrides name it" in d.reason]


def test_candidates_in_bodies_need_samples() -> None:
    with pytest.raises(SamplesError, match="calibration samples"):
        QuantizeStatic().apply(build(BRANCHES), Context())


def test_a_second_run_changes_nothing() -> None:
    model = build(BRANCHES)
    assert quantize(model, flags(True, False)).changed
    once = model.to_proto().SerializeToString(deterministic=True)
    assert not quantize(model, flags(True, False)).changed
    assert model.to_proto().SerializeToString(deterministic=True) == once
