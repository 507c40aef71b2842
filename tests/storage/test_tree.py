"""Huffman codes have two forms; each is taken where it pays, and each rebuilds every bit."""

import numpy as np
import pytest

from onnxslim_passes.numerics.wavelet_tree import Leaf, Split
from onnxslim_passes.runtime import open_session, optimized_graph
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Plan, Site, Step, walk
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.tree import merged_symbols
from tests.storage.test_encodings import identity_model, store


def skewed(size: int, clusters: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.4, size), clusters) - 1
    codes[:clusters] = np.arange(clusters)
    return rng.normal(size=clusters).astype(np.float32)[codes]


def huffman(values: np.ndarray, site: Site) -> Plan:
    (plan,) = ENCODINGS["codebook-huffman"].plans(Contents(values), site)
    return plan


def functions(plan: Plan) -> set[str]:
    parts = [part for part in walk(plan.root) if isinstance(part, Step)]
    return {part.op for part in parts if part.function is not None}


@pytest.mark.parametrize("site", [Site(17, functions=True), Site(17), Site(13)])
@pytest.mark.parametrize("may_take", [0, 1e9], ids=["levels", "tree"])
@pytest.mark.parametrize("clusters", [3, 4, 9, 16, 40, 256])
def test_both_forms_rebuild_every_bit(
    clusters: int, may_take: float, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxslim_passes.storage.huffman._FASTER_MAY_TAKE", may_take)
    for size in (1001, 1600):
        values = skewed(size, clusters)
        plan = huffman(values, site)
        if site.functions and clusters > 4:
            assert functions(plan) == {"t" if may_take else "m"}
        model = identity_model(values, site)
        store(model, plan)
        proto = model.to_proto()
        rebuilt = open_session(proto, optimize="none").run({})["y"]
        assert rebuilt.tobytes() == values.tobytes()
    left = {node.op_type for node in optimized_graph(proto, level="basic").graph.node}
    assert left <= {"Identity"}


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("rare", [1, 2, 5])
@pytest.mark.parametrize("table", [4, 16])
def test_unused_bits_look_behind_short_branches(table: int, rare: int, functions: bool) -> None:
    """One rare symbol, such as an outlier, beside a table whose stream has no unused bits."""
    many, alone = Leaf(tuple(range(table)), table), Leaf((table,), rare)
    symbols = np.r_[np.arange(table), [table] * rare].astype(np.uint8)
    symbols = np.random.default_rng(0).permutation(symbols)
    site = Site(17, functions=functions)
    for root in (Split(many, alone), Split(alone, many)):
        model = identity_model(symbols, site)
        store(model, Plan("codebook-huffman", merged_symbols(root, symbols, site)))
        rebuilt = open_session(model.to_proto(), optimize="none").run({})["y"]
        assert rebuilt.tobytes() == symbols.tobytes()


def test_large_weights_have_the_form_that_loads_faster() -> None:
    site = Site(17, functions=True)
    assert functions(huffman(skewed(5_000, 16), site)) == {"m"}
    assert functions(huffman(skewed(600_000, 16), site)) == {"t"}
