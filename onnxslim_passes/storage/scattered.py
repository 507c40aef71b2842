"""Mask and values: where the elements are that differ from the most frequent one, and which.

    positions, values -> Reshape(ScatterElements(Expand(background, [n]), positions, values), shape)

The background is the most frequent value, zero in a pruned weight. Positions are Rice codes
(`numerics.rice`), whose decoder needs no loop: P, the places of the ones in the unary stream, times
2^k, is a Compress of the multiples of 2^k, and

    positions = Add(Compress(Range(0, .., 2^k), bits), CumSum(low - (2^k - 1)))

- ``bitmask``: k = 0, a bit for each element; the positions are P itself.
- ``rice``: k > 0; below a density of about 1/3 shorter than a bit for each element.

The values are a tensor of their own, stored by the cheapest of the other encodings: raw, in a
shorter type, or as codes. ONNX Runtime cannot infer how many elements a Compress has, and does not
fold what it cannot size: its shape is declared (`Step.shape`). Where no declaration may be relied
on, the places of the ones are scattered instead, one place behind the last for all zero bits:

    2^k P = ScatterElements(zeros, Where(bits, CumSum(bits) - 1, ones), Range(0, .., 2^k))[:ones]
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.rice import RiceSize, best_rice, rice_low, rice_unary
from onnxslim_passes.storage.base import Encoding, Literal, Payload, Plan, Site, Step, step
from onnxslim_passes.storage.codebook import (
    CodebookPacked,
    CodebookUint2,
    CodebookUint4,
    CodebookUint8,
)
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.dense import Dense
from onnxslim_passes.storage.huffman import CodebookHuffman
from onnxslim_passes.storage.narrow import Narrow
from onnxslim_passes.storage.streams import (
    INT32,
    filled,
    head,
    reshape,
    running_sum,
    unpack_codes,
    unpack_flags,
)

Positions = npt.NDArray[np.int64]

_VALUES: Sequence[Encoding] = (
    Dense(),
    Narrow(),
    CodebookUint8(),
    CodebookUint4(),
    CodebookUint2(),
    CodebookPacked(),
    CodebookHuffman(),
)
# A mask takes a bit an element: with fewer elements of the background it cannot pay.
_LEAST_BACKGROUND = 1 / 64


@dataclass(frozen=True, eq=False)
class Places:
    """Where values are scattered to.

    Attributes:
        positions: int64, ascending: of all elements that differ from the background at least.
        decoder: gives them, int32 or int64.
    """

    positions: Positions
    decoder: Step


class Scattered(Encoding):
    """What masks, Rice codes and Huffman codes of positions have in common."""

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for each way to store the values; CumSum and ScatterElements came with opset 11."""
        if site.opset < 11 or not contents.folds or not contents.shape:
            return
        # Counted first: the positions take eight bytes each.
        if not 0 < contents.differing <= contents.size * (1 - _LEAST_BACKGROUND):
            return
        base = filled(contents.background, (contents.size,))
        density = contents.differing / contents.size
        for places in self.places(contents, site):
            for values in _value_plans(_foreground(contents, places.positions), site):
                flat = step("ScatterElements", base, places.decoder, values.root)
                figures = {**values.figures, "density": density, "values": values.encoding}
                yield Plan(self.name, reshape(flat, contents.shape), figures)

    @abc.abstractmethod
    def places(self, contents: Contents, site: Site) -> Iterator[Places]:
        """The ways to code where the values go; none where this encoding is not for them."""


class Bitmask(Scattered):
    """A bit for each element, and the values where it is set."""

    name: ClassVar[str] = "bitmask"

    def places(self, contents: Contents, site: Site) -> Iterator[Places]:
        """One."""
        positions = contents.positions
        mask = RiceSize(0, int(positions[-1]) + 1, positions.size)
        yield Places(positions, _rice(contents, mask, site))


class Rice(Scattered):
    """Rice-coded gaps, and the values between them."""

    name: ClassVar[str] = "rice"

    def places(self, contents: Contents, site: Site) -> Iterator[Places]:
        """None where a mask is no longer."""
        best = best_rice(contents.positions)
        if best.parameter:
            yield Places(contents.positions, _rice(contents, best, site))


def _foreground(contents: Contents, positions: Positions) -> Contents:
    """The elements at these positions, as a vector."""
    if positions is contents.positions:
        return contents.foreground
    return Contents(contents.values.reshape(-1)[positions])


def _value_plans(foreground: Contents, site: Site) -> Iterator[Plan]:
    for encoding in _VALUES:
        if site.allows(encoding.name):
            yield from encoding.plans(foreground, site)


def _rice(contents: Contents, size: RiceSize, site: Site) -> Step:
    """The positions: int32, shape (count,)."""
    k, positions = size.parameter, contents.positions
    nbytes = (size.unary_bits + 7) // 8
    unary = Payload((nbytes,), np.dtype(np.uint8), nbytes, partial(rice_unary, positions, k))
    flags = unpack_flags(unary, site)
    places = _places_by_sum(flags, size, site) if site.strip_safe else _places(flags, size)
    if not k:
        return places
    low = unpack_codes(partial(rice_low, positions, k), size.count, k, site, offset=-((1 << k) - 1))
    return step("Add", places, running_sum(low))


def _places(flags: Step, size: RiceSize) -> Step:
    """The places of the ones, times 2^k: int32."""
    numbers = _multiples(_rounded_up(size.unary_bits), size.parameter)
    return Step("Compress", (numbers, flags), shape=(size.count,))


def _places_by_sum(flags: Step, size: RiceSize, site: Site) -> Step:
    """As `_places`, of operators whose shapes ONNX Runtime infers."""
    number = partial(Literal.of, dtype=np.int32)
    sums = running_sum(step("Cast", flags, to=INT32))
    target = step("Where", flags, step("Sub", sums, number(1)), number(size.count))
    numbers = _multiples((size.unary_bits + 7) // 8 * 8, size.parameter)
    zeros = filled(np.zeros((), np.int32), (size.count + 1,))
    return head(step("ScatterElements", zeros, target, numbers), size.count, site)


def _multiples(count: int, k: int) -> Step:
    """The first multiples of 2^k: int32, shape (count,)."""
    number = partial(Literal.of, dtype=np.int32)
    return step("Range", number(0), number(count << k), number(1 << k))


def _rounded_up(count: int) -> int:
    """At most an eighth above `count`, so that weights alike share one Range."""
    unit = 1 << max(3, count.bit_length() - 4)
    return -(-count // unit) * unit
