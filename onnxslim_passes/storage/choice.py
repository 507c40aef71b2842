"""Which plan for which weight: the fewest bytes, with shared parts counted once a graph.

The bytes of a plan are those of its own parts; common parts (the table that unpacks bits, a shape)
are first taken to be free, then each must earn its bytes: if the weights that use it would lose
less without it, it is dropped and they choose again.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxslim_passes.storage.base import Expression, Payload, Plan, Site, own_and_common, part_bytes


@dataclass(eq=False)
class Offer:
    """A plan with its price at one site.

    Attributes:
        plan: the plan.
        site: where.
    """

    plan: Plan
    site: Site
    common: tuple[Expression, ...] = field(init=False)
    own_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        own, common = own_and_common(self.plan.root)
        self.own_bytes = sum(part_bytes(part, self.site) for part in own)
        self.common = tuple(common)

    @property
    def in_place(self) -> bool:
        """Whether the weight stays a constant, dense or sparse, without a decoder."""
        return isinstance(self.plan.root, Payload)


@dataclass(eq=False)
class Candidate:
    """A weight with all its offers.

    Attributes:
        offers: every way to store it; the first one leaves it as it is.
        banned: common parts that are not worth their bytes.
    """

    offers: Sequence[Offer]
    banned: set[Expression] = field(default_factory=set)

    def best(self, without: Expression | None = None) -> Offer:
        """The cheapest offer, common parts free; the earlier one wins a tie."""
        allowed = (
            offer
            for offer in self.offers
            if without not in offer.common and self.banned.isdisjoint(offer.common)
        )
        return min(allowed, key=lambda offer: offer.own_bytes)


def choose(candidates: Sequence[Candidate]) -> list[Offer]:
    """The best offers for weights that stand in one graph, and therefore share common parts."""
    while True:
        chosen = [candidate.best() for candidate in candidates]
        users: dict[Expression, list[tuple[Candidate, Offer]]] = defaultdict(list)
        for candidate, offer in zip(candidates, chosen, strict=True):
            for part in offer.common:
                users[part].append((candidate, offer))
        dropped = [part for part, using in users.items() if not _earns_its_bytes(part, using)]
        if not dropped:
            return chosen
        for candidate in candidates:
            candidate.banned.update(dropped)


def common_bytes(offers: Sequence[Offer]) -> int:
    """Bytes of what offers taken in one graph share."""
    parts = {part: offer.site for offer in offers for part in offer.common}
    return sum(part_bytes(part, site) for part, site in parts.items())


def _earns_its_bytes(part: Expression, users: Sequence[tuple[Candidate, Offer]]) -> bool:
    """Whether the weights lose more without this part than it and what stands under it cost."""
    loss = sum(
        candidate.best(without=part).own_bytes - offer.own_bytes for candidate, offer in users
    )
    own, common = own_and_common(part)
    site = users[0][1].site
    return loss > sum(part_bytes(each, site) for each in (*own, *common))
