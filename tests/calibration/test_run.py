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

from onnxslim_passes.calibration import (
    OBSERVERS,
    ObserverOptions,
    RangeCache,
    Samples,
    TensorRange,
    collect_ranges,
)
from onnxslim_passes.calibration.run import main_tensors
from onnxslim_passes.errors import (
    RuntimeRefusedError,
    SamplesError,
    UnknownNameError,
    UnsupportedModelError,
)
from onnxslim_passes.model import Model, load

CHAIN = "(float[N, 3] x) => (float[N, 3] y) { a = Relu(x) b = Neg(a) y = Exp(b) }"
SINGLE = np.float32
every_observer = pytest.mark.parametrize("observer", list(OBSERVERS))


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


@every_observer
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 11), unique=True, max_size=6))
def test_any_grouping_gives_the_same_ranges(observer: str, cuts: list[int]) -> None:
    x = np.random.default_rng(1).normal(size=(12, 3)).astype(SINGLE)
    model = graph(CHAIN)
    whole = ranges(model, "xaby", [{"x": x}], observer=observer)
    parts = [{"x": part} for part in np.split(x, sorted(cuts))]
    assert ranges(model, "xaby", parts, observer=observer) == whole


@every_observer
def test_varying_lengths(observer: str) -> None:
    model = graph("(float[N, K] x) => (float[N, K] y) { y = Neg(x) }")
    feeds = [{"x": np.full((n, k), n * k, SINGLE)} for n, k in ((1, 7), (3, 2), (2, 5))]
    found = ranges(model, "y", feeds, observer=observer)["y"]
    assert (found.seen, found.rank) == (23, 2)
    assert -10 <= found.lo <= found.hi <= -6
    if observer == "min-max":
        assert found == TensorRange(-10, -6, 23, 2)


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


@every_observer
def test_empty_tensors_are_passed_over(observer: str) -> None:
    model = graph("(float[N] x) => (float[N] y) { y = Neg(x) }")
    empty, full = np.zeros(0, SINGLE), np.ones(2, SINGLE)
    found = ranges(model, "y", [{"x": empty}, {"x": full}, {"x": empty}], observer=observer)
    assert found["y"] == TensorRange(-1, -1, 2, 1)
    never = ranges(model, "y", [{"x": empty}], observer=observer)["y"]
    assert math.isnan(never.lo)
    assert math.isnan(never.hi)
    assert never.seen == 0


def test_shared_names_are_measured_once() -> None:
    assert list(ranges(graph(CHAIN), "aa", [{"x": np.ones((1, 3), SINGLE)}])) == ["a"]


@every_observer
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_axes(observer: str, shape: tuple[int, int]) -> None:
    model = graph("(float[N, K] x) => (float[N, K] y) { y = Neg(x) }")
    found = ranges(model, "y", [{"x": np.zeros(shape, SINGLE)}], observer=observer)
    assert (found["y"].seen, found["y"].finite) == (0, True)


@every_observer
@pytest.mark.parametrize("place", [0, 7, 99])
@pytest.mark.parametrize(("op", "text"), [("Sqrt", "1 NaN of 100"), ("Log", "1 infinite of 100")])
def test_non_finite_names_tensor_and_node(op: str, text: str, place: int, observer: str) -> None:
    model = graph(f"(float[N] x) => (float[N] y) {{ bad = {op}(x) y = Abs(bad) }}")
    model.graph.nodes[0].name = "culprit"
    x = np.ones(100, SINGLE)
    x[place] = -1 if op == "Sqrt" else 0
    feeds = [{"x": np.ones(100, SINGLE)}, {"x": x}]
    with pytest.raises(
        SamplesError, match=rf"'bad', made by node 'culprit' \({op}\), holds {text}"
    ):
        ranges(model, ["bad", "y"], feeds, observer=observer)
    found = ranges(model, ["x", "bad"], feeds, strict=False, observer=observer)
    assert found["x"].finite
    assert not found["bad"].finite


def test_huge_finite_values_are_no_error() -> None:
    model = graph("(float[N] x) => (float[N] y) { y = Neg(x) }")
    lowest = np.finfo(SINGLE).min
    feeds = [{"x": np.full(5, v, SINGLE)} for v in (1, lowest, 0, lowest)]
    assert ranges(model, "y", feeds)["y"] == TensorRange(-1, -float(lowest), 20, 1)


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


# ---------------- observers


def test_an_unknown_observer() -> None:
    with pytest.raises(UnknownNameError, match=r"observer 'min_max'\. Did you mean 'min-max'"):
        ranges(graph(CHAIN), "y", [{"x": np.ones((1, 3), SINGLE)}], observer="min_max")


@every_observer
@pytest.mark.parametrize("opset", [9, 13, 18, 21])
@pytest.mark.parametrize("element", ["float", "float16", "double"])
def test_observers_on_opsets_and_types(observer: str, opset: int, element: str) -> None:
    model = graph(f"({element}[N, 4] x) => ({element}[N, 4] y) {{ y = Neg(x) }}", opset)
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[element]
    x = np.arange(400).reshape(100, 4).astype(dtype)
    found = ranges(model, "y", [{"x": x[:64]}, {"x": x[64:]}], observer=observer)["y"]
    if observer == "moving-average":  # of -3, 0; -7, -4; ... -399, -396
        assert (found.lo, found.hi) == pytest.approx((-363, -360), rel=1e-4)
    else:
        assert -399 <= found.lo < -380
        assert -3 <= found.hi <= 0


def test_options_reach_the_observer() -> None:
    x = np.arange(1, 1001, dtype=SINGLE).reshape(-1, 1)
    model = graph("(float[N, 1] x) => (float[N, 1] y) { y = Identity(x) }")
    options = ObserverOptions(percentile=90)
    found = ranges(model, "y", [{"x": x}], observer="percentile", options=options)["y"]
    assert (found.lo, found.hi) == pytest.approx((51, 950), rel=0.005)


def test_the_moving_average_goes_by_sample_where_rows_are_samples() -> None:
    model = graph(
        "(float[N, 2] x) => (float[N, 2] y, float s) { y = Neg(x) s = ReduceSum<keepdims=0>(x) }"
    )
    x = np.array([[0, 1], [4, 5], [2, 9]], SINGLE)
    found = ranges(
        model,
        "ys",
        [{"x": x}],
        observer="moving-average",
        options=ObserverOptions(momentum=0.5),
    )
    assert (found["y"].lo, found["y"].hi) == (-(((1 + 5) / 2) + 9) / 2, -((4 / 2) + 2) / 2)
    assert found["s"] == TensorRange(21, 21, 1, 0)


def test_both_runs_see_the_same_values_in_a_model_with_bodies(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    feeds = [{"x": np.full((2, 2), v, SINGLE), "flag": np.array(v > 0)} for v in (1, -2)]
    for observer in ("min-max", "percentile"):
        found = ranges(model, "xy", feeds, observer=observer)
        assert (found["x"].lo, found["x"].hi) == (-2, 1)
        assert found["y"].seen == 8


def test_a_cache_answers_without_a_run(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path)
    model, feeds = graph(CHAIN), [{"x": np.ones((2, 3), SINGLE)}]
    first = ranges(model, "xy", feeds, cache=cache, observer="mse")
    (entry,) = tmp_path.iterdir()
    entry.write_text(entry.read_text().replace('"lo": 1.0', '"lo": 0.5'))
    assert ranges(model, "xy", feeds, cache=cache, observer="mse")["x"].lo == 0.5
    assert first["x"].lo == 1


def test_a_cached_infinity_is_still_an_error_where_it_was_one(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path)
    model = graph("(float[N] x) => (float[N] y) { y = Log(x) }")
    feeds = [{"x": np.zeros(3, SINGLE)}]
    assert not ranges(model, "y", feeds, cache=cache, strict=False)["y"].finite
    assert not ranges(model, "y", feeds, cache=cache, strict=False)["y"].finite
    with pytest.raises(SamplesError, match="3 infinite of 3"):
        ranges(model, "y", feeds, cache=cache)


# ---------------- memory

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
collect_ranges(model, [names[n] for n in "xabcy"], Samples.from_feeds(feeds), observer=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@every_observer
@pytest.mark.skipif(sys.platform == "win32", reason="the module resource is of POSIX")
def test_memory_does_not_grow_with_the_samples(observer: str) -> None:
    # The samples hold 1 MB each, and 4 MB of activations: 256 of them would show.
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, count, observer],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for count in ("16", "256")
    )
    assert many <= 1.1 * few
