import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.numerics import bits


@given(st.data(), st.integers(1, 8))
def test_unpacking_gives_the_codes_back(data, width):
    codes = data.draw(
        hnp.arrays(np.uint8, st.integers(0, 300), elements=st.integers(0, (1 << width) - 1))
    )
    packed = bits.pack_bits(codes, width)
    assert packed.dtype == np.uint8
    assert packed.size == bits.packed_bytes(codes.size, width)
    np.testing.assert_array_equal(bits.unpack_bits(packed, width, codes.size), codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_streams_longer_than_a_chunk(width):
    codes = np.random.default_rng(width).integers(0, 1 << width, 300_007)
    packed = bits.pack_bits(codes, width)
    np.testing.assert_array_equal(bits.unpack_bits(packed, width, codes.size), codes)


def test_the_first_code_is_in_the_low_bits():
    assert bits.pack_bits(np.array([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert bits.pack_bits(np.array([5, 2, 7]), 3).tolist() == [0b11_010_101, 0b1]


@pytest.mark.parametrize(("width", "dtype"), [(4, ml_dtypes.uint4), (2, ml_dtypes.uint2)])
def test_the_order_is_that_of_onnx_tensors(width, dtype):
    codes = np.random.default_rng(0).integers(0, 1 << width, 37)
    tensor = numpy_helper.from_array(codes.astype(dtype))
    assert tensor.raw_data == bits.pack_bits(codes, width).tobytes()


@given(st.integers(1, 7), st.integers(0, 50))
def test_a_code_too_large_is_named(width, position):
    codes = np.zeros(51, np.int64)
    codes[position] = 1 << width
    with pytest.raises(ValueError, match=f"position {position} does not fit into {width} bits"):
        bits.pack_bits(codes, width)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="code -1 at position 0"):
        bits.pack_bits(np.array([-1]), 8)
    with pytest.raises(ValueError, match="bits is 9; expected 1 to 8"):
        bits.pack_bits(np.array([0]), 9)
    with pytest.raises(ValueError, match="bits is 0; expected 1 to 8"):
        bits.unpack_bits(np.empty(0, np.uint8), 0, 1)
    with pytest.raises(ValueError, match="9 codes of 4 bits need 5 bytes; got 4"):
        bits.unpack_bits(np.empty(4, np.uint8), 4, 9)
