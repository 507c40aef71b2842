"""Weights that nobody expects: stored right, or left as they are, never larger, never changed."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxslim_passes.numerics.bits import packed_bytes
from onnxslim_passes.numerics.huffman import WaveletMatrix, code_lengths
from onnxslim_passes.numerics.rice import (
    RiceSize,
    best_rice,
    rice_low,
    rice_positions,
    rice_unary,
)
from onnxslim_passes.numerics.wavelet_tree import Leaf, nodes, wavelet_tree
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import node_runs, open_session
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Site, framed_bytes, tensor_bytes
from onnxslim_passes.storage.contents import Contents, folding_pieces
from onnxslim_passes.storage.streams import planes_bytes
from tests.storage.test_encodings import assert_rebuilt, identity_model, store

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
NAN = np.float32(np.nan)


def with_nans(values: Array) -> Array:
    values = values.copy()
    values.reshape(-1)[::7] = NAN
    return values


BAD: dict[str, Array] = {
    "all NaN": np.full((40, 40), NAN),
    "all equal but for NaN": with_nans(np.full((40, 40), 0.25, np.float32)),
    "zeros and NaN": with_nans(np.zeros((40, 40), np.float32)),
    "NaN of two kinds": np.array([0x7FC00000, 0x7FA12345] * 800, np.uint32).view(np.float32),
    "infinities": RNG.choice(np.float32([np.inf, -np.inf, 0, 1]), (40, 40)),
    "denormals": RNG.choice(np.array([1, 2, 0x80000001, 0], np.uint32), (40, 40)).view(np.float32),
    "all zero": np.zeros((40, 40), np.float32),
    "all -0.0": np.full((40, 40), -0.0, np.float32),
    "empty": np.zeros((0, 40), np.float32),
    "one element": np.float32([[3.5]]),
    "a table larger than the weight": np.arange(32, dtype=np.float32).reshape(4, 8) / 7,
    "more values than float16 has": np.arange(70_000, dtype=np.float32).reshape(700, 100),
    "every float16 number": np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256),
    "float16 numbers beyond a table": RNG.normal(size=(64, 64)).astype(np.float16).astype("f4"),
}


@pytest.mark.parametrize("level", ["portable", "compact", "smallest"])
@pytest.mark.parametrize("name", BAD)
def test_never_larger_never_changed_never_silent(name: str, level: str) -> None:
    values = BAD[name]
    model = identity_model(values, Site(17))
    before = model.nbytes()
    result = StoreWeights(level=level, min_elements=2).apply(model, Context())
    assert model.nbytes() <= before
    assert any(decision.reason for decision in result.decisions)
    for optimize in ("none", "all"):
        rebuilt = open_session(model, optimize=optimize).run({})["y"]
        assert rebuilt.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", BAD)
def test_every_encoding_keeps_every_bit_of_them(name: str) -> None:
    assert_rebuilt(BAD[name], Site(17, functions=True))


# ---------------- chunks


CHUNKED: dict[str, Array] = {
    "few float16 values": RNG.choice(np.float16([0, 0.5, -1, 3]), (150, 64)),
    "pruned int8": np.where(
        RNG.random((96, 100)) < 0.1, RNG.integers(-127, 128, (96, 100)), 0
    ).astype(np.int8),
    "bool": RNG.random((96, 101)) < 0.5,
    "float32 just below": RNG.choice(np.float32([0.5, -1, 3]), (64, 63)),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_pieces_fold_where_the_whole_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 19_300 if name != "float32 just below" else 16_200
    values = CHUNKED[name]
    site = Site(17)
    monkeypatch.setattr("onnxslim_passes.storage.contents.FOLD_LIMIT_BYTES", limit)
    contents = Contents(values)
    assert not contents.folds
    (plan,) = ENCODINGS["chunks"].plans(contents, site)
    assert_rebuilt(values, site, [plan])
    model = identity_model(values, site)
    dense = model.nbytes()
    store(model, plan)
    assert model.nbytes() < dense
    largest = max(int(np.prod(shape)) for run in node_runs(model, {}) for shape in run.outputs)
    pieces = [run for run in node_runs(model, {}) if run.op == "Concat"]
    assert len(pieces[0].inputs) == plan.figures["pieces"] > 1
    assert largest <= max(values.size, limit // 4)
    inner = [run for run in node_runs(model, {}) if run.op in ("Cast", "CumSum", "Range")]
    assert all(int(np.prod(shape)) * 4 <= limit for run in inner for shape in run.outputs)


def test_what_folds_is_not_cut_and_what_is_too_large_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    values = CHUNKED["few float16 values"]
    assert not list(ENCODINGS["chunks"].plans(Contents(values), Site(17)))
    monkeypatch.setattr("onnxslim_passes.storage.contents.FOLD_LIMIT_BYTES", values.nbytes - 1)
    assert not list(ENCODINGS["chunks"].plans(Contents(values), Site(17)))


# ---------------- 2^31 elements, by arithmetic: nothing of that size is made

HUGE = 1 << 31


def test_sizes_of_huge_weights_are_exact() -> None:
    assert packed_bytes(HUGE, 3) == 3 << 28
    assert planes_bytes(HUGE + 1, 7) == (1 << 30) + 1 + (1 << 29) + 1 + (1 << 28) + 1
    assert RiceSize(2, 3 * HUGE, HUGE).bits == 5 * HUGE
    frame = tensor_bytes((1 << 16, 1 << 15), np.dtype(np.float32), 0, Site(17))
    # The length of the values takes 5 bytes instead of 1, and so does that of the tensor.
    assert tensor_bytes((1 << 16, 1 << 15), np.dtype(np.float32), 4 * HUGE, Site(17)) == (
        frame + 4 * HUGE + 8
    )
    assert framed_bytes(4 * HUGE) == 4 * HUGE + 6


def test_huffman_codes_of_huge_weights_are_sized() -> None:
    counts = np.array([HUGE, HUGE // 2, HUGE // 4, HUGE // 8, HUGE // 8])
    lengths = code_lengths(counts)
    assert lengths.tolist() == [1, 2, 3, 4, 4]
    bits = int((counts * lengths).sum())
    assert sum(WaveletMatrix(counts, lengths).level_sizes) - bits in range(8 * counts.size)
    tree = wavelet_tree(counts, lengths)
    assert sum(n.count * (n.bits if isinstance(n, Leaf) else 1) for n in nodes(tree)) == bits


def test_positions_beyond_2_31_come_back() -> None:
    positions = np.sort(RNG.choice(1 << 33, 500, replace=False))
    size = best_rice(positions)
    k = size.parameter
    back = rice_positions(rice_unary(positions, k), rice_low(positions, k), k)
    assert back.tolist() == positions.tolist()


@pytest.mark.parametrize(
    ("size", "itemsize", "pieces"),
    [
        (HUGE, 4, None),  # 8 GiB dense
        (HUGE, 1, None),
        (HUGE // 2, 1, 5),
        (HUGE // 4, 2, 3),
        (HUGE // 8, 4, 2),
        (HUGE // 16, 8, 1),
        (HUGE // 16, 4, 1),
    ],
)
def test_huge_weights_fold_in_pieces_or_not_at_all(
    size: int, itemsize: int, pieces: int | None
) -> None:
    assert folding_pieces(size, itemsize) == pieces
