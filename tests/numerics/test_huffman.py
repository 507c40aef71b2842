"""Wavelet matrices: symbols come back, at the length of a Huffman code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.huffman import WaveletMatrix, best_code_lengths, code_lengths


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=256))
def test_lengths_are_a_complete_code_near_the_entropy(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    assert sum(2.0 ** -int(length) for length in lengths) == 1
    p = np.array(counts) / sum(counts)
    mean, entropy = float((p * lengths).sum()), float(-(p * np.log2(p)).sum())
    assert entropy <= mean + 1e-9
    assert mean < entropy + p.max() + 0.087  # Gallager 1978
    order = np.argsort(counts, kind="stable")
    assert (np.diff(lengths[order]) <= 0).all()


@given(
    clusters=st.integers(2, 256),
    size=st.integers(1, 2000),
    level_bits=st.sampled_from([0, 100, 3000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_symbols_come_back(clusters: int, size: int, level_bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.choice(clusters, size, p=rng.dirichlet(np.full(clusters, 0.3)))
    symbols[:1] = clusters - 1
    used, symbols = np.unique(symbols, return_inverse=True)
    counts = np.bincount(symbols)
    if used.size < 2:
        return
    matrix = WaveletMatrix(counts, best_code_lengths(counts, level_bits))
    levels = matrix.encode(symbols.astype(np.uint8))
    assert matrix.decode(levels).tolist() == symbols.tolist()
    assert [8 * level.size for level in levels] == matrix.level_sizes
    assert matrix.run_lengths.sum() == matrix.level_sizes[0]
    dummies = matrix.padded_counts - matrix.counts
    assert dummies.sum() <= 7 * matrix.depth
    assert sum(matrix.level_sizes) == (matrix.padded_counts * matrix.lengths).sum()


def test_what_is_complete_stands_behind_what_goes_on() -> None:
    counts = np.array([500, 220, 130, 70, 40, 20, 12, 8])
    matrix = WaveletMatrix(counts, code_lengths(counts))
    lengths = matrix.lengths[matrix.order]
    assert (np.diff(lengths) <= 0).all()


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=256), st.sampled_from([0, 100, 3000]))
def test_symbols_in_the_order_of_their_frequencies_are_counted_down(
    counts: list[int], level_bits: int
) -> None:
    frequent_first = np.array(sorted(counts, reverse=True))
    lengths = best_code_lengths(frequent_first, level_bits)
    assert (np.diff(lengths) >= 0).all()
    order = WaveletMatrix(frequent_first, lengths).order
    assert order.tolist() == list(range(len(counts)))[::-1]


@pytest.mark.parametrize(("level_bits", "depth"), [(0, 16), (1000, 9)])
def test_costly_levels_make_short_words(level_bits: int, depth: int) -> None:
    counts = np.maximum(1, 40_000 >> np.arange(17))
    assert best_code_lengths(counts, level_bits).max() == depth
