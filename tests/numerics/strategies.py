"""Arrays as they come out of real and hostile files."""

from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

DTYPES = tuple(np.dtype(kind) for kind in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16))


def _magnitudes(scale: float) -> st.SearchStrategy[float]:
    return st.floats(-scale, scale, allow_nan=False, width=32)


# Ordinary weights, repeated values, zeros of both signs, denormals, and huge outliers.
ELEMENTS = st.one_of(
    _magnitudes(1.0),
    st.sampled_from([0.0, -0.0, 0.25, -0.25, 1e-45, -1e-40, 1e-7, 1.0]),
    _magnitudes(30000.0),
)


@st.composite
def weights(
    draw: st.DrawFn, *, min_size: int = 0, max_size: int = 60, rank: int | None = None
) -> npt.NDArray[Any]:
    """A finite float array of any of the four dtypes."""
    low, high = (1, 3) if rank is None else (rank, rank)
    shape = draw(
        hnp.array_shapes(min_dims=low, max_dims=high, min_side=min_size and 1, max_side=max_size)
    )
    dtype = draw(st.sampled_from(DTYPES))
    values = draw(hnp.arrays(np.float32, shape, elements=ELEMENTS, fill=st.just(np.float32(0.5))))
    return values.astype(dtype)
