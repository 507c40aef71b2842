"""Laws of observers."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_passes.calibration.observers import (
    OBSERVERS,
    Entropy,
    LeastSquares,
    MinMax,
    MovingAverage,
    Observer,
    ObserverOptions,
    Percentile,
    observer_named,
)
from onnxslim_passes.errors import UnknownNameError, UsageError
from onnxslim_passes.numerics.affine import choose_grid, fake_quantize

Array = npt.NDArray[Any]

ALL = pytest.mark.parametrize("name", list(OBSERVERS))

# A row a sample.
values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 3)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def observer(name: str, **options: Any) -> Observer:
    return OBSERVERS[name].from_options(ObserverOptions(**options))


def found(name: str, *pieces: Array, **options: Any) -> tuple[float, float]:
    seen = observer(name, **options)
    for piece in pieces:
        seen.update(piece)
    return seen.range()


def normal(size: int = 50_000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(size, 1)).astype(np.float32)


def error(x: Array, ends: tuple[float, float], levels: int = 256) -> float:
    grid = choose_grid(*ends, np.uint16, levels=(0, levels - 1))
    return float(np.square(x.astype(np.float64) - fake_quantize(x, grid)).sum())


# ---------------- laws of all


@ALL
@settings(max_examples=30)
@given(values=values, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_any_grouping_gives_the_same_range(name: str, values: Array, cuts: list[int]) -> None:
    assert found(name, values) == found(name, *np.split(values, sorted(cuts)))


@pytest.mark.parametrize("name", ["min-max", "percentile", "entropy", "mse"])
@settings(max_examples=30)
@given(values=values)
def test_the_order_of_values_does_not_matter(name: str, values: Array) -> None:
    assert found(name, *values) == found(name, *np.sort(values, axis=None)[:, None])


@ALL
@settings(max_examples=60)
@given(values=values)
@example(values=np.array([[-3.0e38], [1.0]], np.float32))
@example(values=np.array([[1e-45], [0.0], [-0.0]], np.float32))
def test_ranges_are_finite_and_within_what_was_seen(name: str, values: Array) -> None:
    low, high = found(name, values)
    assert low <= high
    # The average of equal numbers may be off by the last bit.
    slack = 1e-12 * float(np.abs(values).max())
    assert values.min() - slack <= low
    assert high <= values.max() + slack
    assert np.isfinite(choose_grid(low, high, np.uint8).scale)


@ALL
def test_nothing_seen_has_no_range(name: str) -> None:
    assert all(math.isnan(bound) for bound in found(name, np.zeros((0, 3), np.float32)))


@ALL
@pytest.mark.parametrize("constant", [0.0, -0.0, 3.5, -1e-40, 3.4e38])
def test_a_constant_is_its_own_range(name: str, constant: float) -> None:
    x = np.full((5, 2), constant, np.float32)
    assert found(name, x) == pytest.approx((x[0, 0], x[0, 0]))


@ALL
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, np.int64])
def test_other_types_and_rank_zero(name: str, dtype: type[Any]) -> None:
    low, high = found(name, np.array([[0, 7, 7, 100]], dtype), np.array(100, dtype))
    assert 0 <= low < high <= 100


@ALL
def test_values_beyond_float32(name: str) -> None:
    x = np.array([[-1e300, 1.0, 1e300]])
    assert all(math.isfinite(end) for end in found(name, x))


# ---------------- each


@given(values=values)
def test_min_max_is_the_smallest_and_the_largest(values: Array) -> None:
    assert found("min-max", values) == (values.min(), values.max())


def test_moving_average_by_hand() -> None:
    samples = np.array([[-1, 2], [-3, 4], [0, 10]], np.float32)
    low = (-1 * 0.5 + -3 * 0.5) * 0.5 + 0 * 0.5
    high = (2 * 0.5 + 4 * 0.5) * 0.5 + 10 * 0.5
    assert found("moving-average", samples, momentum=0.5) == (low, high)
    assert found("moving-average", samples[::-1], momentum=0.5) != (low, high)


@settings(max_examples=60)
@given(values=values, percentile=st.sampled_from([1.0, 50.0, 90.0, 99.0, 99.99, 100.0]))
def test_percentile_keeps_at_least_its_share(values: Array, percentile: float) -> None:
    low, high = found("percentile", values, percentile=percentile)
    told = float(np.abs(values).max()) * 2.0**-31  # smaller values count as 0
    inside = np.count_nonzero((low - told <= values) & (values <= high + told))
    assert inside >= values.size * percentile / 100 - 1e-9


def test_percentile_of_a_normal_distribution() -> None:
    low, high = found("percentile", normal(400_000), percentile=99)
    # 2.576 standard deviations; a bin is 0.2% wide, the sample adds as much.
    assert (-low, high) == pytest.approx((2.576, 2.576), rel=0.015)


@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_one_outlier_among_many_is_passed_over(name: str) -> None:
    low, high = found(name, normal(400_000), np.array([[1e6]], np.float32))
    assert -6 < low < -2
    assert 2 < high < 12  # entropy compares even bins, which reach further than the bulk


def test_entropy_is_not_misled_by_one_number_that_many_values_have() -> None:
    # HardSwish gives 0 for a third of a normal distribution; a bias moves it off the grid's zero.
    x = normal() * 3
    swish = x * np.clip(x / 6 + 0.5, 0, 1) + np.float32(0.05)
    _, high = found("entropy", swish)
    assert high > 0.5 * swish.max()
    clipped = np.clip(x, 0, 3) + np.float32(0.05)
    assert found("entropy", clipped)[1] == pytest.approx(3.05)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_entropy_clips_long_tails_alike_at_every_scale(scale: float) -> None:
    x = np.random.default_rng(1).standard_t(4, size=(200_000, 1)).astype(np.float32)
    low, high = found("entropy", x * np.float32(scale))
    assert 5 < high / scale < 0.8 * x.max()
    assert -low == pytest.approx(high)


def test_entropy_of_one_sided_values() -> None:
    x = np.maximum(normal(), 0)
    low, high = found("entropy", x)
    assert low == 0
    assert 2.5 < high <= x.max()


@settings(max_examples=40)
@given(values=values)
def test_least_squares_is_no_worse_than_min_max(values: Array) -> None:
    # The histogram knows values to 0.1% of themselves; a step is 0.4% of the largest.
    chosen, full = (error(values, found(n, values)) for n in ("mse", "min-max"))
    step = (max(values.max(), 0) - min(values.min(), 0)) / 255
    assert chosen <= 1.3 * full + 0.1 * float(step) ** 2 * values.size


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_least_squares_is_near_the_best_of_a_search(levels: int) -> None:
    x = normal()
    best = min(error(x, (-e, e), levels) for e in np.linspace(0.5, 5, 91))
    assert error(x, found("mse", x, levels=levels), levels) < 1.02 * best


def test_least_squares_treats_the_ends_apart() -> None:
    x = normal() * 3
    swish = x / (1 + np.exp(-x))
    low, high = found("mse", swish)
    assert low == pytest.approx(swish.min(), rel=0.1)
    assert high < swish.max()


def test_least_squares_keeps_values_that_the_full_range_holds_exactly() -> None:
    x = (np.arange(256) / 255).astype(np.float32)[None]
    assert found("mse", np.repeat(x, 20, axis=0)) == (0, 1)


# ---------------- names and options


def test_unknown_observers_are_named() -> None:
    assert observer_named("mse") is LeastSquares
    with pytest.raises(UnknownNameError, match="Did you mean 'entropy'"):
        observer_named("entropi")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"percentile": 0}, "percentile is 0"),
        ({"percentile": 100.1}, "percentile is 100.1"),
        ({"momentum": 1}, "momentum is 1"),
        ({"levels": 1}, "levels is 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ObserverOptions(**options)


def test_defaults_without_options() -> None:
    for made in (MinMax(), MovingAverage(), Percentile(), Entropy(), LeastSquares()):
        made.update(normal(100).reshape(1, -1))
        assert made.range()[0] < made.range()[1]
