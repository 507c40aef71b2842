"""The calibration run: ranges of tensors, measured in the graph."""

import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.calibration import Samples, TensorRange, collect_ranges
from onnxslim_passes.calibration.run import main_tensors
from onnxslim_passes.errors import RuntimeRefusedError, SamplesError, UnsupportedModelError
from onnxslim_passes.model import Model, load

CHAIN = "(float[N, 3] x) => (float[N, 3] y) { a = Relu(x) b = Neg(a) y = Exp(b) }"
SINGLE = np.float32


def graph(text: str, opset: int = 18) -> Model:
    return load(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text}'))


def ranges(
    model: Model, names: Iterable[str], feeds: Any, **options: Any
) -> dict[str, TensorRange]:
    tensors = main_tensors(model.graph)
    return collect_ranges(model, [tensors[n] for n in names], Samples.from_feeds(feeds), **options)


def test_inputs_inner_tensors_and_outputs() -> None:
    model = graph(CHAIN)
    before = model.to_proto().SerializeToString(deterministic=True)
    x = np.array([[-2, 0, 1], [3, -1, 0]], SINGLE)
    found = ranges(model, "xaby", [{"x": x}, {"x": x / 2}])
    assert found["x"] == TensorRange(-2, 3, 12, 2)
    assert found["a"] == TensorRange(0, 3, 12, 2)
    assert found["b"] == TensorRange(-3, 0, 12, 2)
    assert found["y"].hi == 1
    assert found["y"].lo == pytest.approx(math.exp(-3))
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_no_tensors_no_run() -> None:
    assert ranges(graph(CHAIN), (), lambda: iter(())) == {}


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), unique=True, max_size=6))
def test_any_grouping_gives_the_same_ranges(cuts: list[int]) -> None:
    x = np.random.default_rng(1).normal(size=(12, 3)).astype(SINGLE)
    model = graph(CHAIN)
    whole = ranges(model, "xaby", [{"x": x}])
    parts = [{"x": part} for part in np.split(x, sorted(cuts))]
    assert ranges(model, "xaby", parts) == whole


def test_varying_lengths() -> None:
    model = graph("(float[N, K] x) => (float[N, K] y) { y = Neg(x) }")
    feeds = [{"x": np.full((n, k), n * k, SINGLE)} for n, k in ((1, 7), (3, 2), (2, 5))]
    assert ranges(model, "y", feeds)["y"] == TensorRange(-10, -6, 23, 2)


@pytest.mark.parametrize("opset", [7, 11, 13, 18, 21])
@pytest.mark.parametrize("element", ["float", "float16", "double"])
def test_opsets_and_types(opset: int, element: str) -> None:
    model = graph(f"({element}[N] x) => ({element}[N] y) {{ y = Neg(x) }}", opset)
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[element]
    # float16 sums end at 65504: the statistics must be computed in float32.
    x = np.array([60000, 60000, -3, 1], dtype)
    assert ranges(model, "y", [{"x": x}])["y"] == TensorRange(-60000, 3, 4, 1)


def test_bfloat16_and_integers() -> None:
    model = graph(
        "(bfloat16[N] x) => (bfloat16[N] y, int32[N] z) { y = Identity(x) z=Cast<to=6>(x)}"
    )
    found = ranges(model, "xz", [{"x": np.array([1.5, -2.5], ml_dtypes.bfloat16)}])
    assert (found["x"].lo, found["x"].hi) == (-2.5, 1.5)
    assert (found["z"].lo, found["z"].hi) == (-2, 1)


def test_rank_zero_input() -> None:
    model = graph("(float[N] x, float s) => (float[N] y) { y = Mul(x, s) }")
    feeds = [{"x": np.ones(2, SINGLE), "s": np.array(v, SINGLE)} for v in (2, 5)]
    found = ranges(model, "sy", feeds)
    assert found["s"] == TensorRange(2, 5, 2, 0)
    assert found["y"] == TensorRange(2, 5, 4, 1)


def test_fixed_batch_of_one(tmp_path: Path) -> None:
    model = graph("(float[1, 2] x) => (float[1, 2] y) { y = Neg(x) }")
    np.savez(tmp_path / "c.npz", x=np.arange(10, dtype=SINGLE).reshape(5, 2))
    tensors = main_tensors(model.graph)
    found = collect_ranges(model, [tensors["y"]], Samples.open(tmp_path / "c.npz"))
    assert found["y"] == TensorRange(-9, 0, 10, 2)


def test_empty_tensors_are_passed_over() -> None:
    model = graph("(float[N] x) => (float[N] y) { y = Neg(x) }")
    empty, full = np.zeros(0, SINGLE), np.ones(2, SINGLE)
    assert ranges(model, "y", [{"x": empty}, {"x": full}])["y"] == TensorRange(-1, -1, 2, 1)
    never = ranges(model, "y", [{"x": empty}])["y"]
    assert math.isnan(never.lo)
    assert math.isnan(never.hi)
    assert never.seen == 0


def test_shared_names_are_measured_once() -> None:
    assert list(ranges(graph(CHAIN), "aa", [{"x": np.ones((1, 3), SINGLE)}])) == ["a"]


@pytest.mark.parametrize("place", [0, 7, 99])
@pytest.mark.parametrize(("op", "text"), [("Sqrt", "1 NaN of 100"), ("Log", "1 infinite of 100")])
def test_non_finite_names_tensor_and_node(op: str, text: str, place: int) -> None:
    model = graph(f"(float[N] x) => (float[N] y) {{ bad = {op}(x) y = Abs(bad) }}")
    model.graph.nodes[0].name = "culprit"
    x = np.ones(100, SINGLE)
    x[place] = -1 if op == "Sqrt" else 0
    feeds = [{"x": np.ones(100, SINGLE)}, {"x": x}]
    with pytest.raises(
        SamplesError, match=rf"'bad', made by node 'culprit' \({op}\), holds {text}"
    ):
        ranges(model, ["bad", "y"], feeds)
    found = ranges(model, ["x", "bad"], feeds, strict=False)
    assert found["x"].finite
    assert not found["bad"].finite


def test_huge_finite_values_are_no_error() -> None:
    model = graph("(float[N] x) => (float[N] y) { y = Neg(x) }")
    lowest = np.finfo(SINGLE).min
    feeds = [{"x": np.full(5, v, SINGLE)} for v in (1, lowest, 0, lowest)]
    assert ranges(model, "y", feeds)["y"] == TensorRange(-1, -lowest, 20, 1)


def test_errors_of_data_and_model() -> None:
    model = graph(CHAIN)
    with pytest.raises(SamplesError, match="holds no samples"):
        ranges(model, "y", [])
    with pytest.raises(SamplesError, match="'z' is not an input"):
        ranges(model, "y", [{"z": np.ones((1, 3), SINGLE)}])
    fussy = graph(
        "(float[N, 4] x) => (float[N, 3] y)"
        "{ s = Constant<value = int64[2] {-1, 3}>() y = Reshape(x, s) }"
    )
    with pytest.raises(RuntimeRefusedError, match="Reshape"):
        ranges(fussy, "y", [{"x": np.ones((1, 4), SINGLE)}])
    texts = graph("(string[N] x) => (string[N] y) { y = Identity(x) }")
    with pytest.raises(UnsupportedModelError, match="'y' cannot be measured: it holds string"):
        ranges(texts, "y", [{"x": np.array(["a"], object)}])


def test_tensors_of_bodies_are_refused() -> None:
    model = graph(
        "(bool c, float[N] x) => (float[N] y) { y = If(c)"
        "<then_branch = t () => (float[N] p) { q = Neg(x) p = Neg(q) },"
        " else_branch = e () => (float[N] r) { r = Abs(x) }> }"
    )
    body = next(g for g in model.graphs() if "then" in g.path)
    inner = body.nodes[0].outputs[0]
    feeds = [{"c": np.array(True), "x": np.ones(2, SINGLE)}]
    with pytest.raises(UnsupportedModelError, match="not in the main graph"):
        collect_ranges(model, [inner], Samples.from_feeds(feeds))
    assert ranges(model, "y", feeds)["y"].hi == 1


def test_progress_is_shown_every_feed() -> None:
    class Counter:
        taken = 0

        def track(
            self, items: Iterable[Any], label: str, total: int | None = None
        ) -> Iterator[Any]:
            for item in items:
                self.taken += 1
                yield item

    counter = Counter()
    ranges(graph(CHAIN), "y", [{"x": np.ones((1, 3), SINGLE)}] * 3, progress=counter)
    assert counter.taken == 3


MEMORY = """
import resource, sys, numpy as np, onnx.parser
from onnxslim_passes.calibration import Samples, collect_ranges
from onnxslim_passes.calibration.run import main_tensors
from onnxslim_passes.model import load
model = load(onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 18]>
g (float[N, K] x) => (float[N, K] y) { a = Relu(x) b = Exp(a) c = Neg(b) y = Abs(c) }'''))
def feeds():
    for i in range(int(sys.argv[1])):
        yield {"x": np.full((1, 250_000 - 999 * (i % 7)), 0.5, np.float32)}
names = main_tensors(model.graph)
collect_ranges(model, [names[n] for n in "xabcy"], Samples.from_feeds(feeds))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the module resource is of POSIX")
def test_memory_does_not_grow_with_the_samples() -> None:
    # The samples hold 1 MB each, and 4 MB of activations: 256 of them would show.
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, count], check=True, capture_output=True, text=True
            ).stdout
        )
        for count in ("16", "256")
    )
    assert many <= 1.1 * few
