import ml_dtypes
import numpy as np
import pytest

from onnxslim_passes.numerics import arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_position(dtype, bad):
    values = np.zeros((3, 70000), dtype)
    values[2, 69999] = bad
    with pytest.raises(ValueError, match=r"w\[2, 69999\] is -?(nan|inf)"):
        arrays.check_finite(values, "w")


def test_blocks_cover_the_array_once():
    values = np.arange(10)
    assert [block.tolist() for block in arrays.blocks(values, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert list(arrays.blocks(np.empty((0, 3)))) == []


def test_rows_are_channels():
    values = np.arange(24).reshape(2, 3, 4)
    assert arrays.by_channel(values, -2)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert arrays.by_channel(np.empty((0, 3)), 0).shape == (0, 0)
    with pytest.raises(ValueError, match="axis 3 does not exist; expected an axis of an array of"):
        arrays.by_channel(values, 3)
