"""Laws of weight formats: exact products, grids found again, errors that shrink with bits."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.weight_formats import (
    BlockLayout,
    WeightFormat,
    block_layout,
    find_grid,
    on_grid,
    quantize_blocks,
    quantize_weight,
)

Array = npt.NDArray[Any]

FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)
formats = st.builds(
    WeightFormat,
    bits=st.integers(1, 8),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    significant_bits=st.integers(1, 11),
)


def laplacian(*shape: int, seed: int = 0, scale: float = 0.05) -> Array:
    return np.random.default_rng(seed).laplace(0, scale, shape).astype(np.float32)


@st.composite
def weights(draw: st.DrawFn) -> Array:
    """Weights of any size and float type, with channels of zeros and an outlier among them."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    seed, exponent = draw(st.integers(0, 1000)), draw(st.integers(-160, 120))
    values = np.random.default_rng(seed).normal(size=(4, 48)) * 2.0**exponent
    values[draw(st.integers(0, 3))] *= draw(st.sampled_from([0, 1, 64]))
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values, -limit, limit).astype(dtype)


@given(weights(), formats, st.sampled_from([16, 48]), st.sampled_from(["max", "mse"]))
def test_the_grid_is_found_again_and_quantizing_twice_changes_nothing(
    values: Array, kind: WeightFormat, block: int, search: Any
) -> None:
    layout = block_layout(values.shape, 0, block)
    once = quantize_weight(values, layout, kind, search=search)
    assert once.dtype == values.dtype
    assert np.isfinite(once.astype(np.float64)).all()
    assert not np.signbit(once[once == 0].astype(np.float64)).any()
    found = find_grid(once, layout)
    assert found is not None
    assert (found.scale > 0).all()
    assert layout.join(found.values(values.dtype)).tobytes() == once.tobytes()
    assert on_grid(once, layout, kind)
    assert quantize_weight(once, layout, kind, search=search).tobytes() == once.tobytes()


@given(weights(), st.integers(2, 8), st.sampled_from(["symmetric", "asymmetric"]))
def test_without_clipping_errors_are_within_half_a_step(
    values: Array, bits: int, scheme: Any
) -> None:
    wide = values.astype(np.float32)
    rows = wide[:, :32]
    found = quantize_blocks(rows, WeightFormat(bits, scheme), search="max")
    tiny = found.scale <= np.finfo(np.float32).tiny
    error = np.abs(found.codes * found.scale - rows)
    # Zero points are whole numbers, so that one end may lie up to half a step outside.
    slack = 1.0 if scheme == "asymmetric" else 0.5
    huge = np.abs(rows).max(axis=1, keepdims=True) > 1e38
    assert (error <= slack * found.scale * (1 + 1e-6))[~(tiny | huge)[:, 0]].all()


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("block", [16, 384])
def test_more_bits_err_less(scheme: Any, block: int) -> None:
    values = laplacian(32, 384)
    layout = block_layout(values.shape, 0, block)
    found = [
        sqnr_db(values, quantize_weight(values, layout, WeightFormat(bits, scheme)))
        for bits in range(1, 9)
    ]
    assert found == sorted(found)
    assert found[7] > 38


def test_clipping_and_zero_points_and_short_blocks_pay() -> None:
    values = laplacian(32, 384)

    def quality(block: int, scheme: Any, search: Any, significant_bits: int = 11) -> float:
        layout = block_layout(values.shape, 0, block)
        kind = WeightFormat(4, scheme, significant_bits)
        return sqnr_db(values, quantize_weight(values, layout, kind, search=search))

    assert quality(384, "symmetric", "mse") > quality(384, "symmetric", "max") + 1
    assert quality(32, "symmetric", "mse") > quality(384, "symmetric", "mse") + 2
    assert quality(16, "asymmetric", "mse") > quality(16, "symmetric", "mse") + 1.5
    loss = quality(16, "symmetric", "mse") - quality(16, "symmetric", "mse", 4)
    assert 0 <= loss < 0.3


def test_binary_weights_are_signs_and_mean_magnitudes() -> None:
    values = laplacian(8, 64)
    layout = block_layout(values.shape, 0)
    found = quantize_weight(values, layout, WeightFormat(1))
    assert np.array_equal(np.sign(found), np.where(values < 0, -1, 1))
    means = np.abs(values).mean(axis=1)
    np.testing.assert_allclose(np.abs(found[:, 0]), means, rtol=2**-11)


def test_two_symmetric_bits_are_ternary() -> None:
    values = laplacian(8, 64)
    found = find_grid(
        quantize_weight(values, block_layout(values.shape, 0), WeightFormat(2)),
        block_layout(values.shape, 0),
    )
    assert found is not None
    assert set(np.unique(found.codes)) == {-1, 0, 1}


def test_importance_moves_the_error_where_it_does_not_count() -> None:
    values = laplacian(16, 64)
    importance = np.where(np.arange(64) < 8, 100.0, 0.01)
    plain = quantize_blocks(values, WeightFormat(3))
    weighted = quantize_blocks(values, WeightFormat(3), importance=importance)

    def error(rows: Array, part: slice) -> float:
        return float(np.square(rows - values)[:, part].sum())

    wanted = slice(0, 8)
    ours = error(weighted.codes * weighted.scale, wanted)
    assert ours < 0.8 * error(plain.codes * plain.scale, wanted)


@pytest.mark.parametrize(
    ("shape", "axis", "block", "expected"),
    [
        ((64, 32, 3, 3), 0, 32, 32),
        ((64, 24), 0, 32, 24),
        ((64, 40), 0, 32, 8),
        ((64, 3, 3, 3), 0, 32, 27),
        ((384, 512), 1, 16, 16),
        ((384, 512), 1, None, 384),
        ((30,), None, 64, 30),
        ((10, 48), 0, 24, 24),
    ],
)
def test_layouts(
    shape: tuple[int, ...], axis: int | None, block: int | None, expected: int
) -> None:
    layout = block_layout(shape, axis, block)
    assert layout.block == expected
    values = laplacian(*shape)
    assert np.array_equal(layout.join(layout.cut(values)), values)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0.0, -0.0, 1, 2, 3, 4, 5, 6]], np.float32),
        np.array([[np.nan, 1, 2, 3, 4, 5, 6, 7]], np.float32),
        np.array([[np.inf, 1, 2, 3, 4, 5, 6, 7]], np.float32),
        np.array([[1e-30, 1, 2, 3, 4, 5, 6, 1e30]], np.float32),
        laplacian(1, 8),
        np.random.default_rng(0).normal(size=(1, 8)),
    ],
)
def test_values_that_are_on_no_grid(values: Array) -> None:
    assert find_grid(values, BlockLayout(values.shape, 0, 8)) is None


def test_rare_scales_join_frequent_ones() -> None:
    rows = np.tile(np.arange(-8, 8), (40, 1)) * 0.5
    rows[7] = np.where(np.arange(16) == 3, 2.5, 0)  # alone, its scale would be 2.5
    rows[9] = 0
    found = find_grid(rows.astype(np.float32), BlockLayout((40, 16), 0, 16))
    assert found is not None
    assert np.unique(found.scale).tolist() == [0.5]
    assert found.codes[7, 3] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is 0; expected 1 to 8"),
        ({"bits": 4, "significant_bits": 12}, "significant_bits is 12; expected 1 to 11"),
    ],
)
def test_wrong_formats(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightFormat(**options)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights\[0, 1\] is nan"):
        quantize_blocks(np.array([[1.0, np.nan]]), WeightFormat(4))
