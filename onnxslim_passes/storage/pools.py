"""Pools: several small weights in one stream, so that they pay for one decoder.

A decoder takes about a kilobyte, which is more than a small weight. The codes of several weights,
the most frequent value of each as code 0, are one long vector of int32; it is stored as any weight
is, by a mask, gaps, or Huffman codes. Each weight is a piece of it with a table of its own:

    Reshape(Gather(table, Slice(pool, [start], [stop])), shape)

Since codes are numbered by frequency, weights with other values have about the same distribution
of codes, and a common Huffman code loses little. Weights with many zeros and too many other values
for a table are pieces of a pool of values: Reshape(Slice(pool, ..)). Whether a pool is worth it,
and of which weights, is decided by bytes: of all weights up to some sizes, the pool that makes the
file smallest.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.storage.base import (
    Encoding,
    Expression,
    Literal,
    Plan,
    Site,
    Step,
    part_bytes,
    step,
    walk,
)
from onnxslim_passes.storage.choice import Offer
from onnxslim_passes.storage.contents import Contents, SharedValues
from onnxslim_passes.storage.streams import raw, reshape

Array = npt.NDArray[Any]

_MASKS = frozenset(["sparse", "bitmask", "rice", "gaps-huffman"])
# Beyond this many elements a decoder of one's own is less than a percent of the weight.
MAX_POOLED = 1 << 20
_SIZES = (1 << 12, 1 << 14, 1 << 17, MAX_POOLED)
# All together: decoding needs dozens of bytes an element, for the whole pool at once, and gets
# several times as slow where the allocator no longer reuses memory.
_MAX_POOL = 1 << 22


def pool_offers(
    chosen: Sequence[tuple[Contents, Offer]], encodings: Mapping[str, Encoding], site: Site
) -> dict[int, Offer]:
    """Offers of the pools that make the weights of one graph smallest together.

    Args:
        chosen: the weights, with what each would be without a pool.
        encodings: how a pool may be stored.
        site: of the graph.

    Returns:
        Place in `chosen` -> offer; empty if no pool pays.
    """
    pooled: dict[int, Offer] = {}
    types = dict.fromkeys(contents.dtype for contents, _ in chosen)
    for kind in (_Codes(), *map(_Values, types)):
        now = [(contents, pooled.get(at, offer)) for at, (contents, offer) in enumerate(chosen)]
        pooled |= _best_pool(kind, now, encodings, site)
    return pooled


def _best_pool(
    kind: "_Kind",
    chosen: Sequence[tuple[Contents, Offer]],
    encodings: Mapping[str, Encoding],
    site: Site,
) -> dict[int, Offer]:
    able = [
        at
        for at, (contents, offer) in enumerate(chosen)
        if contents.size <= MAX_POOLED and kind.may_join(contents, offer)
    ]
    best: dict[int, Offer] = {}
    smallest = _bytes((offer for _, offer in chosen), site) if able else 0
    tried: set[tuple[int, ...]] = set()
    for limit in _SIZES:
        members = tuple(at for at in able if chosen[at][0].size <= limit)
        if len(members) < 2 or members in tried or site.opset < 11:
            continue
        if sum(chosen[at][0].size for at in members) > _MAX_POOL:
            break
        tried.add(members)
        offers = _pooled(kind, [chosen[at][0] for at in members], encodings, site)
        pooled = dict(zip(members, offers, strict=True))
        total = _bytes((pooled.get(at, offer) for at, (_, offer) in enumerate(chosen)), site)
        if total < smallest:
            best, smallest = pooled, total
    return best


class _Kind(abc.ABC):
    """What the elements of a pool are."""

    @abc.abstractmethod
    def may_join(self, contents: Contents, offer: Offer) -> bool:
        """Whether a weight, with the offer it has, could be a piece of such a pool."""

    @abc.abstractmethod
    def elements(self, contents: Contents) -> Array:
        """What a weight brings to the pool, shape (n,)."""

    @abc.abstractmethod
    def needs(self, contents: Contents) -> float:
        """About how many bits that takes, in any unit."""

    @abc.abstractmethod
    def rebuilt(self, pool: Expression, start: int, contents: Contents) -> Step:
        """The weight again; its piece begins at `start`."""

    @abc.abstractmethod
    def figures(self, contents: Contents) -> dict[str, int | float | str]:
        """What the report shows of a weight."""


class _Codes(_Kind):
    """Codes of tables, the most frequent value of each as code 0."""

    def may_join(self, contents: Contents, offer: Offer) -> bool:
        """Weights with one table for the whole tensor, which is short for them."""
        return (
            contents.shared is not None
            and 1 < contents.shared.clusters <= contents.size // 4
            and offer.plan.figures.get("per", "tensor") == "tensor"
        )

    def elements(self, contents: Contents) -> Array:
        """The codes."""
        return _shared(contents).codes.reshape(-1).astype(np.int32)

    def needs(self, contents: Contents) -> float:
        """Their entropy."""
        return _shared(contents).entropy_bits * contents.size

    def rebuilt(self, pool: Expression, start: int, contents: Contents) -> Step:
        """The table's entries."""
        part = _slice(pool, start, start + contents.size)
        return reshape(step("Gather", raw(_shared(contents).table), part), contents.shape)

    def figures(self, contents: Contents) -> dict[str, int | float | str]:
        """The table."""
        return {"clusters": _shared(contents).clusters, "per": "tensor"}


@dataclass(frozen=True)
class _Values(_Kind):
    """Values of a type as they are, many of them zeros, which pay for one mask together."""

    dtype: np.dtype[Any]

    def may_join(self, contents: Contents, offer: Offer) -> bool:
        """Weights that would have masks of their own."""
        return contents.dtype == self.dtype and offer.plan.encoding in _MASKS

    def elements(self, contents: Contents) -> Array:
        """The values."""
        return contents.values.reshape(-1)

    def needs(self, contents: Contents) -> float:
        """The values that are not zero."""
        return contents.entries

    def rebuilt(self, pool: Expression, start: int, contents: Contents) -> Step:
        """The piece itself."""
        return reshape(_slice(pool, start, start + contents.size), contents.shape)

    def figures(self, contents: Contents) -> dict[str, int | float | str]:
        """The part that is stored."""
        return {"density": contents.entries / contents.size}


def _slice(vector: Expression, start: int, stop: int) -> Step:
    return step("Slice", vector, Literal.of([start], np.int64), Literal.of([stop], np.int64))


def _pooled(
    kind: _Kind, members: Sequence[Contents], encodings: Mapping[str, Encoding], site: Site
) -> list[Offer]:
    """The offers of weights as pieces of one stream."""
    pool = Contents(np.concatenate([kind.elements(contents) for contents in members]))
    offers = (
        Offer(plan, site)
        for name, encoding in encodings.items()
        if site.allows(name)
        for plan in encoding.plans(pool, site)
    )
    best = min(offers, key=lambda offer: offer.own_bytes)
    stream = set(walk(best.plan.root))
    shares = _shares([kind.needs(contents) for contents in members], best.own_bytes)
    pieces = []
    start = 0
    for contents, share in zip(members, shares, strict=True):
        root = kind.rebuilt(best.plan.root, start, contents)
        figures = kind.figures(contents) | {"pool": best.plan.encoding, "weights": len(members)}
        offer = Offer(Plan("pool", root, figures), site)
        offer.own_bytes = share + sum(
            part_bytes(part, site)
            for part in walk(root)
            if part not in stream and part not in offer.common
        )
        pieces.append(offer)
        start += contents.size
    return pieces


def _shares(needs: Sequence[float], total: int) -> list[int]:
    """The bytes of a pool, divided among its members by what each would need ideally."""
    parts = np.array(needs) + 1e-9
    bounds = np.rint(np.cumsum(parts) / parts.sum() * total).astype(int)
    return [int(share) for share in np.diff(bounds, prepend=0)]


def _shared(contents: Contents) -> SharedValues:
    assert contents.shared is not None  # only such weights join
    return contents.shared


def _bytes(offers: Iterable[Offer], site: Site) -> int:
    """Bytes of several offers, what they have in common counted once."""
    parts: dict[Expression, None] = {}
    kept = 0
    for offer in offers:
        if offer.in_place:
            kept += offer.own_bytes
        else:
            parts.update(dict.fromkeys(walk(offer.plan.root)))
    return kept + sum(part_bytes(part, site) for part in parts)
