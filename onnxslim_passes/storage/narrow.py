"""Narrow: every element also exists in a shorter type. ``Cast(values)``.

Weights that `convert-float` rounded to float16, bfloat16 or an 8-bit float, weights that are small
integers, and both parts of a `grid`.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import helper

from onnxslim_passes.storage.base import Encoding, Payload, Plan, Site, step
from onnxslim_passes.storage.contents import Contents

# The shorter types with the first opset whose Cast takes them. bfloat16 came with opset 13, the
# 8-bit floats with 19.
_TYPES: tuple[tuple[npt.DTypeLike, int], ...] = (
    (np.int8, 6),
    (np.uint8, 6),
    (ml_dtypes.float8_e4m3fn, 19),
    (ml_dtypes.float8_e5m2, 19),
    (np.float16, 6),
    (ml_dtypes.bfloat16, 13),
)
_WIDE = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
_SAMPLE = 512


class Narrow(Encoding):
    """A shorter type and a Cast; the shortest that holds every element bit for bit."""

    name: ClassVar[str] = "narrow"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """At most one."""
        if contents.dtype not in _WIDE or not contents.folds:
            return
        for dtype in _shorter(contents.dtype, site.opset):
            values = _converted(contents, dtype)
            if values is None:
                continue
            nbytes = contents.size * dtype.itemsize
            payload = Payload(contents.shape, dtype, nbytes, partial(_same, values))
            root = step("Cast", payload, to=int(helper.np_dtype_to_tensor_dtype(contents.dtype)))
            yield Plan(self.name, root, {"type": str(dtype)})
            return


def _shorter(wide: np.dtype[Any], opset: int) -> Iterator[np.dtype[Any]]:
    for kind, since in _TYPES:
        dtype = np.dtype(kind)
        if opset >= since and dtype.itemsize < wide.itemsize:
            yield dtype


def _converted(contents: Contents, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """The elements in another type, or None if one of them changes by it."""
    flat = contents.values.reshape(-1)
    if not _same_bits(flat[:_SAMPLE], dtype):
        return None
    return contents.values.astype(dtype) if _same_bits(flat, dtype) else None


def _same_bits(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> bool:
    bits = np.dtype(f"u{values.dtype.itemsize}")
    # Out of range is an answer here, not a fault.
    with np.errstate(over="ignore", invalid="ignore"):
        back = values.astype(dtype).astype(values.dtype)
    return np.array_equal(back.view(bits), np.ascontiguousarray(values).view(bits))


def _same(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values
