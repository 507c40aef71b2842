"""Huffman codes in a form that is decoded by sums and gathers, without a loop over symbols.

A Huffman code gives frequent symbols short code words (Huffman 1952). Its decoder is a loop from
bit to bit; a *wavelet matrix* (Claude and Navarro 2012) holds the same bits sorted by their level,
so that each level is decoded at once:

- Level 0 has one bit for each symbol, the first one of its code word. The symbols are then split
  by it: those with 0 in order, followed by those with 1 in reverse order.
- Level l has one bit for each symbol whose code word is longer than l, in the order that level
  l - 1 left; then these are split in the same way.

Among the codes with given word lengths one is taken for which, after each level, symbols that are
complete stand behind those that go on. What is complete at the end is then `runs`: all symbols
sorted, those with the longest words first. Backwards, with ``v`` the m bits of a level and ``rest``
what the next level gave,

    index[i] = i (1 - v[i]) - sum over j <= i of v[j]          (negative ones count from the end)
    symbols = concatenate(rest, runs[len(rest) : m])[index]

Splitting in reverse is what makes the index such a simple sum. Dummies are appended to the symbols
so that each level has a whole number of bytes: at most 7 for each length.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.uint8]


def code_lengths(counts: Counts) -> npt.NDArray[np.int64]:
    """Bits of each symbol's code word in a Huffman code.

    Args:
        counts: how often each symbol occurs, > 0, shape (K,), K >= 2.

    Returns:
        int64, shape (K,); ``sum(2.0 ** -lengths) == 1``.
    """
    # The second item breaks ties, so that the code is the same each time.
    heap = [(int(count), symbol) for symbol, count in enumerate(counts)]
    parents = np.zeros(2 * len(heap) - 1, np.int64)
    heapq.heapify(heap)
    for node in range(len(heap), parents.size):
        first, one = heapq.heappop(heap)
        second, other = heapq.heappop(heap)
        parents[[one, other]] = node
        heapq.heappush(heap, (first + second, node))
    depths = np.zeros(parents.size, np.int64)
    for node in range(parents.size - 2, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return depths[: counts.size]


def limited_code_lengths(counts: Counts) -> Iterator[npt.NDArray[np.int64]]:
    """`code_lengths`, and the same of counts that are raised, so that no word is very long.

    Symbols that are more frequent, or as frequent and come first, have no longer words.
    """
    total = int(counts.sum())
    frequent_first = np.argsort(-counts, kind="stable")
    for floor in dict.fromkeys([1, *(total >> shift for shift in range(6, 20, 2))]):
        lengths = np.empty_like(counts)
        lengths[frequent_first] = np.sort(code_lengths(np.maximum(counts, floor)))
        yield lengths


def best_code_lengths(counts: Counts, level_bits: int) -> npt.NDArray[np.int64]:
    """The best of `limited_code_lengths` where each level costs so many bits besides."""

    def cost(lengths: npt.NDArray[np.int64]) -> int:
        return int((counts * lengths).sum()) + level_bits * int(lengths.max())

    return min(limited_code_lengths(counts), key=cost)


@dataclass(frozen=True, eq=False)
class WaveletMatrix:
    """The shape of a wavelet matrix, which follows from how often symbols occur.

    Attributes:
        counts: of each symbol, > 0, int64, shape (K,), K >= 2.
        lengths: of its code word, shape (K,), a complete prefix code.
    """

    counts: Counts
    lengths: npt.NDArray[np.int64]

    @cached_property
    def padded_counts(self) -> Counts:
        """The counts with dummies: a multiple of 8 for each length."""
        padded = self.counts.copy()
        for length in np.unique(self.lengths):
            same = np.flatnonzero(self.lengths == length)
            padded[same[0]] += -int(padded[same].sum()) % 8
        return padded

    @cached_property
    def level_sizes(self) -> list[int]:
        """Bits of each level: multiples of 8."""
        sizes = (self.padded_counts[self.lengths > level].sum() for level in range(self.depth))
        return [int(size) for size in sizes]

    @property
    def depth(self) -> int:
        """Number of levels: the longest code word."""
        return int(self.lengths.max())

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The symbols as `runs` has them."""
        return self._layout[0]

    @property
    def run_lengths(self) -> Counts:
        """How often each of them stands there, int64."""
        return self.padded_counts[self.order]

    @cached_property
    def _layout(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """The order of symbols in `runs`, and the bits of their code words, shape (depth, K)."""
        bits = np.zeros((self.depth, self.lengths.size), np.uint8)
        words: list[tuple[int, ...]] = [()]
        order: list[int] = []
        for length in range(1, self.depth + 1):
            words = [(*word, 0) for word in words] + [(*word, 1) for word in reversed(words)]
            complete = np.flatnonzero(self.lengths == length)[::-1]
            keep = len(words) - complete.size
            for symbol, word in zip(complete, words[keep:], strict=True):
                bits[:length, symbol] = word
            order = [*complete.tolist(), *order]
            words = words[:keep]
        return np.array(order, np.int64), bits

    def encode(self, symbols: Symbols) -> list[npt.NDArray[np.uint8]]:
        """The bits of each level, packed: bit j is bit ``j % 8`` of byte ``j // 8``.

        Args:
            symbols: uint8, shape (n,), with these counts.
        """
        dummies = np.repeat(np.arange(self.counts.size), self.padded_counts - self.counts)
        rest = np.concatenate([symbols, dummies.astype(np.uint8)])
        levels = []
        for level, size in enumerate(self.level_sizes):
            rest = rest[:size]
            flags = self._layout[1][level][rest].view(np.bool_)
            levels.append(np.packbits(flags, bitorder="little"))
            rest = np.concatenate([rest[~flags], rest[flags][::-1]])
        return levels

    def decode(self, levels: list[npt.NDArray[np.uint8]]) -> Symbols:
        """The symbols again, without the dummies."""
        runs = np.repeat(self.order.astype(np.uint8), self.run_lengths)
        rest: npt.NDArray[Any] = runs[:0]
        for packed, size in zip(reversed(levels), reversed(self.level_sizes), strict=True):
            flags = np.unpackbits(packed, bitorder="little", count=size).astype(np.int64)
            index = np.arange(size) * (1 - flags) - np.cumsum(flags)
            rest = np.concatenate([rest, runs[rest.size : size]])[index]
        return rest[: int(self.counts.sum())]
