"""Codebooks whose codes stand for several elements: ``w[g i : g i + g] = table[code[i]]``.

    Transpose(Reshape(Gather(table, codes), moved shape))

The table has shape (K, g), g one of 2, 4 and 8, K at most 256. Groups are neighbours in the
tensor's order, or, where its channels are along another axis than the first, in that of its
channels; only then there is a Transpose. What `cluster-weights` leaves with ``group``; also tables
of integers, of weights that are quantized afterwards, and codes of a grid.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.storage.base import Encoding, Expression, Plan, Site, Step, step
from onnxslim_passes.storage.choice import Offer
from onnxslim_passes.storage.contents import MAX_CODES, Contents
from onnxslim_passes.storage.dense import Dense
from onnxslim_passes.storage.narrow import Narrow
from onnxslim_passes.storage.streams import INT32, raw, reshape, same, unpack_codes

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]

_GROUPS = (8, 4, 2)
_SAMPLE = 4096


class CodebookVectors(Encoding):
    """A code for each group of elements."""

    name: ClassVar[str] = "codebook-vectors"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """All lengths of groups that serve, along each axis."""
        if not contents.folds or contents.size < 2 * min(_GROUPS):
            return
        for axis in _orders(contents.shape):
            moved = np.moveaxis(contents.values, axis, 0)
            if not _may_repeat(moved):
                continue
            ordered = np.ascontiguousarray(moved)
            for group in _GROUPS:
                found = _grouped(ordered.reshape(-1), group)
                if found is None:
                    continue
                codes, table = found
                bits = max(1, (len(table) - 1).bit_length())
                rows = step("Gather", _table(table, site), _numbers(codes, bits, site))
                figures: dict[str, int | float | str] = {
                    "clusters": len(table),
                    "per": "tensor",
                    "group": group,
                    "bits": bits,
                }
                yield Plan(self.name, _placed(rows, axis, contents.shape), figures)


def _orders(shape: tuple[int, ...]) -> Iterator[int]:
    """Axes to be put first; those that change nothing but once."""
    yield 0
    for axis in range(1, len(shape)):
        if shape[axis] > 1 and any(size > 1 for size in shape[:axis]):
            yield axis


def _may_repeat(values: Array) -> bool:
    """Whether the first pairs of neighbours are few enough; putting all in order takes long."""
    rows = max(1, 2 * _SAMPLE // max(1, values[0].size))
    first = np.ascontiguousarray(values[: rows + rows % 2]).reshape(-1)
    if first.size == values.size:
        return True
    pairs = first[: first.size // 2 * 2].view(np.dtype(f"V{2 * first.dtype.itemsize}"))
    # A group of eight has four pairs.
    most = MAX_CODES * max(_GROUPS) // min(_GROUPS)
    return len(set(pairs[:_SAMPLE].tolist())) <= most


def _grouped(flat: Array, group: int) -> tuple[Codes, Array] | None:
    """Codes (n / g,) and table (K, g), if there are at most 256 different groups."""
    if flat.size % group:
        return None
    # Groups that save nothing are not worth a table: a code for each is a byte, too.
    width = group * flat.dtype.itemsize
    if width <= 1:
        return None
    words = flat.view(np.dtype(f"u{min(8, width)}")).reshape(flat.size // group, -1)
    # Of every column a code below 256; then two columns are one of 16 bits, and so on.
    columns = [words[:, number] for number in range(words.shape[1])]
    while True:
        coded = [_coded(column) for column in columns]
        if any(codes is None for codes in coded):
            return None
        if len(coded) == 1:
            break
        numbers = [codes.astype(np.uint16) for codes in coded if codes is not None]
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        columns = [first * np.uint16(MAX_CODES) + second for first, second in pairs]
    codes = coded[0]
    assert codes is not None  # the loop has seen to it
    _, first = np.unique(codes, return_index=True)
    return codes, flat.reshape(-1, group)[first]


def _coded(column: Array) -> Codes | None:
    """The rank of each number among the distinct ones; None if there are more than 256."""
    stride = max(1, column.size // _SAMPLE)
    if stride > 1 and np.unique(column[::stride]).size > MAX_CODES:
        return None
    distinct, codes = np.unique(column, return_inverse=True)
    return codes.astype(np.uint8) if distinct.size <= MAX_CODES else None


def _table(values: Array, site: Site) -> Expression:
    """The rows, in a narrower type where they fit."""
    contents = Contents(values)
    plans = [plan for part in (Dense(), Narrow()) for plan in part.plans(contents, site)]
    return min((Offer(plan, site) for plan in plans), key=lambda offer: offer.own_bytes).plan.root


def _numbers(codes: Codes, bits: int, site: Site) -> Step:
    """The codes as int32."""
    if bits == 8:
        return step("Cast", raw(codes), to=INT32)
    return unpack_codes(partial(same, codes), codes.size, bits, site)


def _placed(rows: Step, axis: int, shape: tuple[int, ...]) -> Step:
    """Rows in the place of the weight's elements."""
    if axis == 0:
        return reshape(rows, shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    order = (*range(1, axis + 1), 0, *range(axis + 1, len(shape)))
    return step("Transpose", reshape(rows, moved), perm=order)
