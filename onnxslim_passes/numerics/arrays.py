"""Walks over large arrays in blocks, so that temporaries stay small whatever the array's size."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 17  # elements; a float64 block of this size (1 MiB) stays in the second-level cache

FloatArray = npt.NDArray[Any]
"""An array of float16, bfloat16 (ml_dtypes), float32 or float64."""


def blocks(values: FloatArray, size: int = BLOCK) -> Iterator[npt.NDArray[Any]]:
    """Consecutive flat slices of `values` in C order, `size` elements each, the last one shorter.

    The slices are views where `values` is contiguous.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


def working_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to compute in: float64 for float64, float32 for all narrower floats (exact)."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def check_finite(values: FloatArray, what: str = "values") -> None:
    """Raise `ValueError` with the position of the first NaN or infinity in `values`, if any."""
    start = 0
    for block in blocks(values):
        finite = np.isfinite(block)
        if not finite.all():
            bad = int(np.argmin(finite))
            position = tuple(int(i) for i in np.unravel_index(start + bad, values.shape))
            raise ValueError(f"{what}{list(position)} is {block[bad]}; expected finite numbers")
        start += block.size


def by_channel(values: FloatArray, axis: int) -> npt.NDArray[Any]:
    """`values` as a matrix (C, size / C) with one row a channel of `axis`; a view if it can be.

    Raises:
        ValueError: `axis` is not an axis of `values`.
    """
    axis = normalized_axis(axis, values.ndim)
    channels = values.shape[axis]
    moved = np.moveaxis(values, axis, 0)
    return moved.reshape(channels, values.size // channels if channels else 0)


def normalized_axis(axis: int, rank: int) -> int:
    """`axis` counted from 0. Raises `ValueError` outside [-rank, rank)."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} does not exist; expected an axis of an array of rank {rank}")
    return axis % rank
