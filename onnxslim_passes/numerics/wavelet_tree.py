"""Huffman codes as a tree of bit streams, which is decoded by few sums and gathers.

A wavelet tree (Grossi, Gupta and Vitter 2003) has the bits of all code words at the nodes of the
code's tree: a node has a bit for each symbol under it, in the order of the symbols, that says into
which of its two branches the symbol goes. The bits are those of the wavelet matrix (`huffman`), in
other order. Where all symbols under a node have equally long words, 2^r symbols with r more bits
each, there is nothing to sort: the r bits stand together, and a table has their symbols.

So the tree has a stream a node where the matrix has one a level, and fewer symbols to move about:
those under the nodes alone that have no such table.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.bits import pack_bits, packed_bytes, unpack_bits

Counts = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.uint8]
# Bits of a symbol in a table: those that fill bytes.
TABLE_BITS = (0, 1, 2, 4)


@dataclass(frozen=True, eq=False)
class Leaf:
    """Symbols with equally long words.

    Attributes:
        symbols: 1, 2, 4 or 16 of them; the place of each is its code.
        count: how often they occur together.
    """

    symbols: tuple[int, ...]
    count: int

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for a symbol alone, which has no stream."""
        return (len(self.symbols) - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return packed_bytes(self.count, self.bits)


@dataclass(frozen=True, eq=False)
class Split:
    """A node with a bit for each symbol under it.

    Attributes:
        zero: where a symbol goes for a 0.
        one: and for a 1.
    """

    zero: "Node"
    one: "Node"

    @property
    def symbols(self) -> tuple[int, ...]:
        """All symbols under it."""
        return (*self.zero.symbols, *self.one.symbols)

    @property
    def count(self) -> int:
        """How often they occur together."""
        return self.zero.count + self.one.count

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return packed_bytes(self.count, 1)


Node: TypeAlias = Leaf | Split


def wavelet_tree(counts: Counts, lengths: npt.NDArray[np.int64]) -> Node:
    """The tree of a Huffman code, with as many tables as its lengths allow.

    Args:
        counts: how often each symbol occurs, > 0, shape (K,), K >= 2.
        lengths: of its code word, a complete prefix code, shape (K,).
    """
    level: list[Node] = []
    for length in range(int(lengths.max()), 0, -1):
        complete = np.flatnonzero(lengths == length)
        leaves = [Leaf((int(symbol),), int(counts[symbol])) for symbol in complete]
        level = _paired([*leaves, *level])
    return _with_tables(level[0])


def _paired(level: list[Node]) -> list[Node]:
    """Nodes two and two, those with equally long words with each other, as far as it goes."""
    alike: dict[int, list[Node]] = defaultdict(list)
    for node in level:
        alike[_even_depth(node)].append(node)
    odd = [group.pop() for group in alike.values() if len(group) % 2]
    ordered = [*chain(*alike.values()), *odd]
    return [Split(zero, one) for zero, one in zip(ordered[::2], ordered[1::2], strict=True)]


def _with_tables(root: Node) -> Node:
    """The tree with its nodes of equally long words as leaves of several symbols."""
    if _even_depth(root) in TABLE_BITS:
        return Leaf(root.symbols, root.count)
    assert isinstance(root, Split)  # a leaf has depth 0
    return Split(_with_tables(root.zero), _with_tables(root.one))


def _even_depth(node: Node) -> int:
    """The bits of all words under a node if they are as many, or -1."""
    if isinstance(node, Leaf):
        return 0
    zero, one = _even_depth(node.zero), _even_depth(node.one)
    return zero + 1 if zero == one >= 0 else -1


def nodes(root: Node) -> Iterator[Node]:
    """All nodes with a stream, each before those under it."""
    if root.nbytes:
        yield root
    if isinstance(root, Split):
        yield from nodes(root.zero)
        yield from nodes(root.one)


def encode(root: Node, symbols: Symbols) -> Iterator[npt.NDArray[np.uint8]]:
    """The streams of `nodes`, packed as `bits.pack_bits` does.

    Args:
        root: a tree whose counts are those of the symbols.
        symbols: uint8, shape (n,).
    """
    if isinstance(root, Leaf):
        if root.nbytes:
            codes = np.zeros(256, np.uint8)
            codes[list(root.symbols)] = np.arange(len(root.symbols))
            yield pack_bits(codes[symbols], root.bits)
        return
    into_one = np.zeros(256, np.bool_)
    into_one[list(root.one.symbols)] = True
    flags = into_one[symbols]
    yield np.packbits(flags, bitorder="little")
    yield from encode(root.zero, symbols[~flags])
    yield from encode(root.one, symbols[flags])


def decode(root: Node, streams: Iterator[npt.NDArray[np.uint8]]) -> Symbols:
    """The symbols again."""
    if isinstance(root, Leaf):
        table = np.array(root.symbols, np.uint8)
        if not root.bits:
            return np.repeat(table, root.count)
        return table[unpack_bits(next(streams), root.bits, root.count)]
    flags = np.unpackbits(next(streams), bitorder="little", count=root.count).view(np.bool_)
    symbols = np.empty(root.count, np.uint8)
    symbols[~flags] = decode(root.zero, streams)
    symbols[flags] = decode(root.one, streams)
    return symbols
