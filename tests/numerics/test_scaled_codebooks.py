import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.numerics.affine import dequantize, quantize
from onnxslim_passes.numerics.clustering import kmeans_1d
from onnxslim_passes.numerics.common_codes import own_grid, with_common_codes
from onnxslim_passes.numerics.distortion import sqnr_db, squared_error
from onnxslim_passes.numerics.scaled_codebooks import scaled_codebook
from onnxslim_passes.numerics.weight_formats import block_layout, find_grid


def rows(count, length, dtype=np.float32, seed=0):
    """Channels of one shape and sizes that differ."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 1.5, (count, 1)))
    return (rng.laplace(0, 0.05, (count, length)) * sizes).astype(dtype)


@settings(max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4]),
    st.integers(2, 20),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from([0, -100, 100, -140, 115]),
)
def test_a_codebook_is_well_formed(seed, count, groups, group, clusters, dtype, power):
    values = rows(count, groups * group, np.float64, seed)
    values[:, :group] = 0
    if dtype != np.float16:
        values = np.ldexp(values, power)
    values = values.astype(dtype)
    book = scaled_codebook(values, clusters, group=group, seed=seed)
    assert book.clusters <= clusters
    assert (book.scale > 0).all()
    after = book.values(dtype)
    assert after.dtype == dtype
    assert after.shape == values.shape
    assert np.isfinite(after).all()
    assert (after[:, :group] == 0).all()
    assert not np.signbit(after[after == 0]).any()
    # Exact products, in whatever width.
    wide = book.table[book.codes].reshape(values.shape) * book.scale
    np.testing.assert_array_equal(wide, after.astype(np.float64))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_table_is_as_good_as_channels_of_one_shape_allow(dtype, group):
    values = rows(64, 512, dtype)
    book = scaled_codebook(values, 8 if group == 1 else 64, group=group)
    one = sqnr_db(values, kmeans_1d(values, 8).values())
    ours = sqnr_db(values, book.values(dtype))
    assert ours > one + 1
    # A table for each channel fits its own outliers, at 16 times the bytes.
    assert ours > sqnr_db(values, kmeans_1d(values, 8, axis=0).values()) - 2


def test_importance_counts():
    values = rows(32, 256)
    importance = np.ones((1, 256), np.float32)
    importance[:, ::4] = 50
    plain, weighted = scaled_codebook(values, 8), scaled_codebook(values, 8, importance=importance)
    errors = [
        np.sum(importance * (values - book.values(np.float32)) ** 2) for book in (plain, weighted)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_zeros_that_no_sample_has_stay_zeros(monkeypatch):
    monkeypatch.setattr("onnxslim_passes.numerics.scaled_codebooks._SAMPLE", 4096)
    values = rows(64, 256)
    values[63, 5] = 0
    assert scaled_codebook(values, 16).values(np.float32)[63, 5] == 0


def test_values_of_zero_only():
    book = scaled_codebook(np.zeros((3, 4), np.float32), 4)
    assert book.values(np.float32).tolist() == np.zeros((3, 4)).tolist()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="group 4 does not divide the 6 elements"):
        scaled_codebook(rows(2, 6), 4, group=4)
    with pytest.raises(ValueError, match=r"weights\[0, 0\] is inf"):
        scaled_codebook(np.full((1, 2), np.inf), 4)


# --- found again in the values ------------------------------------------------------------------


@pytest.mark.parametrize("significant_bits", [5, 11])
@pytest.mark.parametrize("group", [1, 2])
def test_table_and_scales_are_found_in_the_values(group, significant_bits):
    values = rows(200, 64)
    book = scaled_codebook(values, 16, group=group, significant_bits=significant_bits)
    found = with_common_codes(find_grid(book.values(np.float32), block_layout(values.shape, 0)))
    np.testing.assert_array_equal(found.values(np.float32), book.values(np.float32))
    assert set(np.unique(found.codes)) <= set(book.table.reshape(-1).tolist())


def test_blocks_with_a_common_divisor_get_the_codes_of_the_others():
    table = np.array([-127, -50, -20, 0, 20, 50, 127])
    codes = np.random.default_rng(0).choice(table, (100, 32))
    codes[7] = np.where(np.arange(32) % 2, 20, -20)
    scale = np.ldexp(np.arange(1024, 1124) * 2.0 + 1, -20)[:, None]
    values = (codes * scale).astype(np.float32)
    grid = find_grid(values, block_layout(values.shape, 0))
    assert np.unique(grid.codes).size > 7
    common = with_common_codes(grid)
    np.testing.assert_array_equal(np.unique(common.codes), table)
    np.testing.assert_array_equal(common.values(np.float32), values)


def test_a_weight_on_a_grid_keeps_it_when_it_is_quantized():
    values = rows(40, 64)
    after = scaled_codebook(values, 16).values(np.float32)
    grid = own_grid(after, 0)
    codes = quantize(after, grid)
    assert np.unique(codes).size <= 16
    assert squared_error(dequantize(codes, grid), after) == 0


def test_ordinary_weights_and_larger_codes_are_on_no_grid():
    values = rows(40, 64)
    assert own_grid(values, 0) is None
    after = scaled_codebook(values, 16).values(np.float32)
    assert own_grid(after * 2 + np.float32(1), 0) is None
    assert own_grid(np.zeros((3, 4), np.float32), 0) is None
    assert own_grid(np.zeros((0, 4), np.float32), 0) is None


def test_few_levels_get_fine_scales():
    ternary = np.random.default_rng(0).integers(-1, 2, (8, 64)) * np.float32(0.5)
    grid = own_grid(ternary, 0)
    assert grid.scale == pytest.approx(0.5 / 127)
    np.testing.assert_allclose(dequantize(quantize(ternary, grid), grid), ternary, rtol=1e-6)
