"""Codebooks with Huffman codes: frequent values take fewer bits.

The codes of a weight have one of two forms. A wavelet tree (`tree`) loads faster, but has a stream
for each inner node of the code, which only large weights can bear. A wavelet matrix
(`numerics.huffman`) has a stream for each level. The table's values, each repeated as often as it
occurs, are permuted level by level:

    runs = GatherElements(table, CumSum(ScatterElements(Expand(0, [n]), starts, Sign(starts))))
    rest = merge(merge(merge([], level 2, T, runs), level 1, T, runs), level 0, T, runs)[:n]

    merge(rest, bytes, T, runs):
        v = Reshape(Gather(T, bytes), [-1])                              the bits, one by one
        index = Sub(Mul(Range(0, m), Sub(1, v)), CumSum(v))
        GatherElements(Concat(rest, Slice(runs, Shape(rest), Shape(v))), index)

No length stands in a step, so that `merge` is a function of the model, called once a level; a
level costs some 40 bytes besides its bits.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxslim_passes.numerics.huffman import (
    WaveletMatrix,
    best_code_lengths,
    limited_code_lengths,
)
from onnxslim_passes.numerics.wavelet_tree import nodes, wavelet_tree
from onnxslim_passes.storage.base import (
    Argument,
    Encoding,
    Function,
    Literal,
    Payload,
    Plan,
    Site,
    Step,
    call,
    step,
    walk,
)
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.streams import (
    INT32,
    filled,
    head,
    raw,
    reshape,
    running_sum,
    unpacking_table,
)
from onnxslim_passes.storage.tree import merged_symbols

Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Order = npt.NDArray[np.int64]
Table = npt.NDArray[Any]

# What a level or a node takes besides its bits: a call of the function and the frame of a tensor,
# or all steps of the function.
_LEVEL_BYTES, _NODE_BYTES = 40, 60
_INLINE_BYTES = (350, 500)
# What is it worth that a tree is decoded in less time than a matrix.
_FASTER_MAY_TAKE = 1 + 1 / 128


class CodebookHuffman(Encoding):
    """A table of at most 256 values and Huffman codes."""

    name: ClassVar[str] = "codebook-huffman"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One where there are three values or more; CumSum came with opset 11."""
        if site.opset < 11 or not contents.folds:
            return
        shared = contents.shared
        if shared is None or shared.clusters < 3:
            return
        numbers, order = huffman_numbers(shared.codes, shared.counts, site)
        flat = looked_up(shared.table[order], numbers)
        root = flat if contents.values.ndim == 1 else reshape(flat, contents.shape)
        streams = sum(part.nbytes for part in walk(numbers) if isinstance(part, Payload))
        bits = round(8 * streams / contents.size, 3)
        yield Plan(self.name, root, {"clusters": shared.clusters, "per": "tensor", "bits": bits})


def huffman_numbers(codes: Codes, counts: Counts, site: Site) -> tuple[Step, Order]:
    """Codes, numbered anew, by a Huffman code in the form that suits their number.

    Args:
        codes: uint8, shape (n,).
        counts: int64, shape (K,), K >= 3: how often each code occurs, never 0.
        site: where; from opset 11.

    Returns:
        Numbers, uint8, shape (n,), and the code that has each number, shape (K,). Where codes were
        numbered by frequency, the most frequent one first, the order counts up or down.
    """
    level_bytes, node_bytes = (_LEVEL_BYTES, _NODE_BYTES) if site.functions else _INLINE_BYTES
    matrix = WaveletMatrix(counts, best_code_lengths(counts, 8 * level_bytes))
    matrix_bytes = sum(size // 8 + level_bytes for size in matrix.level_sizes)
    trees = [wavelet_tree(counts, each) for each in limited_code_lengths(counts)]
    sizes = [sum(node.nbytes + node_bytes for node in nodes(tree)) for tree in trees]
    if min(sizes) <= matrix_bytes * _FASTER_MAY_TAKE:
        tree = trees[sizes.index(min(sizes))]
        return merged_symbols(tree, codes, site), np.arange(counts.size)
    return _by_levels(matrix, codes, site), matrix.order


def looked_up(table: Table, numbers: Step) -> Step:
    """Entries of a table by their numbers (uint8); a table that counts needs not be there."""
    wide = step("Cast", numbers, to=INT32)
    if table.dtype == np.int32:
        first = int(table[0])
        for op, direction in (("Add", 1), ("Sub", -1)):
            if np.array_equal(table, first + direction * np.arange(table.size)):
                return step(op, Literal.of(first, np.int32), wide)
    return step("GatherElements", raw(table), wide)


def _by_levels(matrix: WaveletMatrix, codes: Codes, site: Site) -> Step:
    """Codes, numbered anew in the matrix's order, from a wavelet matrix."""
    runs = step("Cast", _runs(matrix), to=int(TensorProto.UINT8))
    cached = _LevelStreams(matrix, codes)
    rest: Step | Literal = Literal.of([], np.uint8)
    merge = _merge(site)
    for level in reversed(range(matrix.depth)):
        nbytes = matrix.level_sizes[level] // 8
        packed = Payload((nbytes,), np.dtype(np.uint8), nbytes, partial(cached.level, level))
        rest = call(merge, rest, packed, unpacking_table(1, site), runs, site=site)
    assert isinstance(rest, Step)
    return head(rest, codes.size, site)


def _runs(matrix: WaveletMatrix) -> Step:
    """The number of each run, as often as it is long: int32."""
    lengths = matrix.run_lengths
    starts = raw(np.cumsum(lengths)[:-1].astype(np.int32))
    zeros = filled(np.zeros((), np.int32), (int(lengths.sum()),))
    # Starts are positive: their signs are the ones to be summed.
    marks = step("ScatterElements", zeros, starts, step("Sign", starts))
    return running_sum(marks)


def _merge(site: Site) -> Function:
    """One level: (rest, bytes, T, runs) -> the symbols that this level has bits for."""
    rest, packed, table, runs = (Argument(index) for index in range(4))
    rows = step("Gather", table, step("Cast", packed, to=INT32))
    flags = reshape(rows, (-1,))
    zero, one = Literal.of(0, np.int32), Literal.of(1, np.int32)
    count = step("Cast", step("Size", flags), to=INT32)
    forward = step("Mul", step("Range", zero, count, one), step("Sub", one, flags))
    index = step("Sub", forward, running_sum(flags))
    others = step("Slice", runs, step("Shape", rest), step("Shape", flags))
    body = step("GatherElements", step("Concat", rest, others, axis=0), index)
    return Function("m", 4, body, site.opset)


class _LevelStreams:
    """Packs all levels when the first one is asked for."""

    def __init__(self, matrix: WaveletMatrix, codes: Codes) -> None:
        self._matrix = matrix
        self._codes = codes
        self._levels: list[Codes] = []

    def level(self, number: int) -> Codes:
        """The stream of one level."""
        if not self._levels:
            self._levels = self._matrix.encode(self._codes)
        return self._levels[number]
