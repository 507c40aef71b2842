"""Laws of rounding with a Hessian."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.affine import fake_quantize, weight_grid
from onnxslim_passes.numerics.rounding import (
    Levels,
    block_columns,
    full_grids,
    is_on_grid,
    nearest,
    output_error,
    round_rows,
)
from onnxslim_passes.numerics.weight_formats import block_layout

Array = npt.NDArray[Any]


def levels(
    columns: int,
    bits: int = 4,
    *,
    symmetric: bool = True,
    block: int | None = None,
    tied: bool = False,
) -> Levels:
    return Levels(bits=bits, symmetric=symmetric, block_of=block_columns(columns, block), tied=tied)


def problem(
    seed: int, groups: int, count: int, columns: int, *, zeros: float = 0.0
) -> tuple[Array, Array]:
    """Weights and the Hessian of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    rows = rng.laplace(size=(groups, count, columns)).astype(np.float32)
    rows[rng.random(rows.shape) < zeros] = 0
    inputs = rng.normal(size=(groups, columns, max(1, columns // 2)))
    inputs += rng.normal(size=(groups, columns, 1)) * rng.normal(size=(groups, 1, inputs.shape[2]))
    inputs *= np.exp(rng.normal(size=(groups, columns, 1)))
    return rows, inputs @ np.swapaxes(inputs, 1, 2)


PROBLEMS = st.builds(
    problem,
    st.integers(0, 1000),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.5]),
)
OPTIONS = st.fixed_dictionaries(
    {
        "search_range": st.booleans(),
        "act_order": st.booleans(),
        "sweeps": st.integers(0, 2),
        "damping": st.sampled_from([1e-6, 0.01, 1.0]),
    }
)
LEVELS = st.tuples(st.integers(2, 8), st.booleans(), st.sampled_from([None, 8, 32]), st.booleans())


@given(PROBLEMS, OPTIONS, LEVELS)
def test_never_worse_than_nearest_and_found_again(
    given_problem: tuple[Array, Array], options: dict[str, Any], kind: tuple[Any, ...]
) -> None:
    rows, hessian = given_problem
    bits, symmetric, block, tied = kind
    made = levels(rows.shape[2], bits, symmetric=symmetric, block=block, tied=tied)
    result = round_rows(rows, hessian, made, **options)
    if tied:
        assert result.error.sum() <= result.nearest_error.sum()
    else:
        assert (result.error <= result.nearest_error).all()
    # The errors are those of the values.
    true_error = output_error(rows.astype(np.float64) - result.values, hessian)
    np.testing.assert_allclose(result.error, true_error, rtol=1e-9, atol=1e-9)
    # Exact in float32, and whoever looks for the grid of the full range finds the same points.
    values = result.values.astype(np.float32)
    assert np.array_equal(values, result.values)
    assert np.array_equal(nearest(values, full_grids(values, made), made), values)
    assert is_on_grid(values, made)
    assert (values[rows == 0] == 0).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [
        (8, True, np.int8),
        (8, False, np.uint8),
        (4, True, ml_dtypes.int4),
        (4, False, ml_dtypes.uint4),
        (2, True, ml_dtypes.int2),
        (2, False, ml_dtypes.uint2),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_grid_of_quantization_is_found_bit_for_bit(
    bits: int, symmetric: bool, dtype: Any, tied: bool
) -> None:
    for seed in range(20):
        rows, hessian = problem(seed, 1, 12, 40)
        made = levels(40, bits, symmetric=symmetric, tied=tied)
        values = round_rows(rows, hessian, made).values[0].astype(np.float32)
        grid = weight_grid(values, dtype, None if tied else 0, symmetric=symmetric)
        assert np.array_equal(fake_quantize(values, grid), values)


@given(PROBLEMS, LEVELS, st.booleans())
def test_uncorrelated_inputs_leave_nearest(
    given_problem: tuple[Array, Array], kind: tuple[Any, ...], search_range: bool
) -> None:
    rows, hessian = given_problem
    bits, symmetric, block, tied = kind
    made = levels(rows.shape[2], bits, symmetric=symmetric, block=block, tied=tied)
    identity = np.broadcast_to(np.eye(rows.shape[2]), hessian.shape)
    result = round_rows(rows, identity, made, search_range=search_range)
    if search_range:
        assert result.error.sum() <= result.nearest_error.sum() + 1e-9
    else:
        assert np.array_equal(result.values, nearest(rows, full_grids(rows, made), made))


def test_correlated_inputs_gain_decibels() -> None:
    rows, hessian = problem(3, 1, 48, 64)
    made = levels(64)
    gains = []
    for options in ({"sweeps": 0, "search_range": False, "act_order": False}, {}):
        result = round_rows(rows, hessian, made, **options)  # type: ignore[arg-type]  # mixed dict
        gains.append(10 * np.log10(result.nearest_error.sum() / result.error.sum()))
    assert gains[0] > 1
    assert gains[1] > gains[0] + 1


def test_triangular_rounding_is_gptq() -> None:
    """The published algorithm, with its inverse, column by column, gives the same points."""
    rows, hessian = problem(5, 1, 20, 70)
    made = levels(70)
    grids = full_grids(rows, made)
    result = round_rows(
        rows, hessian, made, damping=0.1, sweeps=0, act_order=False, search_range=False
    )
    damped = hessian[0] + 0.1 * np.trace(hessian[0]) / 70 * np.eye(70)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, points = rows[0].astype(np.float64), np.zeros((20, 70))
    ends = np.abs(rows[0]) == np.abs(rows[0]).max(axis=1, keepdims=True)
    for k in range(70):
        scale = grids.scale[0, :, 0]
        point = np.clip(np.rint(work[:, k] / scale), -7, 7) * scale
        fixed = np.clip(np.rint(rows[0, :, k] / scale), -7, 7) * scale
        points[:, k] = np.where(ends[:, k], fixed, point)
        error = (work[:, k] - points[:, k]) / inverse[k, k]
        work[:, k:] -= np.outer(error, inverse[k, k:])
    better = result.error[0] < result.nearest_error[0]
    assert better.sum() >= 15
    assert np.array_equal(result.values[0][better], points[better])


def test_every_sweep_is_an_improvement() -> None:
    rows, hessian = problem(7, 2, 30, 50)
    errors = [
        round_rows(rows, hessian, levels(50, 3), damping=0, sweeps=sweeps).error.sum()
        for sweeps in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hessian = problem(9, 2, 31, 20)
    whole = round_rows(rows, hessian, levels(20)).values
    monkeypatch.setattr("onnxslim_passes.numerics.error_feedback._ELEMENTS", 200)
    assert np.array_equal(round_rows(rows, hessian, levels(20)).values, whole)


@pytest.mark.parametrize("kind", ["unseen layer", "dead columns", "zero weights", "zero rows"])
def test_hostile_problems(kind: str) -> None:
    rows, hessian = problem(11, 2, 4, 24)
    if kind == "unseen layer":
        hessian[:] = 0
    elif kind == "dead columns":
        hessian[:, 3:9] = 0
        hessian[:, :, 3:9] = 0
    elif kind == "zero weights":
        rows[:] = 0
    else:
        rows[:, 1:3] = 0
    made = levels(24, block=8)
    result = round_rows(rows, hessian, made)
    assert np.isfinite(result.values).all()
    assert (result.error <= result.nearest_error).all()
    assert (result.values[rows == 0] == 0).all()
    if kind == "unseen layer":
        assert np.array_equal(result.values, nearest(rows, full_grids(rows, made), made))
    # A column whose inputs are dead costs nothing on the samples, yet stays near its value.
    assert np.abs(result.values - rows).max() < 3


def test_float16_keeps_its_points() -> None:
    rows, hessian = problem(13, 1, 10, 40)
    half = rows.astype(np.float16)
    made = levels(40, 8)
    values = round_rows(half, hessian, made).values.astype(np.float16)
    assert is_on_grid(values, made)
    assert not is_on_grid(half, made)
    assert max(np.unique(row).size for row in values[0]) <= 255


def test_blocks_are_consecutive_columns() -> None:
    assert block_columns(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert block_columns(3, None).tolist() == [0] * 3


@given(PROBLEMS, st.integers(2, 8), st.booleans(), st.booleans())
def test_short_scales(
    problem: tuple[Array, Array], bits: int, symmetric: bool, search_range: bool
) -> None:
    rows, hessian = problem
    block = block_layout((1, rows.shape[2]), 0, 16).block
    made = Levels(
        bits=bits,
        symmetric=symmetric,
        block_of=block_columns(rows.shape[2], block),
        short_scales=True,
    )
    found = round_rows(rows, hessian, made, search_range=search_range)
    values = found.values.astype(np.float32)
    assert np.array_equal(values, found.values)
    assert is_on_grid(values, made)
    assert (found.error <= found.nearest_error).all()
    assert not values[rows == 0].any()
