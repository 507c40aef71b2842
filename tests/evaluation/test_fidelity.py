"""Fidelity: figures of closeness, summed over feeds."""

import math
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_passes.errors import SamplesError, VerificationError
from onnxslim_passes.evaluation.fidelity import (
    Fidelity,
    OutputFidelity,
    OutputSums,
    compare_outputs,
    flatten,
)
from onnxslim_passes.runtime import Session, open_session


def session(text: str) -> Session:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {text}')
    return open_session(model)


def figures(*pairs: tuple[Any, Any]) -> OutputFidelity:
    sums = OutputSums("y")
    for reference, candidate in pairs:
        sums.update(reference, candidate)
    return sums.result()


def test_identical() -> None:
    x = np.arange(5, dtype=np.float32)
    assert figures((x, x)) == OutputFidelity("y", math.inf, 1.0, 0.0)
    assert figures((x * 0, x * 0)) == OutputFidelity("y", math.inf, 1.0, 0.0)
    assert figures((x[:0], x[:0])) == OutputFidelity("y", math.inf, 1.0, 0.0)


def test_known_noise() -> None:
    found = figures((np.array([3.0, 4.0]), np.array([3.0, 4.5])))
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.max_error == 0.5
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_signal_of_zeros() -> None:
    found = figures((np.zeros(3), np.ones(3)))
    assert (found.sqnr_db, found.cosine, found.max_error) == (-math.inf, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_do_not_overflow(dtype: type) -> None:
    x = np.full(10_000, np.finfo(dtype).max, dtype)
    assert figures((x, x * dtype(0.5))).sqnr_db == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize(
    ("reference", "candidate", "sqnr_db"),
    [
        ([1, np.nan, np.inf], [1, np.nan, np.inf], math.inf),
        ([1, np.nan], [2, np.nan], 0.0),
        ([1, 2], [1, np.nan], -math.inf),
        ([1, np.nan], [1, 2], -math.inf),
        ([1, np.inf], [1, -np.inf], -math.inf),
        ([1, 2], [1, np.inf], -math.inf),
        ([1, 2], [1, 2, 3], -math.inf),
    ],
)
def test_nan_infinity_and_shapes(reference: list, candidate: list, sqnr_db: float) -> None:
    found = figures((np.array(reference, np.float32), np.array(candidate, np.float32)))
    assert found.sqnr_db == sqnr_db
    assert (found.max_error == math.inf) == (sqnr_db == -math.inf)


floats = hnp.arrays(np.float64, 24, elements=st.floats(-100, 100))


@settings(deadline=None)
@given(r=floats, noise=floats, cuts=st.lists(st.integers(0, 24), max_size=4))
def test_any_grouping_gives_the_same_figures(
    r: np.ndarray, noise: np.ndarray, cuts: list[int]
) -> None:
    c = r + noise
    whole = figures((r, c))
    parts = figures(*zip(np.split(r, sorted(cuts)), np.split(c, sorted(cuts)), strict=True))
    assert parts.max_error == whole.max_error
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert -1 <= whole.cosine <= 1


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.object_])
def test_agreement_of_others(dtype: type) -> None:
    r = np.array([1, 0, 1, 1]).astype(dtype)
    c = np.array([1, 1, 1, 1]).astype(dtype)
    found = figures((r, c), (r, r))
    assert found.agreement == 7 / 8
    assert math.isnan(found.sqnr_db)
    assert figures((r, c[:2])).agreement == 0


def test_flatten() -> None:
    table = [{1: 0.25, 0: 0.75}, {1: 0.5, 0: 0.5}]
    assert flatten(table).tolist() == [0.75, 0.25, 0.5, 0.5]
    assert flatten([np.ones((2, 2)), np.zeros(1)]).tolist() == [1, 1, 1, 1, 0]
    assert flatten(None).size == flatten([]).size == 0


def test_worst_over_outputs() -> None:
    outputs = (
        OutputFidelity("a", 30.0, 0.99, 0.5),
        OutputFidelity("b", 20.0, 0.999, 0.25),
        OutputFidelity("c", math.nan, math.nan, math.nan, 0.75),
    )
    found = Fidelity(outputs, 3)
    assert (found.sqnr_db, found.cosine, found.max_error, found.agreement) == (20, 0.99, 0.5, 0.75)
    assert math.isnan(Fidelity(outputs[2:], 1).sqnr_db)
    same = Fidelity((OutputFidelity("c", math.nan, math.nan, math.nan, 1.0),), 1)
    assert (same.sqnr_db, same.cosine, same.max_error) == (math.inf, 1.0, 0.0)


def test_two_sessions_over_feeds_of_any_length() -> None:
    inputs = "(float[N] x, float[N] z) => (float[N] y, int64[N] k)"
    reference = session(inputs + "{ y = Add(x, z) k = Cast<to = 7>(x) }")
    candidate = session(inputs + "{ y = Sub(x, z) k = Cast<to = 7>(x) }")
    feeds = ({"x": np.ones(n, np.float32), "z": np.ones(n, np.float32)} for n in (1, 3))
    found = compare_outputs(reference, candidate, feeds)
    assert found.samples == 2
    assert [o.name for o in found.outputs] == ["y", "k"]
    assert found.outputs[0].sqnr_db == 0
    assert found.max_error == 2
    assert found.agreement == 1


def test_outputs_are_matched_by_name_then_by_place() -> None:
    text = "(float[N] x) => (float[N] {}, float[N] {}) {{ {} = Neg(x) {} = Abs(x) }}"
    reference = session(text.format("a", "b", "a", "b"))
    feeds = [{"x": np.ones(2, np.float32)}]
    for names in (("b", "a", "a", "b"), ("c", "d", "c", "d")):
        assert compare_outputs(reference, session(text.format(*names)), feeds).sqnr_db == math.inf


def test_candidate_without_an_unused_input() -> None:
    reference = session("(float[N] x, float[N] z) => (float[N] y) { y = Abs(x) }")
    candidate = session("(float[N] x) => (float[N] y) { y = Abs(x) }")
    ones = np.ones(2, np.float32)
    assert compare_outputs(reference, candidate, [{"x": ones, "z": ones}]).cosine == 1


def test_errors() -> None:
    one = session("(float[N] x) => (float[N] y) { y = Abs(x) }")
    two = session("(float[N] x) => (float[N] y, float[N] z) { y = Abs(x) z = Neg(x) }")
    with pytest.raises(VerificationError, match="y in the model, y, z in the model"):
        compare_outputs(one, two, [])
    with pytest.raises(SamplesError, match="no samples"):
        compare_outputs(one, one, [])
