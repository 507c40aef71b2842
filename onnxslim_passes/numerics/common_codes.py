"""Grids whose blocks use the same few codes, and the int8 grid that a weight is on already.

`find_grid` takes the greatest common divisor of a block for its scale, or a part of it that other
blocks have. So a block may get other codes than its neighbours, and a table that all blocks share
would not hold them. Here the codes of such blocks are reduced and multiplied until they are common
ones, where the scale can be divided exactly.
"""

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.affine import AffineGrid, weight_grid
from onnxslim_passes.numerics.arrays import FloatArray, normalized_axis
from onnxslim_passes.numerics.weight_formats import (
    MAX_CODE,
    BlockCodes,
    block_layout,
    find_grid,
)

# A code that fewer blocks than this have is taken for a divided one.
_COMMON_PART = 0.02
_LARGEST_INT8 = 127


def with_common_codes(grid: BlockCodes) -> BlockCodes:
    """The same values with as few distinct codes as multiplying whole blocks gives.

    Args:
        grid: blocks with codes of magnitude 255 at most.

    Returns:
        `grid` itself where nothing is gained.
    """
    codes, scale = grid.codes, grid.scale
    used = _used(codes)
    counts = used.sum(axis=0)
    common = counts >= max(2.0, _COMMON_PART * codes.shape[0])
    common[MAX_CODE] = True  # 0 times anything
    strange = (used & ~common).any(axis=1)
    if not strange.any() or strange.all():
        return grid
    codes, scale = codes.copy(), scale.copy()
    for block in np.flatnonzero(strange):
        divisor = max(1, int(np.gcd.reduce(codes[block])))
        reduced, whole = codes[block] // np.int16(divisor), float(scale[block, 0]) * divisor
        factor = _factor(np.unique(reduced).astype(np.int64), whole, common)
        if factor:
            codes[block], scale[block] = reduced * np.int16(factor), whole / factor
    if np.unique(codes).size >= np.unique(grid.codes).size:
        return grid
    return BlockCodes(codes, scale, np.minimum(codes.min(axis=1, keepdims=True), np.int16(0)))


def _used(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
    """Which codes each block has: (blocks, 2 * 255 + 1)."""
    used = np.zeros((codes.shape[0], 2 * MAX_CODE + 1), np.bool_)
    np.put_along_axis(used, codes.astype(np.int64) + MAX_CODE, values=True, axis=1)
    return used


def _factor(block: npt.NDArray[np.int64], scale: float, common: npt.NDArray[np.bool_]) -> int:
    """What makes all codes of a block common ones, or 0."""
    largest = max(1, int(np.abs(block).max()))
    for factor in range(1, MAX_CODE // largest + 1):
        if scale / factor * factor == scale and common[block * factor + MAX_CODE].all():
            return factor
    return 0


def kept_grid(weights: FloatArray, dtype: npt.DTypeLike, axis: int | None = None) -> AffineGrid:
    """The symmetric grid that a weight is on already; else that of its largest magnitude.

    What passes before have put on a grid, such as tables of int8 codes, is then quantized without
    an error and to no more distinct codes than it has.

    Args:
        weights: float, finite.
        dtype: of the codes; only int8 grids are kept.
        axis: the channel axis, or None for one scale.

    Raises:
        ValueError: NaN or infinity in `weights`, with its position, or a wrong `axis`.
    """
    found = own_grid(weights, axis) if np.dtype(dtype) == np.int8 else None
    return weight_grid(weights, dtype, axis) if found is None else found


def own_grid(weights: FloatArray, axis: int | None) -> AffineGrid | None:
    """The symmetric int8 grid that a weight is on already, or None.

    Args:
        weights: any.
        axis: the channel axis, or None for one scale.

    Returns:
        int8 codes, float32 scales. The largest code in use is more than half of 127, so that what
        is derived from the scales, such as the steps of a bias, stays fine.
    """
    if not weights.size:
        return None
    if axis is not None:
        axis = normalized_axis(axis, weights.ndim)
    found = find_grid(weights, block_layout(weights.shape, axis))
    if found is None:
        return None
    found = with_common_codes(found)
    largest = int(np.abs(found.codes).max())
    if not 0 < largest <= _LARGEST_INT8:
        return None
    scale = found.scale[:, 0] / (_LARGEST_INT8 // largest)
    info = np.finfo(np.float32)
    if scale.min() <= info.tiny or scale.max() > info.max / _LARGEST_INT8:
        return None
    return AffineGrid(
        scale=np.asarray(scale[0] if axis is None else scale, np.float32),
        zero_point=np.zeros(() if axis is None else scale.shape, np.int8),
        dtype=np.dtype(np.int8),
        axis=axis,
        qmin=-_LARGEST_INT8,
        qmax=_LARGEST_INT8,
    )
