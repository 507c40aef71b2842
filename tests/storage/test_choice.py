"""Shared parts are paid once, and only where they earn their bytes."""

import numpy as np
import pytest

from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Site
from onnxslim_passes.storage.choice import Candidate, Offer, choose, common_bytes
from onnxslim_passes.storage.contents import Contents

# Before opset 11 the table that unpacks bits is written out: 2 kB for single bits.
OLD = Site(7, ir_version=5)


def candidate(seed: int, size: int) -> Candidate:
    contents = Contents(np.random.default_rng(seed).integers(0, 2, size).astype(np.float32))
    names = ("dense", "codebook-packed")
    plans = [plan for name in names for plan in ENCODINGS[name].plans(contents, OLD)]
    return Candidate([Offer(plan, OLD) for plan in plans])


@pytest.mark.parametrize(("count", "packed"), [(1, 0), (2, 0), (6, 6)])
def test_a_table_must_earn_its_bytes(count: int, packed: int) -> None:
    # Each weight of 300 elements saves about 1 kB with single bits, if the table were free.
    chosen = choose([candidate(seed, 300) for seed in range(count)])
    assert sum(offer.plan.encoding == "codebook-packed" for offer in chosen) == packed
    assert (common_bytes(chosen) > 2048) == bool(packed)


def test_without_shared_parts_the_cheapest_wins() -> None:
    (offer,) = choose([candidate(0, 10_000)])
    assert offer.plan.encoding == "codebook-packed"
    assert offer.own_bytes < 10_000 // 8 + 200
