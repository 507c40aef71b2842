"""How far changed values are from the original ones.

Sums are NumPy's pairwise ones, not BLAS's, whose last digits depend on the number of threads.
"""

import math

import numpy as np

from onnxslim_passes.numerics.arrays import FloatArray, blocks


def squared_error(original: FloatArray, changed: FloatArray) -> float:
    """The sum of squared differences of two arrays of one shape, accumulated in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if original.shape != changed.shape:
        raise ValueError(f"shapes differ: {original.shape} and {changed.shape}")
    total = 0.0
    for ours, theirs in zip(blocks(original), blocks(changed), strict=True):
        difference = ours.astype(np.float64) - theirs.astype(np.float64)
        total += float(np.sum(np.square(difference)))
    return total


def energy(values: FloatArray) -> float:
    """The sum of squares, accumulated in float64."""
    total = 0.0
    for block in blocks(values):
        wide = block.astype(np.float64)
        total += float(np.sum(np.square(wide)))
    return total


def sqnr_db(original: FloatArray, changed: FloatArray) -> float:
    """Signal-to-quantization-noise ratio in dB: ``10 log10(sum original^2 / sum difference^2)``.

    Infinity for equal arrays (empty ones too), -infinity where an all-zero array was changed.
    """
    noise = squared_error(original, changed)
    if noise == 0:
        return math.inf
    signal = energy(original)
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


def weighted_sqnr_db(original: FloatArray, changed: FloatArray, weights: FloatArray) -> float:
    """`sqnr_db` with squares that count differently.

    Args:
        original: any shape.
        changed: of the same shape.
        weights: how much each square counts, >= 0, of the same shape.
    """
    signal, noise = 0.0, 0.0
    parts = zip(blocks(original), blocks(changed), blocks(weights), strict=True)
    for ours, theirs, counted in parts:
        wide, share = ours.astype(np.float64), counted.astype(np.float64)
        signal += float(np.sum(share * np.square(wide)))
        noise += float(np.sum(share * np.square(wide - theirs.astype(np.float64))))
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf
