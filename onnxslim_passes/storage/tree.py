"""Decoders of wavelet trees: Huffman codes that load in half the time, for large weights.

    merge(zeros, ones, bytes, ...):
        b = Cast(bytes)
        start = Where(bits[b], ones before the byte + Shape(zeros), zeros before the byte)
        GatherElements(Concat(zeros, ones, spare), Reshape(Add(start, place[b]), [-1]))

A node (`numerics.wavelet_tree`) merges what its two branches gave: bit i says from which of them
symbol i comes, and it is the next one there. Its place is counted in two steps, up to the byte by
a CumSum over bytes, and within the byte by tables of 256 rows, so that only four steps have a
number for each symbol. A node of equally long words is one Gather.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxslim_passes.numerics.wavelet_tree import Leaf, Node, Split, encode, nodes
from onnxslim_passes.storage.base import (
    Argument,
    Expression,
    Function,
    Literal,
    Payload,
    Site,
    Step,
    call,
    step,
)
from onnxslim_passes.storage.streams import INT32, filled, head, reshape, unpacking_table

Symbols = npt.NDArray[np.uint8]


def merged_symbols(root: Node, symbols: Symbols, site: Site) -> Step:
    """The decoder of a tree: uint8, shape (n,).

    Args:
        root: a tree whose counts are those of the symbols.
        symbols: uint8, shape (n,).
        site: where.
    """
    cached = _Streams(root, symbols)
    payloads = {
        node: Payload((node.nbytes,), np.dtype(np.uint8), node.nbytes, partial(cached.get, at))
        for at, node in enumerate(nodes(root))
    }
    decoded = _decoded(root, payloads, site)
    width = root.bits if isinstance(root, Leaf) else 1
    unused = 8 * root.nbytes > width * symbols.size
    return head(decoded, symbols.size, site) if unused else decoded


def _decoded(node: Node, payloads: dict[Node, Payload], site: Site) -> Step:
    if isinstance(node, Split):
        zeros, ones = (_decoded(branch, payloads, site) for branch in (node.zero, node.one))
        tables = _tables(site)
        return call(_merge(site), zeros, ones, payloads[node], *tables, site=site)
    symbols = Literal.of(node.symbols, np.uint8)
    if not node.bits:
        return filled(np.asarray(node.symbols[0], np.uint8), (node.count,))
    rows = step("Gather", symbols, unpacking_table(node.bits, site))
    return reshape(step("Gather", rows, step("Cast", payloads[node], to=INT32)), (-1,))


def _tables(site: Site) -> tuple[Expression, ...]:
    """For each byte: its bits; the place of each among those alike; how many ones, and zeros."""
    bits = unpacking_table(1, site)
    number = partial(Literal.of, dtype=np.int32)
    flags = step("Cast", bits, to=int(TensorProto.BOOL))
    ones = step("CumSum", bits, number(1))
    before = step("Sub", ones, bits)
    place = step("Where", flags, before, step("Sub", number([list(range(8))]), before))
    all_ones = step("Gather", ones, number([7]), axis=1)
    return flags, place, all_ones, step("Sub", number(8), all_ones)


def _merge(site: Site) -> Function:
    """One node: (zeros, ones, bytes, *tables) -> symbols, with those of unused bits behind them."""
    zeros, ones, packed, flags, place, all_ones, all_zeros = (Argument(at) for at in range(7))
    numbers = step("Cast", packed, to=INT32)
    first_one = step("Cast", step("Shape", zeros), to=INT32)
    starts = step(
        "Where",
        step("Gather", flags, numbers),
        step("Add", _sums_before(step("Gather", all_ones, numbers)), first_one),
        _sums_before(step("Gather", all_zeros, numbers)),
    )
    index = reshape(step("Add", starts, step("Gather", place, numbers)), (-1,))
    # Up to 7 unused bits, zeros, look behind the symbols of a 0: not all branches are that long.
    spare = Literal.of([0] * 7, np.uint8)
    body = step("GatherElements", step("Concat", zeros, ones, spare, axis=0), index)
    return Function("t", 7, body, site.opset)


def _sums_before(column: Step) -> Step:
    """The sums of the elements before each one."""
    return step("CumSum", column, Literal.of(0, np.int32), exclusive=1)


@dataclass(eq=False)
class _Streams:
    """Makes all streams when the first one is asked for."""

    root: Node
    symbols: Symbols
    _made: tuple[Symbols, ...] = ()

    def get(self, at: int) -> Symbols:
        """The stream of a node, by its place among `nodes`."""
        if not self._made:
            self._made = tuple(encode(self.root, self.symbols))
        return self._made[at]
