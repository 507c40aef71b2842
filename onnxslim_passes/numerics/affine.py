"""Affine quantization: real = scale * (code - zero_point).

The scheme of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 2.1, with the arithmetic of ONNX's
QuantizeLinear: ``code = saturate(round_half_even(x / scale) + zero_point)``, computed in float32
for inputs up to 32 bits, so that codes equal the runtime's.

Three verbs: choose a grid for a range (`choose_grid`, `weight_grid`), `quantize`, `dequantize`. A
grid always represents 0 exactly (padding, ReLU), and its scale is a positive normal number whatever
the range. Inside the grid's range the round trip errs by at most half a step.

Integer convolutions add an int32 bias of scale ``input_scale * weight_scale``. A small weight
scale can make the bias saturate; `minimum_weight_scale` says from where on it cannot.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray, by_channel, check_finite, normalized_axis

BIAS_LIMIT = 1 << 30
"""Largest magnitude of an int32 bias: half of int32's range, the rest is for the products."""


@dataclass(frozen=True, kw_only=True)
class AffineGrid:
    """Evenly spaced numbers that codes stand for.

    Attributes:
        scale: the step, > 0 and normal; shape () per tensor, (C,) per channel; float32 unless
            another dtype was asked for.
        zero_point: the code of 0; same shape, dtype `dtype`, within [qmin, qmax].
        dtype: of the codes: int8, uint8, int16, uint16, or ml_dtypes' int4, uint4, int2, uint2.
        axis: the channel axis, counted from 0; None per tensor.
        qmin: the smallest code in use (-127 for a symmetric int8 grid).
        qmax: the largest code in use.
    """

    scale: npt.NDArray[Any]
    zero_point: npt.NDArray[Any]
    dtype: np.dtype[Any]
    axis: int | None
    qmin: int
    qmax: int

    def range(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The smallest and largest number on the grid, float64, shaped like `scale`."""
        scale = self.scale.astype(np.float64)
        zero_point = self.zero_point.astype(np.int64)
        return scale * (self.qmin - zero_point), scale * (self.qmax - zero_point)

    def at_least(self, scale: npt.ArrayLike) -> "AffineGrid":
        """The same grid with scales raised to `scale`, shaped like ours, where they are smaller."""
        return replace(self, scale=np.maximum(self.scale, scale).astype(self.scale.dtype))


def code_range(dtype: npt.DTypeLike, *, symmetric: bool = False) -> tuple[int, int]:
    """The codes in use: all of `dtype`, without the lowest one for a symmetric grid.

    Without it the codes are as many on both sides of the zero point, and products of int8 pairs
    never reach 2**14 (Jacob et al., appendix B).

    Raises:
        ValueError: `dtype` is not an integer type of at most 16 bits.
    """
    dtype = np.dtype(dtype)
    try:
        info = ml_dtypes.iinfo(dtype)
    except ValueError as error:
        raise ValueError(f"dtype is {dtype}; expected an integer type of codes") from error
    low, high = int(info.min), int(info.max)
    if high - low > 0xFFFF:
        raise ValueError(f"dtype is {dtype}; expected an integer type of at most 16 bits")
    return (low + 1 if symmetric else low), high


def choose_grid(
    lo: npt.ArrayLike,
    hi: npt.ArrayLike,
    dtype: npt.DTypeLike,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    levels: tuple[int, int] | None = None,
    scale_dtype: npt.DTypeLike = np.float32,
) -> AffineGrid:
    """The grid whose range is [lo, hi], widened to contain 0.

    Args:
        lo: smallest number of the tensor, or of each channel: shape () or (C,).
        hi: largest number, shaped like `lo`.
        dtype: of the codes.
        symmetric: zero point in the middle (0 for signed codes, 128 for uint8) and the range
            [-m, m], m = max(-lo, hi).
        axis: the channel axis if `lo` has shape (C,); recorded in the grid.
        levels: (qmin, qmax) where fewer codes than the dtype's are wanted, e.g. (-64, 64) for int8
            weights on a CPU whose 16-bit accumulators would saturate.
        scale_dtype: of the scale: float32, float16 or bfloat16.

    Returns:
        The grid. Where lo = hi = 0, scale is 1. Where the range is so small that the scale would
        not be a normal number of its dtype, it is the smallest normal one.

    Raises:
        ValueError: NaN or infinity, lo > hi, shapes or `axis` that do not fit, or a range whose
            step `scale_dtype` cannot hold.
    """
    dtype = np.dtype(dtype)
    qmin, qmax = levels if levels is not None else code_range(dtype, symmetric=symmetric)
    _check_levels(qmin, qmax, dtype)
    low, high = _checked_range(lo, hi, axis)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        peak = np.maximum(-low, high)
        scale = _usable_scale(peak / min(middle - qmin, qmax - middle), peak == 0, scale_dtype)
        zero_point = np.full(scale.shape, middle, np.int64)
    else:
        # Divide before subtracting: hi - lo may exceed the largest float64.
        step = high / (qmax - qmin) - low / (qmax - qmin)
        scale = _usable_scale(step, (low == 0) & (high == 0), scale_dtype)
        zero_point = np.rint(qmin - low / scale.astype(np.float64)).clip(qmin, qmax)
    return AffineGrid(
        scale=scale,
        zero_point=np.asarray(zero_point, np.int64).astype(dtype),
        dtype=dtype,
        axis=axis,
        qmin=qmin,
        qmax=qmax,
    )


def weight_grid(
    weights: FloatArray,
    dtype: npt.DTypeLike = np.int8,
    axis: int | None = None,
    *,
    symmetric: bool = True,
    levels: tuple[int, int] | None = None,
    scale_dtype: npt.DTypeLike = np.float32,
) -> AffineGrid:
    """The grid of the smallest to the largest weight, per tensor or along `axis` per channel.

    Arguments after `axis` as in `choose_grid`. Channels without elements get scale 1.

    Raises:
        ValueError: NaN or infinity in `weights`, with its position, or a wrong `axis`.
    """
    check_finite(weights, "weights")
    if axis is None:
        rows = weights.reshape(1, -1)
    else:
        axis = normalized_axis(axis, weights.ndim)
        rows = by_channel(weights, axis)
    if rows.shape[1]:
        lo, hi = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
    else:
        lo = hi = np.zeros(rows.shape[0])
    if axis is None:
        lo, hi = lo[0], hi[0]
    return choose_grid(
        lo, hi, dtype, symmetric=symmetric, axis=axis, levels=levels, scale_dtype=scale_dtype
    )


def quantize(values: FloatArray, grid: AffineGrid) -> npt.NDArray[Any]:
    """Codes of `values`, dtype `grid.dtype`: nearest on the grid, ties to even, saturating.

    Infinities saturate.

    Raises:
        ValueError: NaN in `values`, or the channel axis does not fit.
    """
    if np.isnan(values).any():
        raise ValueError("values hold NaN, which has no code")
    scale, zero_point = _broadcast(grid, values.shape)
    # Limits in float32 are exact up to 16 bits: a code beyond 2 ** 24 saturates anyway.
    wide = values.dtype == np.float64 or max(-grid.qmin, grid.qmax) > np.iinfo(np.uint16).max
    working = np.dtype(np.float64 if wide else np.float32)
    codes = np.empty(values.shape, grid.dtype)
    # In pieces: of an embedding table, each temporary would be as large as the model.
    for part in _pieces(values.shape):
        here = part if scale.ndim and scale.shape[0] > 1 else ()
        steps = _steps(values[part], scale[here], zero_point[here], working)
        np.clip(steps, grid.qmin, grid.qmax, out=steps)
        # The narrow types of ml_dtypes take no floats beyond their own.
        codes[part] = steps if codes.dtype.kind in "iu" else steps.astype(np.int32)
    return codes


_PIECE = 1 << 20


def _steps(
    values: FloatArray,
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[Any],
    working: np.dtype[Any],
) -> npt.NDArray[Any]:
    """The nearest steps of the grid, as floats."""
    # An infinite quotient is right: it saturates.
    with np.errstate(over="ignore"):
        steps = np.asarray(np.divide(values, scale.astype(working), dtype=working))
    np.rint(steps, out=steps)
    np.add(steps, zero_point.astype(working), out=steps)
    return steps


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices along the first axis of about `_PIECE` elements."""
    if not shape:
        yield ()
        return
    rows = max(1, _PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)


def dequantize(codes: npt.NDArray[Any], grid: AffineGrid) -> npt.NDArray[Any]:
    """``scale * (code - zero_point)``, in the dtype of `grid.scale`."""
    scale, zero_point = _broadcast(grid, codes.shape)
    steps = (codes.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32)
    with np.errstate(over="ignore"):
        product = steps * scale.astype(np.float32)
    return np.asarray(product).astype(grid.scale.dtype)


def fake_quantize(values: FloatArray, grid: AffineGrid) -> npt.NDArray[Any]:
    """`values` moved to their grid points, in their own dtype: quantize, then dequantize."""
    return np.asarray(dequantize(quantize(values, grid), grid)).astype(values.dtype)


def bias_scale(input_scale: npt.ArrayLike, weight_scale: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """``input_scale * weight_scale`` in float32, as the runtime computes it; shape () or (C,).

    Raises:
        ValueError: the product leaves float32's normal numbers.
    """
    with np.errstate(over="ignore", under="ignore"):
        product = np.asarray(
            np.asarray(input_scale, np.float32) * np.asarray(weight_scale, np.float32)
        )
    if not (np.isfinite(product).all() and (product >= np.finfo(np.float32).tiny).all()):
        raise ValueError(
            "input_scale * weight_scale is not a normal float32; "
            "raise the weight scales with minimum_weight_scale"
        )
    return product


def minimum_weight_scale(
    bias: FloatArray, input_scale: float, *, limit: int = BIAS_LIMIT
) -> npt.NDArray[np.float32]:
    """The smallest weight scale of each channel with which the bias's codes stay within `limit`.

    Use ``np.maximum(weight_scale, minimum_weight_scale(bias, input_scale))`` as the weight scale:
    channels whose weights are tiny next to their bias (dead after batch-norm fusing, say) lose
    weight resolution, which does not show next to such a bias, and no bias saturates. The product
    with `input_scale` is a normal float32, too.

    Args:
        bias: shape (C,), finite.
        input_scale: > 0.
        limit: largest magnitude of a code, at most ``2**31 - 1``.

    Returns:
        float32, shape (C,), > 0.

    Raises:
        ValueError: NaN or infinity in `bias`, or a scale beyond float32 would be needed.
    """
    check_finite(bias, "bias")
    if not (0 < input_scale < math.inf and 1 <= limit < 1 << 31):
        raise ValueError(f"input_scale is {input_scale}, limit {limit}; expected > 0 and < 2**31")
    info = np.finfo(np.float32)
    needed = np.abs(bias.astype(np.float64)) / limit
    # 1e-6 covers the rounding to float32 of this scale and of its product with input_scale.
    product = np.maximum(needed, float(info.tiny)) * (1 + 1e-6)
    scale = np.maximum(product / input_scale, float(info.tiny))
    if (scale > float(info.max)).any():
        raise ValueError(f"no float32 weight scale fits a bias of {np.abs(bias).max()}")
    return scale.astype(np.float32)


def minimum_pair_scale(rows: FloatArray) -> npt.NDArray[np.float64]:
    """The smallest scales of int8 weights at which no two neighbours saturate 16 bits.

    x86 CPUs without VNNI multiply uint8 activations by int8 weights with VPMADDUBSW, which adds two
    neighbouring products in saturating 16 bits: 255 * (a + b) stays within -32,768 to 32,767 if the
    codes' sum a + b stays within -128 to 128. Each code is rounded by at most 1/2, so that
    |(w_i + w_(i+1)) / scale| <= 127 is enough. For bell-shaped weights the scale grows by about a
    third, where 7-bit weights double it.

    Args:
        rows: weights, shape (C, K), K in the order in which the kernel adds products. All
            neighbours count, because the first of a pair may stand at an odd place.

    Returns:
        Shape (C,), >= 0; 0 where there is no pair.
    """
    if rows.shape[1] < 2:
        return np.zeros(rows.shape[0])
    pairs = rows[:, :-1].astype(np.float64) + rows[:, 1:]
    return np.asarray(np.abs(pairs).max(axis=1) / 127)


def quantize_bias(
    bias: FloatArray, input_scale: float, weight_scale: npt.ArrayLike
) -> npt.NDArray[np.int32]:
    """int32 codes of a bias of scale `bias_scale`, zero point 0, shape (C,).

    Raises:
        ValueError: a code would saturate (never, with `minimum_weight_scale`), or the scales'
            product is not a normal float32.
    """
    check_finite(bias, "bias")
    scale = bias_scale(input_scale, weight_scale).astype(np.float64)
    codes = np.rint(bias.astype(np.float64) / scale)
    over = np.abs(codes) > (1 << 31) - 1
    if over.any():
        at = int(np.argmax(over))
        step = np.broadcast_to(scale, bias.shape)[at]
        raise ValueError(
            f"bias[{at}] = {bias[at]} saturates int32 at scale {step}; "
            "raise the weight scale with minimum_weight_scale"
        )
    return codes.astype(np.int32)


def _check_levels(qmin: int, qmax: int, dtype: np.dtype[Any]) -> None:
    low, high = code_range(dtype)
    if not low <= qmin < qmax <= high:
        raise ValueError(f"levels are ({qmin}, {qmax}); expected {low} <= qmin < qmax <= {high}")


def _checked_range(
    lo: npt.ArrayLike, hi: npt.ArrayLike, axis: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    expected_rank = 0 if axis is None else 1
    if low.shape != high.shape or low.ndim != expected_rank:
        raise ValueError(
            f"lo has shape {low.shape}, hi {high.shape}, axis is {axis}; "
            "expected () and () per tensor, (C,) and (C,) with an axis"
        )
    check_finite(low, "lo")
    check_finite(high, "hi")
    if (low > high).any():
        raise ValueError(f"lo > hi at channel {int(np.argmax(low > high))}")
    return low, high


def _usable_scale(
    step: npt.NDArray[np.float64], empty: npt.NDArray[np.bool_], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """`step` as a positive normal number of `dtype`, 1 where the range is `empty`."""
    info = ml_dtypes.finfo(np.dtype(dtype))
    if (step > float(info.max)).any():
        raise ValueError(f"a step of {step.max()} does not fit into {np.dtype(dtype)}")
    usable = np.where(empty, 1.0, np.maximum(step, float(info.smallest_normal)))
    return np.asarray(usable).astype(dtype)


def _broadcast(
    grid: AffineGrid, shape: tuple[int, ...]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Scale and zero point shaped to broadcast against a tensor of `shape`."""
    scale, zero_point = grid.scale, grid.zero_point.astype(np.float64)
    if grid.axis is None:
        return scale, zero_point
    axis = normalized_axis(grid.axis, len(shape))
    if shape[axis] != scale.shape[0]:
        raise ValueError(f"axis {axis} has {shape[axis]} channels, the grid has {scale.shape[0]}")
    aligned = [1] * len(shape)
    aligned[axis] = scale.shape[0]
    return scale.reshape(aligned), zero_point.reshape(aligned)
