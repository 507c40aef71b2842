"""Mask and values, the gaps between them in Huffman codes.

    steps = GatherElements(table, symbols)          a Huffman code (`huffman`)
    long = Sign(Div(steps, T + 1))                  1 where a byte belongs to the symbol
    extra = Gather(bytes, long * CumSum(long))      bytes[0] is 0, for all others
    positions = CumSum(steps + extra) - 1

and then as for the other masks (`scattered`). The split of gaps into symbols and bytes is that of
`numerics.gaps`. It needs no Compress, and therefore no declared shapes.
"""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import numpy as np

from onnxslim_passes.numerics.gaps import GapSymbols, best_gap_symbols
from onnxslim_passes.numerics.rice import best_rice
from onnxslim_passes.storage.base import Literal, Site, Step, step
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.huffman import huffman_numbers, looked_up
from onnxslim_passes.storage.scattered import Places, Scattered
from onnxslim_passes.storage.streams import INT32, raw, running_sum

# Huffman codes load slower than Rice codes. Where that is felt, for more elements than this, they
# must save this part of their bits.
_QUICKLY_LOADED = 1 << 20
_LEAST_SAVED = 1 / 20


class GapsHuffman(Scattered):
    """Huffman-coded gaps, and the values between them."""

    name: ClassVar[str] = "gaps-huffman"

    def places(self, contents: Contents, site: Site) -> Iterator[Places]:
        """None for large weights for which Rice codes are about as short."""
        gaps = best_gap_symbols(contents.positions)
        least_saved = _LEAST_SAVED if contents.size > _QUICKLY_LOADED else 0
        most = (1 - least_saved) * best_rice(contents.positions).bits
        if gaps.bits < most and np.unique(gaps.symbols).size > 2:
            yield Places(gaps.positions, _positions(gaps, site))


def _positions(gaps: GapSymbols, site: Site) -> Step:
    """Int32, shape (count,)."""
    number = partial(Literal.of, dtype=np.int32)
    found, codes, counts = np.unique(gaps.symbols, return_inverse=True, return_counts=True)
    table = np.array([gaps.step(int(symbol)) for symbol in found], np.int32)
    numbers, order = huffman_numbers(codes.astype(np.uint8), counts, site)
    steps = looked_up(table[order], numbers)
    if gaps.extra.size:
        long = step("Sign", step("Div", steps, number(gaps.short + 1)))
        index = step("Mul", long, running_sum(long))
        extra = raw(np.concatenate([np.zeros(1, np.uint8), gaps.extra]))
        steps = step("Add", steps, step("Cast", step("Gather", extra, index), to=INT32))
    return step("Sub", running_sum(steps), number(1))
