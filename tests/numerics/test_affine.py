import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.numerics import affine
from tests.numerics.strategies import ELEMENTS, weights

CODES = [np.int8, np.uint8, np.int16, np.uint16, ml_dtypes.int4, ml_dtypes.uint4]
codes = st.sampled_from([np.dtype(kind) for kind in CODES])
single = st.floats(allow_nan=False, allow_infinity=False, width=32)


def error_bound(grid, values):
    """Half a step, and the float32 roundings of the quotient and of the product."""
    lo, hi = grid.range()
    scale = grid.scale.astype(np.float64)
    rounding = np.maximum(np.abs(lo), np.abs(hi)).max() * 2.0**-21
    storage = np.abs(values.astype(np.float64)).max() * 2.0**-21 if values.size else 0.0
    return scale.max() * 0.5 + rounding + storage


@given(weights(rank=1, min_size=1), codes, st.booleans())
def test_the_round_trip_errs_by_half_a_step(values, dtype, symmetric):
    values = values.astype(np.float32)
    grid = affine.weight_grid(values, dtype, symmetric=symmetric)
    restored = affine.dequantize(affine.quantize(values, grid), grid)
    error = np.abs(restored.astype(np.float64) - values)
    assert error.max() <= error_bound(grid, values)


@given(single, single, codes, st.booleans())
def test_any_range_gives_a_usable_grid(first, second, dtype, symmetric):
    lo, hi = min(first, second), max(first, second)
    grid = affine.choose_grid(lo, hi, dtype, symmetric=symmetric)
    assert grid.scale.dtype == np.float32
    assert np.isfinite(grid.scale)
    assert grid.scale >= np.finfo(np.float32).tiny
    assert grid.qmin <= int(grid.zero_point) <= grid.qmax
    zero = affine.dequantize(affine.quantize(np.zeros(1, np.float32), grid), grid)
    assert zero.tobytes() == np.zeros(1, np.float32).tobytes()
    bottom, top = grid.range()
    slack = 0.5 * float(grid.scale) + max(abs(lo), abs(hi)) * 1e-6
    assert bottom <= min(lo, 0) + slack
    assert top >= max(hi, 0) - slack


@given(
    weights(rank=2, min_size=1, max_size=8), st.integers(0, 1), st.randoms(use_true_random=False)
)
def test_permuted_channels_give_permuted_codes(values, axis, random):
    order = list(range(values.shape[axis]))
    random.shuffle(order)
    grid = affine.weight_grid(values, axis=axis)
    moved = np.take(values, order, axis)
    moved_grid = affine.weight_grid(moved, axis=axis)
    np.testing.assert_array_equal(moved_grid.scale, grid.scale[order])
    np.testing.assert_array_equal(
        affine.quantize(moved, moved_grid), np.take(affine.quantize(values, grid), order, axis)
    )


@given(weights(min_size=1, max_size=10))
def test_quantized_values_stay_put(values):
    grid = affine.weight_grid(values)
    codes_ = affine.quantize(values.astype(np.float32), grid)
    again = affine.quantize(affine.dequantize(codes_, grid), grid)
    np.testing.assert_array_equal(codes_, again)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(-1.5, 3.0), (0.5, 6.0), (-2.0, -1.0), (0, 1e-42)])
def test_codes_equal_the_runtime_s(dtype, symmetric, lo, hi):
    grid = affine.choose_grid(lo, hi, dtype, symmetric=symmetric)
    values = np.random.default_rng(0).uniform(2 * lo - 1, 2 * hi + 1, 2000).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("Cast", ["q"], ["y"], to=TensorProto.INT32),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None])],
        [numpy_helper.from_array(grid.scale, "s"), numpy_helper.from_array(grid.zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": values})
    ours = affine.quantize(values, grid).astype(np.int32)
    np.testing.assert_array_equal(ours, expected.clip(grid.qmin, grid.qmax))


def test_levels_of_int8():
    assert affine.code_range(np.int8) == (-128, 127)
    assert affine.code_range(np.int8, symmetric=True) == (-127, 127)
    values = np.array([-1.0, 1.0], np.float32)
    assert affine.quantize(values, affine.weight_grid(values)).tolist() == [-127, 127]
    reduced = affine.weight_grid(values, levels=(-64, 64))
    assert affine.quantize(values, reduced).tolist() == [-64, 64]


def test_a_symmetric_grid_of_uint8_has_its_zero_in_the_middle():
    grid = affine.choose_grid(-1.0, 0.5, np.uint8, symmetric=True)
    assert int(grid.zero_point) == 128
    assert float(grid.scale) == pytest.approx(1 / 127)


def test_a_range_is_widened_to_zero():
    grid = affine.choose_grid(2.0, 5.1, np.uint8)
    assert int(grid.zero_point) == 0
    assert float(grid.scale) == pytest.approx(5.1 / 255)


def test_an_all_zero_tensor_has_scale_one():
    grid = affine.weight_grid(np.zeros((2, 3), np.float16), axis=0)
    assert grid.scale.tolist() == [1.0, 1.0]
    assert affine.weight_grid(np.empty((2, 0)), axis=0).scale.tolist() == [1.0, 1.0]
    assert affine.weight_grid(np.empty(0)).scale == 1.0


def test_scales_of_half_floats():
    grid = affine.choose_grid(0, 1e-7, np.uint8, scale_dtype=np.float16)
    assert grid.scale == np.float16(6.104e-05)
    with pytest.raises(ValueError, match="does not fit into float16"):
        affine.choose_grid(-1e38, 1e38, np.uint8, scale_dtype=np.float16)


def test_infinities_saturate_and_nan_is_refused():
    grid = affine.choose_grid(-1.0, 1.0, np.int8)
    assert affine.quantize(np.array([-np.inf, np.inf], np.float32), grid).tolist() == [-128, 127]
    with pytest.raises(ValueError, match="NaN"):
        affine.quantize(np.array([np.nan], np.float32), grid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lo": np.nan, "hi": 1, "dtype": np.int8}, r"lo\[\] is nan"),
        ({"lo": 0, "hi": np.inf, "dtype": np.int8}, r"hi\[\] is inf"),
        ({"lo": [0, 2], "hi": [1, 1], "dtype": np.int8, "axis": 0}, "lo > hi at channel 1"),
        ({"lo": [0, 2], "hi": [1, 3], "dtype": np.int8}, "expected .* per tensor"),
        ({"lo": 0, "hi": 1, "dtype": np.int8, "levels": (-129, 3)}, "levels are"),
        ({"lo": 0, "hi": 1, "dtype": np.int32}, "at most 16 bits"),
        ({"lo": 0, "hi": 1, "dtype": np.float32}, "expected an integer type"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        affine.choose_grid(**arguments)


def test_a_grid_of_other_channels_is_refused():
    grid = affine.weight_grid(np.ones((2, 3), np.float32), axis=0)
    with pytest.raises(ValueError, match="axis 0 has 3 channels, the grid has 2"):
        affine.quantize(np.ones((3, 2), np.float32), grid)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.floats(2.0**-126, 1.0, width=32),
)
def test_biases_never_saturate_with_the_minimum_weight_scale(bias, input_scale, weight_scale):
    bias = np.array(bias, np.float32)
    scale = np.maximum(np.float32(weight_scale), affine.minimum_weight_scale(bias, input_scale))
    codes_ = affine.quantize_bias(bias, input_scale, scale).astype(np.float64)
    assert np.abs(codes_).max() <= affine.BIAS_LIMIT
    step = affine.bias_scale(input_scale, scale).astype(np.float64)
    assert (np.abs(codes_ * step - bias) <= 0.5000001 * step).all()


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(0, 9)), elements=ELEMENTS))
def test_no_pair_saturates_with_the_minimum_pair_scale(rows):
    grid = affine.weight_grid(rows, axis=0).at_least(affine.minimum_pair_scale(rows))
    codes = affine.quantize(rows, grid).astype(np.int64)
    assert np.abs(codes[:, :-1] + codes[:, 1:]).max(initial=0) * 255 < 2**15


def test_the_minimum_pair_scale_keeps_most_of_8_bits():
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    growth = affine.minimum_pair_scale(rows) / (np.abs(rows).max(axis=1) / 127)
    assert np.median(growth) < 1.4  # 7 bits double the scale


def test_a_bias_that_saturates_is_named():
    with pytest.raises(ValueError, match=r"bias\[1\] = 1.0 saturates int32 at scale .*minimum_"):
        affine.quantize_bias(np.array([0.0, 1.0], np.float32), 1e-6, [1e-6, 1e-6])


def test_bias_scales_that_vanish_are_refused():
    with pytest.raises(ValueError, match="not a normal float32"):
        affine.bias_scale(1e-30, 1e-30)
    with pytest.raises(ValueError, match="no float32 weight scale fits"):
        affine.minimum_weight_scale(np.array([1e38], np.float32), 1e-30)
    with pytest.raises(ValueError, match="input_scale is 0"):
        affine.minimum_weight_scale(np.array([1.0], np.float32), 0)
