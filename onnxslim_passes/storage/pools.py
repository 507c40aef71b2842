"""Pools: several small weights in one stream, so that they pay for one decoder.

A decoder takes about a kilobyte, which is more than a small weight. The codes of several weights,
the most frequent value of each as code 0, are one long vector of int32; it is stored as any weight
is, by a mask, gaps, or Huffman codes. Each weight is a piece of it with a table of its own:

    Reshape(Gather(table, Slice(pool, [start], [stop])), shape)

Since codes are numbered by frequency, weights with other values have about the same distribution
of codes, and a common Huffman code loses little. Whether a pool is worth it, and of which weights,
is decided by bytes: of all weights up to some sizes, the pool that makes the file smallest.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

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

# Beyond this many elements a decoder of one's own is less than a percent of the weight.
MAX_POOLED = 1 << 20
_SIZES = (1 << 12, 1 << 14, 1 << 17, MAX_POOLED)
# All together: decoding needs dozens of bytes an element, for the whole pool at once, and gets
# several times as slow where the allocator no longer reuses memory.
_MAX_POOL = 1 << 22


def pool_offers(
    chosen: Sequence[tuple[Contents, Offer]], encodings: Mapping[str, Encoding], site: Site
) -> dict[int, Offer]:
    """Offers of the pool that makes the weights of one graph smallest together.

    Args:
        chosen: the weights, with what each would be without a pool.
        encodings: how the pool may be stored.
        site: of the graph.

    Returns:
        Place in `chosen` -> offer; empty if no pool pays.
    """
    able = [at for at, (contents, offer) in enumerate(chosen) if _may_join(contents, offer)]
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
        offers = _pooled([chosen[at][0] for at in members], encodings, site)
        pooled = dict(zip(members, offers, strict=True))
        total = _bytes((pooled.get(at, offer) for at, (_, offer) in enumerate(chosen)), site)
        if total < smallest:
            best, smallest = pooled, total
    return best


def _may_join(contents: Contents, offer: Offer) -> bool:
    """Weights that are codes of one table for the whole tensor, a table that is short for them."""
    return (
        contents.size <= MAX_POOLED
        and contents.shared is not None
        and 1 < contents.shared.clusters <= contents.size // 4
        and offer.plan.figures.get("per", "tensor") == "tensor"
    )


def _pooled(
    members: Sequence[Contents], encodings: Mapping[str, Encoding], site: Site
) -> list[Offer]:
    """The offers of weights as pieces of one stream."""
    tables = [_shared(contents) for contents in members]
    pool = Contents(np.concatenate([shared.codes.reshape(-1) for shared in tables], dtype=np.int32))
    offers = (
        Offer(plan, site)
        for name, encoding in encodings.items()
        if site.allows(name)
        for plan in encoding.plans(pool, site)
    )
    best = min(offers, key=lambda offer: offer.own_bytes)
    shares = _shares(members, best.own_bytes)
    pieces = []
    start = 0
    for contents, shared, share in zip(members, tables, shares, strict=True):
        stop = start + contents.size
        root = _piece(best.plan.root, start, stop, shared, contents)
        figures: dict[str, int | float | str] = {
            "clusters": shared.clusters,
            "per": "tensor",
            "pool": best.plan.encoding,
            "weights": len(members),
        }
        offer = Offer(Plan("pool", root, figures), site)
        stream = set(walk(best.plan.root))
        offer.own_bytes = share + sum(
            part_bytes(part, site)
            for part in walk(root)
            if part not in stream and part not in offer.common
        )
        pieces.append(offer)
        start = stop
    return pieces


def _piece(
    codes: Expression, start: int, stop: int, shared: SharedValues, contents: Contents
) -> Step:
    part = step("Slice", codes, Literal.of([start], np.int64), Literal.of([stop], np.int64))
    return reshape(step("Gather", raw(shared.table), part), contents.shape)


def _shares(members: Sequence[Contents], total: int) -> list[int]:
    """The bytes of a pool, divided among its members by what each would need ideally."""
    needs = np.array([_shared(m).entropy_bits * m.size for m in members]) + 1e-9
    bounds = np.rint(np.cumsum(needs) / needs.sum() * total).astype(int)
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
