"""Bodies have samples: what they are fed while their model runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxslim_passes.calibration import OBSERVERS, Samples, collect_ranges
from onnxslim_passes.calibration.bodies import body_samples
from onnxslim_passes.calibration.samples import Feed
from onnxslim_passes.calibration.segments import main_tensors
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Graph, Model, load
from onnxslim_passes.model.bodies import bodies, body_model

HEADER = '<ir_version: 8, opset_import: ["": {opset}]>'

BRANCHES = """g (float[N] x, bool flag) => (float[N] y) {
  h = Neg(x)
  y = If (flag) <
    then_branch = g1 () => (float[N] a) { s = Mul(h, h) a = Neg(s) },
    else_branch = g2 () => (float[N] b) { b = Add(h, x) }
  >
}"""

# s(t + 1) = 2 s(t) + x; ends when a number in s exceeds 20.
LOOP = """g (float[N] x, int64 steps) => (float[N] last, float[T, N] all) {
  go = Constant <value = bool {1}> ()
  last, all = Loop (steps, go, x) <
    body = g1 (int64 step, bool ready, float[N] s) => (bool more, float[N] next, float[N] out) {
      two = Constant <value = float {2.0}> ()
      d = Mul(s, two)
      next = Add(d, x)
      top = ReduceMax <keepdims = 0> (next)
      limit = Constant <value = float {20.0}> ()
      more = Less(top, limit)
      out = Identity(d)
    }
  >
}"""

SCAN = """g (float[T, N] x, float[N] start) => (float[N] last, float[T, N] all) {
  last, all = Scan <num_scan_inputs = 1, scan_input_directions = [1],
    body = g1 (float[N] s, float[N] row) => (float[N] next, float[N] out) {
      next = Add(s, row)
      out = Neg(next)
    }
  > (start, x)
}"""

NESTED = """g (float[N] x, int64 steps) => (float[N] last) {
  go = Constant <value = bool {1}> ()
  last = Loop (steps, go, x) <
    body = g1 (int64 step, bool ready, float[N] s) => (bool more, float[N] next) {
      more = Identity(ready)
      one = Constant <value = int64 {1}> ()
      late = Greater(step, one)
      next = If (late) <
        then_branch = g2 () => (float[N] a) { a = Neg(s) },
        else_branch = g3 () => (float[N] b) { b = Add(s, x) }
      >
    }
  >
}"""


def graph(text: str, opset: int = 18) -> Model:
    return load(onnx.parser.parse_model(HEADER.format(opset=opset) + text))


def floats(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def body(model: Model, name: str) -> Graph:
    return next(body for body in bodies(model) if body.name == name)


def fed(model: Model, name: str, feeds: Sequence[Feed]) -> list[Feed]:
    found = body_samples(model, body(model, name), Samples.from_feeds(list(feeds)))
    assert found is not None
    return list(found.feeds(()))


def test_a_branch_sees_the_feeds_that_take_it() -> None:
    model = graph(BRANCHES)
    feeds = [{"x": floats(i, 1), "flag": np.array(i % 3 == 0)} for i in range(5)]
    assert [feed["h"].tolist() for feed in fed(model, "g1", feeds)] == [[0, -1], [-3, -1]]
    otherwise = fed(model, "g2", feeds)
    assert [feed["x"][0] for feed in otherwise] == [1, 2, 4]
    assert all(np.array_equal(feed["h"], -feed["x"]) for feed in otherwise)


def test_a_branch_never_taken_has_no_samples() -> None:
    model = graph(BRANCHES)
    samples = Samples.from_feeds([{"x": floats(1, 2), "flag": np.array(True)}])
    assert body_samples(model, body(model, "g2"), samples) is None


def test_a_loop_feeds_its_body_until_it_ends() -> None:
    model = graph(LOOP)
    short = {"x": floats(1, 0), "steps": np.array(2)}
    long = {"x": floats(1, 0), "steps": np.array(99)}
    states = [feed["s"][0] for feed in fed(model, "g1", [short, long])]
    assert states == [1, 3, 1, 3, 7, 15]  # 31 ends it
    assert [int(feed["step"]) for feed in fed(model, "g1", [long])] == [0, 1, 2, 3]


def test_a_loop_that_never_starts_has_no_samples() -> None:
    model = graph(LOOP)
    samples = Samples.from_feeds([{"x": floats(1, 2), "steps": np.array(0)}])
    assert body_samples(model, body(model, "g1"), samples) is None


def test_a_scan_feeds_slices_in_its_direction() -> None:
    model = graph(SCAN)
    feed = {"x": np.array([[1, 2], [3, 4], [5, 6]], np.float32), "start": floats(0, 0)}
    steps = fed(model, "g1", [feed])
    assert [step["row"].tolist() for step in steps] == [[5, 6], [3, 4], [1, 2]]
    assert [step["s"].tolist() for step in steps] == [[0, 0], [5, 6], [8, 10]]


def test_bodies_within_bodies() -> None:
    model = graph(NESTED)
    feed = {"x": floats(1, 2), "steps": np.array(4)}
    assert [step["s"][0] for step in fed(model, "g3", [feed])] == [1, 2]
    assert [step["s"][0] for step in fed(model, "g2", [feed])] == [3, -3]


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_every_observer_works_in_a_body(observer: str) -> None:
    model = graph(LOOP)
    feed = {"x": floats(1, -1), "steps": np.array(3)}
    part = body_model(model, body(model, "g1"))
    samples = body_samples(model, body(model, "g1"), Samples.from_feeds([feed]))
    assert samples is not None
    tensors = main_tensors(part.graph)
    found = collect_ranges(part, [tensors["d"]], samples, observer=observer)["d"]
    assert found.seen == 6  # three steps of two
    assert -14 <= found.lo <= found.hi <= 14
    if observer == "min-max":
        assert (found.lo, found.hi) == (-14, 14)


def test_infinities_inside_are_no_error_of_the_samples() -> None:
    text = BRANCHES.replace("h = Neg(x)", "z = Sub(x, x) h = Div(x, z)")
    model = graph(text)
    (feed,) = fed(model, "g1", [{"x": floats(1, 2), "flag": np.array(True)}])
    assert np.isinf(feed["h"]).all()


def test_a_scan_with_a_batch_axis_is_refused() -> None:
    text = SCAN.replace("scan_input_directions = [1],", "")
    model = graph(text, opset=8)
    samples = Samples.from_feeds([{"x": np.zeros((1, 2), np.float32), "start": floats(0, 0)}])
    with pytest.raises(UnsupportedModelError, match="bodies of Scan of opset 8"):
        body_samples(model, bodies(model)[0], samples)
