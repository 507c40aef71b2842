"""New tensors take the fewest bytes, and the size that is promised."""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from onnxslim_passes.model.payload import MOST_VARINTS, new_tensor, values_bytes

DTYPES = st.sampled_from([np.int32, np.int64, np.uint8, np.float32]).map(np.dtype)


@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=9)))
def test_values_come_back_in_no_more_bytes_than_raw_data(values: npt.NDArray[Any]) -> None:
    message = new_tensor(values, "name")
    again = numpy_helper.to_array(message)
    assert again.dtype == values.dtype
    assert again.shape == values.shape
    assert again.tobytes() == values.tobytes()
    raw = numpy_helper.from_array(values, "name").ByteSize()
    assert message.ByteSize() <= raw
    assert raw - message.ByteSize() >= values.nbytes - values_bytes(values)


def test_long_vectors_stay_raw() -> None:
    assert new_tensor(np.zeros(MOST_VARINTS + 1, np.int64)).HasField("raw_data")
    assert new_tensor(np.zeros(MOST_VARINTS, np.int64)).ByteSize() < MOST_VARINTS + 10


def test_an_empty_name_takes_no_bytes() -> None:
    assert not new_tensor(np.zeros(3, np.float32)).HasField("name")
