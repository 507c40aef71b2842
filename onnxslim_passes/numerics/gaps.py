"""Gaps between positions as symbols, for a code that follows how often they occur.

Rice codes are for gaps of random zeros. Where zeros stand in clumps, rows and columns, short gaps
and very long ones are more frequent than chance has it, and an entropy code of the gaps takes fewer
bits. So that its table stays short, only gaps below T have a symbol
of their own; the others share one with 255 neighbours and bring a byte along:

    gap < T:   symbol = gap
    gap >= T:  symbol = T + (gap - T) // 256,  byte = (gap - T) % 256

which is the split of a Golomb code (Golomb 1966) with a Huffman code for the quotients. A gap that
is too long for 256 symbols is cut: a position that nobody asked for stands at its 256 (256 - T) + T
-th place.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]

MAX_SYMBOLS = 256
_BYTE = 256
_SHORT = (4, 8, 16, 24, 32, 48, 64)
# What a symbol takes in the tables of a decoder.
_SYMBOL_BITS = 28


@dataclass(frozen=True, eq=False)
class GapSymbols:
    """Positions as symbols and bytes.

    Attributes:
        short: T, the gaps that have a symbol of their own; 1 to 255.
        positions: int64, shape (n,): those that were asked for, and those that cut long gaps.
        symbols: uint8, shape (n,).
        extra: uint8: the byte of each symbol that has one, in their order.
    """

    short: int
    positions: Positions
    symbols: npt.NDArray[np.uint8]
    extra: npt.NDArray[np.uint8]

    @property
    def bits(self) -> float:
        """Bits in an ideal code of order 0, with some for each symbol of its table."""
        counts = np.bincount(self.symbols)
        counts = counts[counts > 0]
        entropy = -float((counts * np.log2(counts / counts.sum())).sum())
        return entropy + 8 * self.extra.size + _SYMBOL_BITS * counts.size

    def step(self, symbol: int) -> int:
        """How far a symbol goes from one position to the next, without its byte."""
        return 1 + (symbol if symbol < self.short else self.short + _BYTE * (symbol - self.short))


def gap_symbols(positions: Positions, short: int) -> GapSymbols:
    """Splits the gaps.

    Args:
        positions: int64, strictly ascending, >= 0, shape (n,), n > 0.
        short: T, 1 to 255.
    """
    limit = short + _BYTE * (MAX_SYMBOLS - short)
    gaps = np.diff(positions, prepend=-1) - 1
    cuts = gaps // limit
    if cuts.any():
        # Each cut stands behind limit - 1 zeros.
        cut = np.full(positions.size + int(cuts.sum()), limit - 1)
        cut[np.cumsum(cuts + 1) - 1] = gaps % limit
        gaps = cut
        positions = np.cumsum(gaps + 1) - 1
    beyond = gaps - short
    long = beyond >= 0
    symbols = np.where(long, short + beyond // _BYTE, gaps).astype(np.uint8)
    return GapSymbols(short, positions, symbols, (beyond[long] % _BYTE).astype(np.uint8))


def best_gap_symbols(positions: Positions) -> GapSymbols:
    """The split with the fewest bits, of a few T (positions as `gap_symbols` takes them)."""
    return min((gap_symbols(positions, short) for short in _SHORT), key=lambda each: each.bits)


def gap_positions(gaps: GapSymbols) -> Positions:
    """The positions again, from symbols and bytes alone."""
    steps = np.array([gaps.step(symbol) for symbol in range(MAX_SYMBOLS)])[gaps.symbols]
    steps[gaps.symbols >= gaps.short] += gaps.extra
    return np.cumsum(steps) - 1
