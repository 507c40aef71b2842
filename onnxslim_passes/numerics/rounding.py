"""Rounding of weights to a grid that disturbs the output of their layer least.

`numerics.error_feedback` rounds; here are the grids that a later quantization finds again. Rows
that end up worse than rounding to nearest are rounded to nearest.

**Grids.** A grid point is ``scale * step``, step an integer. The elements of largest magnitude stay
at the ends of the grid, so that whoever looks for the grid of the smallest to the largest weight
finds it again; float32 scales have short mantissas, so that it is found bit for bit. Grids of
blocks (`Levels.short_scales`) are those of `numerics.weight_formats`, whose scales are short enough
to be found from any points. Zeros stay zeros.

Arrays have the axes (G groups, N rows, K columns): G = 1 but for grouped convolutions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.error_feedback import Mask, Points, Solver, Wide, output_error
from onnxslim_passes.numerics.weight_formats import (
    BLOCK_SCALE_BITS,
    BlockLayout,
    ScaleSearch,
    Scheme,
    WeightFormat,
    on_grid,
    quantize_blocks,
)

_CLIPS = tuple(1 - 0.05 * i for i in range(1, 13))
"""Parts of the full range that are tried, besides all of it."""

_SCALE_BITS = 16
"""Significant bits of a float32 scale: times a step of 8 bits, 24, which is exact in float32."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How many grid points there are and which columns of a row share a grid.

    Attributes:
        bits: 2 to 8.
        symmetric: steps from -(2^(bits-1) - 1) to 2^(bits-1) - 1; else 2^bits steps, 0 among them.
        block_of: shape (K,): the number of the block that a column belongs to, from 0 without gaps.
        tied: all rows share their grids (per tensor).
        short_scales: grids are those of `numerics.weight_formats` for blocks, which scales of few
            bits serve, and which are found without their ends; blocks are consecutive columns of
            equal number.
        least: shape (G, N): scales of symmetric grids are at least these; None: of any size.
    """

    bits: int
    symmetric: bool
    block_of: npt.NDArray[np.intp]
    tied: bool = False
    short_scales: bool = False
    least: Wide | None = None

    @property
    def top(self) -> int:
        """The largest step of a symmetric grid, and the number of steps between an asymmetric's."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True)
class RowGrids:
    """One grid for each row and block; all of shape (G, N, B), float64.

    Attributes:
        scale: the step, > 0, a float32 number.
        low: the smallest step in use, <= 0.
        high: the largest step in use, >= 0.
    """

    scale: Wide
    low: Wide
    high: Wide


@dataclass(frozen=True)
class Rounded:
    """Weights on grids.

    Attributes:
        values: shape (G, N, K), float64, all on the grid.
        error: squared error of each output row on the samples, shape (G, N).
        nearest_error: the same for rounding to nearest on the grid of the full range.
        energy: squared output of each row, shape (G, N).
    """

    values: Wide
    error: Wide
    nearest_error: Wide
    energy: Wide


def block_columns(columns: int, block: int | None) -> npt.NDArray[np.intp]:
    """`Levels.block_of` for blocks of so many columns, the last one shorter; None: one block."""
    return np.arange(columns) // (columns if block is None else block)


def full_grids(rows: FloatArray, levels: Levels, *, clip: float | Wide = 1.0) -> RowGrids:
    """The grids from the smallest to the largest weight, or of the part `clip` of that range.

    `clip` is in (0, 1], of a shape that goes with (G, N, B).
    """
    if levels.short_scales:
        return _short_grids(rows, levels, None)
    low, high = _extremes(rows, levels)
    # The end of the range is an element's value to be, and so a number of the weights' dtype.
    low = np.minimum((low * clip).astype(rows.dtype), 0).astype(np.float64)
    high = np.maximum((high * clip).astype(rows.dtype), 0).astype(np.float64)
    span = np.maximum(-low, high) if levels.symmetric else high - low
    step = span / levels.top
    if levels.symmetric and levels.least is not None:
        least = levels.least.max(keepdims=True) if levels.tied else levels.least
        step = np.maximum(step, least[..., None])
    scale = _usable(step, rows.dtype)
    if levels.symmetric:
        end = np.full(scale.shape, float(levels.top))
        return RowGrids(scale, -end, end)
    lowest = np.rint(low / scale).clip(-levels.top, 0)
    return RowGrids(scale, lowest, lowest + levels.top)


def nearest(rows: FloatArray, grids: RowGrids, levels: Levels) -> Wide:
    """The nearest grid point of each weight, the ends of each block at the ends of its grid."""
    scale, low, high = _of_columns(grids, levels)
    steps = np.clip(np.rint(rows.astype(np.float64) / scale), low, high)
    if not levels.symmetric and not levels.short_scales:
        # Rounded apart, zero point and end can miss the last step by one.
        least, most = _at_ends(rows, levels)
        steps = np.where(least & (steps < 0), low, steps)
        steps = np.where(most & (steps > 0), high, steps)
    return steps * scale


def is_on_grid(rows: FloatArray, levels: Levels) -> bool:
    """Whether the weights lie on their own full grids already, as near as their dtype allows."""
    if levels.short_scales:
        blocks = rows.reshape(-1, _block(levels))
        return on_grid(blocks, BlockLayout(blocks.shape, 0, blocks.shape[1]), _format(levels))
    points = nearest(rows, full_grids(rows, levels), levels)
    low, high = _extremes(rows, levels)
    peak = np.maximum(-low, high)[:, :, levels.block_of]
    tolerance = 4 * float(np.finfo(rows.dtype).eps) * peak
    return bool((np.abs(points - rows.astype(np.float64)) <= tolerance).all())


def round_rows(
    rows: FloatArray,
    hessian: Wide,
    levels: Levels,
    *,
    search_range: bool = True,
    damping: float = 0.01,
    act_order: bool = True,
    sweeps: int = 1,
) -> Rounded:
    """Rounds weights to grids so that the output changes least.

    Args:
        rows: (G, N, K), finite float16, float32 or float64.
        hessian: (G, K, K), X X^T, symmetric and positive semidefinite.
        levels: the grids to use.
        search_range: also try narrower ranges, which clip large weights, and take that of the least
            error (weighed by H's diagonal) for each grid.
        damping: is added to H's diagonal, as a part of its mean: columns whose inputs were seldom
            or never seen stay near their values.
        act_order: columns with the largest inputs first; else in their order.
        sweeps: rounds of coordinate descent afterwards.

    Returns:
        Values whose `error` is at most `nearest_error`, in each row (in sum, where grids are tied).
    """
    full = full_grids(rows, levels)
    plain = nearest(rows, full, levels)
    importance = np.diagonal(hessian, axis1=1, axis2=2)
    grids = _searched(rows, levels, importance) if search_range else full
    start = nearest(rows, grids, levels)
    solver = Solver(hessian, damping=damping, act_order=act_order, sweeps=sweeps)
    points = Points(*_of_columns(grids, levels), free=~_fixed(rows, levels))
    found = solver.solve(rows, start, points)
    weights = rows.astype(np.float64)
    plain_error = output_error(weights - plain, hessian)
    error = output_error(weights - found, hessian)
    worse = error.sum() >= plain_error.sum() if levels.tied else error >= plain_error
    return Rounded(
        # Adding 0 turns -0.0 into 0.0, the one zero of a grid.
        values=np.where(np.broadcast_to(worse, error.shape)[..., None], plain, found) + 0.0,
        error=np.where(worse, plain_error, error),
        nearest_error=plain_error,
        energy=output_error(weights, hessian),
    )


# ---------------- grids


def _per_block(reduce: np.ufunc, values: npt.NDArray[Any], levels: Levels) -> npt.NDArray[Any]:
    """Reduces the columns of each block: (G, N, K) -> (G, N, B)."""
    block_of = levels.block_of
    order = np.argsort(block_of, kind="stable")
    starts = np.flatnonzero(np.diff(block_of[order], prepend=-1))
    reduced: npt.NDArray[Any] = reduce.reduceat(values[..., order], starts, axis=-1)
    if levels.tied:
        reduced = np.broadcast_to(reduce.reduce(reduced, axis=(0, 1), keepdims=True), reduced.shape)
    return reduced


def _extremes(rows: FloatArray, levels: Levels) -> tuple[Wide, Wide]:
    low = _per_block(np.minimum, rows, levels).astype(np.float64)
    high = _per_block(np.maximum, rows, levels).astype(np.float64)
    return low, high


def _at_ends(rows: FloatArray, levels: Levels) -> tuple[Mask, Mask]:
    """Which elements are the smallest and which the largest of their grid."""
    low, high = _extremes(rows, levels)
    wide = rows.astype(np.float64)
    return wide == low[:, :, levels.block_of], wide == high[:, :, levels.block_of]


def _fixed(rows: FloatArray, levels: Levels) -> Mask:
    """Which elements stay at their nearest grid point: zeros, and what holds the grid's ends."""
    if levels.short_scales:
        return np.asarray(rows == 0)
    least, most = _at_ends(rows, levels)
    if levels.symmetric:
        low, high = _extremes(rows, levels)
        least &= (-low >= high)[:, :, levels.block_of]
        most &= (high >= -low)[:, :, levels.block_of]
    fixed: Mask = least | most | (rows == 0)
    return fixed


def _usable(step: Wide, dtype: np.dtype[Any]) -> Wide:
    """`step` as a positive normal float32, of few digits for float32 weights; 1 where it is 0."""
    tiny = float(np.finfo(np.float32).tiny)
    usable = np.where(step == 0, 1.0, np.maximum(step, tiny))
    if dtype == np.float32:
        mantissa, exponent = np.frexp(usable)
        # Downwards: the ends of the range must not overflow.
        usable = np.ldexp(np.floor(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS)
    return usable.astype(np.float32).astype(np.float64)


def _of_columns(grids: RowGrids, levels: Levels) -> tuple[Wide, Wide, Wide]:
    """Scale, lowest and highest step of each element; of each row, where it has one block."""
    if grids.scale.shape[2] == 1:
        return grids.scale, grids.low, grids.high
    picked = (part[:, :, levels.block_of] for part in (grids.scale, grids.low, grids.high))
    scale, low, high = picked
    return scale, low, high


def _searched(rows: FloatArray, levels: Levels, importance: Wide) -> RowGrids:
    """The grids of the range whose error, weighed column by column, is least."""
    weighing = np.maximum(importance, importance.mean(axis=1, keepdims=True) * 1e-3)[:, None, :]
    if levels.short_scales:
        return _short_grids(rows, levels, weighing)
    weights = rows.astype(np.float64)

    def loss(grids: RowGrids) -> Wide:
        squares = np.square(weights - nearest(rows, grids, levels)) * weighing
        return _per_block(np.add, squares, levels)

    best_clip = np.ones_like(_per_block(np.add, weights, levels))
    least = loss(full_grids(rows, levels))
    for clip in _CLIPS:
        tried = loss(full_grids(rows, levels, clip=clip))
        best_clip = np.where(tried < least, clip, best_clip)
        least = np.minimum(tried, least)
    return full_grids(rows, levels, clip=best_clip)


def _short_grids(rows: FloatArray, levels: Levels, weighing: Wide | None) -> RowGrids:
    """Grids of `weight_formats`: of least weighed error, or without one those that clip nothing."""
    block, kind = _block(levels), _format(levels)
    importance = None
    if weighing is not None:
        # Only ratios within a block count; float32 must hold them.
        unit = weighing / np.maximum(weighing.max(), np.finfo(np.float64).tiny)
        importance = np.broadcast_to(unit, rows.shape).reshape(-1, block)
    search: ScaleSearch = "max" if importance is None else "mse"
    found = quantize_blocks(rows.reshape(-1, block), kind, search=search, importance=importance)
    shape = (*rows.shape[:2], -1)
    low = found.lowest.astype(np.float64).reshape(shape)
    return RowGrids(found.scale.reshape(shape), low, low + kind.span)


def _block(levels: Levels) -> int:
    return int(levels.block_of.size // (levels.block_of[-1] + 1))


def _format(levels: Levels) -> WeightFormat:
    scheme: Scheme = "symmetric" if levels.symmetric else "asymmetric"
    return WeightFormat(levels.bits, scheme, BLOCK_SCALE_BITS)
