"""Which weights to make zero: masks by magnitude, over one array or many, and what masks cost.

A mask is a bool array of the weight's shape, True = kept. Sparsity is the fraction of zeros.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015, prunes what is smaller than a quality parameter times the standard deviation of the
layer (`deviation_mask`); fixed fractions by magnitude go back to the same paper's tables
(`magnitude_mask`), and one threshold over all layers is the common "global" variant
(`global_threshold`). Structure that hardware can use is N:M (`n_of_m_mask`; Mishra et al. 2021,
arXiv:2104.08378) and whole blocks (`block_norms`, then any of the above over the blocks).

The order statistics are exact and need no sorted copy: the bit pattern of a non-negative float,
read as an unsigned integer, is ordered like the number, so two walks over 16-bit digits (four for
float64) find the k-th smallest magnitude of any number of arrays.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import (
    FloatArray,
    blocks,
    check_finite,
    normalized_axis,
    working_dtype,
)
from onnxslim_passes.numerics.distortion import energy

Mask = npt.NDArray[np.bool_]
Arrays = Sequence[FloatArray] | Callable[[], Iterable[FloatArray]]
"""A sequence of arrays, or a function that walks over them anew at each call (lazy payloads)."""

_DIGIT_BITS = 16


def pruned_count(size: int, sparsity: float) -> int:
    """How many of `size` weights a `sparsity` in [0, 1] makes zero: the nearest whole number."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected a fraction in [0, 1]")
    return round(size * sparsity)


@dataclass(frozen=True, kw_only=True)
class MagnitudeThreshold:
    """Where a magnitude cut falls, ties included.

    Attributes:
        value: weights with a magnitude below it are pruned, above it kept; >= 0.
        kept_ties: of the weights with exactly this magnitude, the first so many are kept.
    """

    value: float
    kept_ties: int

    def masks(self, arrays: Iterable[FloatArray]) -> Iterator[Mask]:
        """One mask an array, in the order in which the threshold was found (ties run through)."""
        left = self.kept_ties
        for array in arrays:
            mask, used = _mask_at(array, self.value, left)
            left -= used
            yield mask


def magnitude_mask(weights: FloatArray, sparsity: float) -> Mask:
    """Keep the largest magnitudes: exactly ``size - pruned_count(size, sparsity)`` of them.

    Among equal magnitudes the ones with the lowest index (C order) are kept.

    Raises:
        ValueError: NaN or infinity in `weights`, or `sparsity` outside [0, 1].
    """
    return next(global_threshold([weights], sparsity).masks([weights]))


def global_threshold(arrays: Arrays, sparsity: float) -> MagnitudeThreshold:
    """One threshold for many arrays, so that `sparsity` of all their elements together are pruned.

    Peak memory is that of one array, when `arrays` is a function that reads them one at a time.

    Raises:
        ValueError: NaN or infinity in an array, or `sparsity` outside [0, 1].
    """
    size, wide = 0, False
    for array in _walk(arrays):
        check_finite(array, "weights")
        size += array.size
        wide = wide or array.dtype == np.float64
    pruned = pruned_count(size, sparsity)
    if pruned == 0:
        return MagnitudeThreshold(value=0.0, kept_ties=size)
    if pruned == size:
        return MagnitudeThreshold(value=math.inf, kept_ties=0)
    return _kth_magnitude(arrays, pruned, np.dtype(np.float64 if wide else np.float32))


def deviation_threshold(weights: FloatArray, threshold: float) -> float:
    """The magnitude ``threshold`` standard deviations from zero, as in Han et al. 2015.

    The deviation is taken about zero, the root mean square: weights are centred near zero, so it
    agrees with the layer's standard deviation, and it can only shrink when small weights become
    zero, so pruning twice prunes nothing more.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; expected a number of deviations >= 0")
    check_finite(weights, "weights")
    if weights.size == 0:
        return 0.0
    # Squares of tiny or huge float64 numbers leave float64's range: scale by a power of two first.
    peak = max(float(np.abs(block).max()) for block in blocks(weights))
    exponent = math.frexp(peak)[1]
    total = sum(energy(np.ldexp(block.astype(np.float64), -exponent)) for block in blocks(weights))
    return threshold * math.ldexp(math.sqrt(total / weights.size), exponent)


def deviation_mask(weights: FloatArray, threshold: float) -> Mask:
    """Prune ``|w| < threshold * deviation`` (see `deviation_threshold`); zeros count as pruned.

    Raises:
        ValueError: NaN or infinity in `weights`, or a negative `threshold`.
    """
    limit = deviation_threshold(weights, threshold)
    mask = np.empty(weights.size, np.bool_)
    for start, block in _numbered_blocks(weights):
        magnitudes = np.abs(block.astype(np.float64))
        mask[start : start + block.size] = (magnitudes >= limit) & (magnitudes > 0)
    return mask.reshape(weights.shape)


def n_of_m_mask(weights: FloatArray, kept: int, of: int, axis: int) -> Mask:
    """N:M sparsity: of every `of` neighbours along `axis`, the `kept` of largest magnitude.

    A last group that is shorter keeps `kept`, too. Among equal magnitudes the first ones are kept.

    Raises:
        ValueError: NaN or infinity in `weights`, no such axis, or not ``0 < kept < of``.
    """
    if not 0 < kept < of:
        raise ValueError(f"{kept} of {of}; expected N:M with 0 < N < M, such as 2 of 4")
    check_finite(weights, "weights")
    axis = normalized_axis(axis, weights.ndim)
    magnitudes = np.moveaxis(np.abs(weights.astype(working_dtype(weights.dtype))), axis, -1)
    length = magnitudes.shape[-1]
    groups = -(-length // of)
    padding = [(0, 0)] * (magnitudes.ndim - 1) + [(0, groups * of - length)]
    padded = np.pad(magnitudes, padding, constant_values=-1.0)
    grouped = padded.reshape(*magnitudes.shape[:-1], groups, of)
    order = np.argsort(-grouped, axis=-1, kind="stable")
    mask = np.zeros(grouped.shape, np.bool_)
    np.put_along_axis(mask, order[..., :kept], True, axis=-1)
    flat = mask.reshape(padded.shape)[..., :length]
    return np.ascontiguousarray(np.moveaxis(flat, -1, axis))


def block_norms(
    weights: FloatArray, block: tuple[int, int], axes: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Root mean square of each block of a weight; the remaining axes belong to the block whole.

    Args:
        weights: finite.
        block: sizes (r, c) along the two axes; the last blocks may be smaller.
        axes: which axes of `weights`.

    Returns:
        float64, shape (ceil(R / r), ceil(C / c)).
    """
    check_finite(weights, "weights")
    squares = np.square(np.moveaxis(weights, axes, (0, 1)).astype(np.float64))
    plane = squares.reshape(*squares.shape[:2], -1).mean(axis=2)
    for axis, size in enumerate(block):
        starts = np.arange(0, plane.shape[axis], size)
        lengths = np.minimum(size, plane.shape[axis] - starts)
        sums = np.add.reduceat(plane, starts, axis=axis)
        plane = sums / np.expand_dims(lengths, 1 - axis)
    norms: npt.NDArray[np.float64] = np.sqrt(plane)
    return norms


def spread_mask(
    block_mask: Mask, block: tuple[int, int], axes: tuple[int, int], shape: tuple[int, ...]
) -> Mask:
    """The mask of a weight of `shape` from that of its blocks; arguments as in `block_norms`."""
    mask = block_mask
    for axis, size in enumerate(block):
        mask = np.repeat(mask, size, axis=axis)
    mask = mask[: shape[axes[0]], : shape[axes[1]]]
    mask = mask.reshape(*mask.shape, *(1,) * (len(shape) - 2))
    return np.ascontiguousarray(np.broadcast_to(np.moveaxis(mask, (0, 1), axes), shape))


def apply_mask(weights: FloatArray, mask: Mask) -> npt.NDArray[Any]:
    """`weights` with +0.0 wherever `mask` is False (a product would leave -0.0); same dtype."""
    return np.where(mask, weights, np.zeros((), weights.dtype))


def nonzero_count(weights: FloatArray) -> int:
    """How many elements differ from zero (-0.0 is zero)."""
    return sum(int(np.count_nonzero(block != 0)) for block in blocks(weights))


def entropy_bits(counts: npt.ArrayLike) -> float:
    """Shannon entropy in bits a symbol of symbols that occur so many times; 0 for no symbols."""
    occurring = np.asarray(counts, np.float64).reshape(-1)
    occurring = occurring[occurring > 0]
    if occurring.size == 0:
        return 0.0
    shares = occurring / occurring.sum()
    return float(max(0.0, -np.sum(shares * np.log2(shares))))


def mask_entropy_bits(density: float) -> float:
    """Bits a weight that say which weights are zero, when a fraction `density` of them is not."""
    return entropy_bits([density, 1 - density])


def _walk(arrays: Arrays) -> Iterable[FloatArray]:
    return arrays() if callable(arrays) else arrays


def _numbered_blocks(array: FloatArray) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    start = 0
    for block in blocks(array):
        yield start, block
        start += block.size


def _keys(block: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Magnitudes as unsigned integers of the same order; `dtype` is float32 or float64."""
    magnitudes: npt.NDArray[Any] = np.abs(block.astype(dtype))
    return magnitudes.view(np.uint64 if dtype.itemsize == 8 else np.uint32)


def _kth_magnitude(arrays: Arrays, pruned: int, dtype: np.dtype[Any]) -> MagnitudeThreshold:
    """The threshold that prunes exactly `pruned` elements (0 < pruned < size): a radix selection.

    Digits of the key are fixed from the highest down; `below` counts the keys that are surely
    smaller than the one sought.
    """
    prefix, below, equal = 0, 0, 0
    for shift in range(dtype.itemsize * 8 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = _digit_counts(arrays, prefix, shift, dtype)
        cumulative = below + np.cumsum(counts)
        digit = int(np.searchsorted(cumulative, pruned))  # first with at least `pruned` up to it
        equal = int(counts[digit])
        below = int(cumulative[digit]) - equal
        prefix = prefix << _DIGIT_BITS | digit
    key = np.array(prefix, np.uint64 if dtype.itemsize == 8 else np.uint32)
    return MagnitudeThreshold(value=float(key.view(dtype)), kept_ties=below + equal - pruned)


def _digit_counts(
    arrays: Arrays, prefix: int, shift: int, dtype: np.dtype[Any]
) -> npt.NDArray[np.int64]:
    """Counts of the 16-bit digits at `shift` among the keys whose higher digits are `prefix`."""
    total_bits = dtype.itemsize * 8
    counts = np.zeros(1 << _DIGIT_BITS, np.int64)
    for array in _walk(arrays):
        for block in blocks(array):
            keys = _keys(block, dtype)
            if shift + _DIGIT_BITS < total_bits:
                keys = keys[keys >> (shift + _DIGIT_BITS) == prefix]
            digits = (keys >> shift & 0xFFFF).astype(np.int64)
            counts += np.bincount(digits, minlength=counts.size)
    return counts


def _mask_at(array: FloatArray, value: float, ties_left: int) -> tuple[Mask, int]:
    """The mask of one array at a threshold, and how many ties it kept."""
    mask = np.empty(array.size, np.bool_)
    used = 0
    dtype = working_dtype(array.dtype)
    for start, block in _numbered_blocks(array):
        magnitudes = np.abs(block.astype(dtype))
        kept = magnitudes > np.float64(value)
        ties = np.flatnonzero(magnitudes == np.float64(value))[: ties_left - used]
        kept[ties] = True
        used += ties.size
        mask[start : start + block.size] = kept
    return mask.reshape(array.shape), used
