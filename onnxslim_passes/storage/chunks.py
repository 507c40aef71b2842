"""Chunks: a weight in pieces, where its decoder would make a tensor that is too large to fold.

    Reshape(Concat(piece, piece, ...), shape)

ONNX Runtime does not fold a node output of more than 1 GiB. The weight itself may be smaller, in a
type of one or two bytes, but its codes and positions are int32. Each piece, of neighbouring
elements, is a weight of its own, stored by the cheapest of the other encodings.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

from onnxslim_passes.storage.base import Encoding, Plan, Site, step
from onnxslim_passes.storage.choice import Offer
from onnxslim_passes.storage.codebook import (
    CodebookPacked,
    CodebookUint2,
    CodebookUint4,
    CodebookUint8,
)
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.dense import Dense
from onnxslim_passes.storage.fill import Fill
from onnxslim_passes.storage.gaps import GapsHuffman
from onnxslim_passes.storage.huffman import CodebookHuffman
from onnxslim_passes.storage.narrow import Narrow
from onnxslim_passes.storage.scattered import Bitmask, Rice
from onnxslim_passes.storage.streams import reshape

_PIECES: tuple[Encoding, ...] = (
    Dense(),
    Fill(),
    Narrow(),
    CodebookUint8(),
    CodebookUint4(),
    CodebookUint2(),
    CodebookPacked(),
    CodebookHuffman(),
    Bitmask(),
    Rice(),
    GapsHuffman(),
)


class Chunks(Encoding):
    """Pieces that fold each, of a weight that does not as a whole."""

    name: ClassVar[str] = "chunks"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for a weight too large for the other decoders, but not for the runtime."""
        count = contents.pieces
        if count is None or count == 1:
            return
        pieces = [_cheapest(piece, site) for piece in _cut(contents, count)]
        if all(piece.encoding == "dense" for piece in pieces):
            return
        joined = step("Concat", *(piece.root for piece in pieces), axis=0)
        figures: dict[str, int | float | str] = {
            "pieces": len(pieces),
            "values": pieces[0].encoding,
        }
        yield Plan(self.name, reshape(joined, contents.shape), figures)


def _cut(contents: Contents, count: int) -> Iterator[Contents]:
    """Pieces of whole bytes, whatever the width of codes."""
    flat = contents.values.reshape(-1)
    length = -(-contents.size // count // 8) * 8
    for start in range(0, contents.size, length):
        yield Contents(flat[start : start + length])


def _cheapest(piece: Contents, site: Site) -> Plan:
    allowed = (part for part in _PIECES if site.allows(part.name))
    offers = (Offer(plan, site) for part in allowed for plan in part.plans(piece, site))
    return min(offers, key=lambda offer: offer.own_bytes).plan
