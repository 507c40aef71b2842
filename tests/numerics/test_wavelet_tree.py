"""A wavelet tree gives back its symbols, in as many bits as the Huffman code has."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.huffman import code_lengths
from onnxslim_passes.numerics.wavelet_tree import (
    Leaf,
    Split,
    decode,
    encode,
    nodes,
    wavelet_tree,
)


@given(
    counts=st.lists(st.integers(1, 300), min_size=2, max_size=60), seed=st.integers(0, 2**32 - 1)
)
def test_decodes_what_it_encoded(counts: list[int], seed: int) -> None:
    occurring = np.array(counts, np.int64)
    lengths = code_lengths(occurring)
    root = wavelet_tree(occurring, lengths)
    symbols = np.repeat(np.arange(occurring.size, dtype=np.uint8), occurring)
    symbols = np.random.default_rng(seed).permutation(symbols)
    streams = list(encode(root, symbols))
    assert [stream.size for stream in streams] == [node.nbytes for node in nodes(root)]
    assert decode(root, iter(streams)).tobytes() == symbols.tobytes()
    assert sorted(root.symbols) == list(range(occurring.size))
    bits = sum(node.count * (node.bits if isinstance(node, Leaf) else 1) for node in nodes(root))
    assert bits == int((occurring * lengths).sum())


def test_equally_long_words_need_no_sorting() -> None:
    root = wavelet_tree(np.full(16, 5), code_lengths(np.full(16, 5)))
    assert isinstance(root, Leaf)
    assert root.bits == 4


def test_words_of_one_length_stand_in_tables_side_by_side() -> None:
    # One symbol of one bit, then 16 of five: a split and a table of four bits.
    counts = np.array([160, *[10] * 16])
    root = wavelet_tree(counts, code_lengths(counts))
    assert isinstance(root, Split)
    assert sorted(len(branch.symbols) for branch in (root.zero, root.one)) == [1, 16]
    assert all(isinstance(branch, Leaf) for branch in (root.zero, root.one))
