"""Laws of every encoding: the runtime rebuilds each bit, and the price is the size in the file."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session, optimized_graph
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import (
    Payload,
    Plan,
    Site,
    Step,
    own_and_common,
    part_bytes,
    varint_bytes,
)
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.writer import Replacement, Writer, short_names

Array = npt.NDArray[Any]

SPECIAL = np.array([0x80000000, 0x7FC00001, 0x7FA12345, 0xFF800000, 1, 0x3F800000], np.uint32)
DTYPES = (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.bool_)
SITES = {
    "opset 7, IR 3": Site(7, ir_version=3, as_nodes=True),
    "opset 7": Site(7, ir_version=4),
    "opset 10": Site(10, ir_version=5),
    "opset 17": Site(17),
    "opset 17, functions": Site(17, functions=True),
    "opset 17, no shapes": Site(17, strip_safe=True),
    "opset 21": Site(21, ir_version=10),
    "opset 25": Site(25, ir_version=12),
}


def identity_model(values: Array, site: Site) -> Model:
    """y = w, with w an initializer."""
    weight = numpy_helper.from_array(values, "w")
    output = helper.make_tensor_value_info("y", weight.data_type, values.shape)
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output])
    if site.as_nodes:
        graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    else:
        graph.initializer.append(weight)
    opsets = [helper.make_opsetid("", site.opset)]
    return Model.from_proto(
        helper.make_model(graph, opset_imports=opsets, ir_version=site.ir_version)
    )


def plans(values: Array, site: Site) -> list[Plan]:
    contents = Contents(values)
    return [plan for each in ENCODINGS.values() for plan in each.plans(contents, site)]


def store(model: Model, plan: Plan) -> None:
    (constant,) = model.constants()
    Replacement(constant, plan.root, Writer(model, model.graph, short_names())).apply()


def price(plan: Plan, site: Site) -> int:
    own, common = own_and_common(plan.root)
    return sum(part_bytes(part, site) for part in (*own, *common))


def assert_rebuilt(values: Array, site: Site, chosen: list[Plan] | None = None) -> None:
    """Every plan (or those chosen) rebuilds `values` bit for bit, folded or run."""
    for plan in plans(values, site) if chosen is None else chosen:
        model = identity_model(values, site)
        store(model, plan)
        for optimize in ("none", "all"):
            session = open_session(model.to_proto(), optimize=optimize)
            rebuilt = session.run({})["y"]
            assert rebuilt.dtype == values.dtype
            assert rebuilt.shape == values.shape
            assert rebuilt.tobytes() == values.tobytes(), (plan.encoding, plan.figures, optimize)


@st.composite
def weights(draw: st.DrawFn) -> Array:
    """Few distinct values, every bit pattern among them, in any shape."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    clusters = draw(st.integers(1, 20))
    pattern = hnp.arrays(np.uint8, clusters * dtype.itemsize)
    table = draw(pattern).view(dtype) if dtype != np.bool_ else np.array([False, True])
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    values = table[rng.integers(0, table.size, shape)]
    zeros = rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    return np.asarray(np.where(zeros, np.zeros((), dtype), values), dtype).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(values=weights(), site=st.sampled_from(list(SITES.values())))
def test_every_encoding_rebuilds_every_bit(values: Array, site: Site) -> None:
    assert_rebuilt(values, site)


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("clusters", [1, 2, 3, 7, 16, 17, 60, 128, 200, 256])
def test_rebuilds_codes_of_every_width(clusters: int, site: Site) -> None:
    rng = np.random.default_rng(clusters)
    table = np.concatenate([SPECIAL.view(np.float32), rng.normal(size=250).astype(np.float32)])
    values = rng.permutation(np.resize(table[:clusters], 5 * 7 * 31)).reshape(5, 7, 31)
    widths = {plan.figures["bits"] for plan in plans(values, site) if "bits" in plan.figures}
    assert {8, min(8, max(1, (clusters - 1).bit_length()))} <= widths
    assert_rebuilt(values, site)


@pytest.mark.parametrize("strip_safe", [False, True])
@pytest.mark.parametrize("background", [0, -0.0, 7])
@pytest.mark.parametrize("density", [0.0001, 0.004, 0.08, 0.3, 0.6])
def test_masks_and_gaps_of_every_density(
    density: float, background: float, strip_safe: bool
) -> None:
    rng = np.random.default_rng(0)
    values = np.full(30_000, background, np.float32)
    at = rng.choice(values.size, int(density * values.size), replace=False)
    values[at] = rng.integers(1, 6, at.size) * np.float32(0.37)
    site = Site(17, strip_safe=strip_safe)
    values = values.reshape(3, 100, 100)
    made = [plan for plan in plans(values, site) if "density" in plan.figures]
    assert_rebuilt(values, site, made)
    best: dict[str, int] = {}
    for plan in made:
        cost = price(plan, site)
        best[plan.encoding] = min(cost, best.get(plan.encoding, cost))
    p = at.size / values.size
    mask_bits = values.size * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    bound = (mask_bits + at.size * np.log2(5)) / 8
    # The longest decoder takes 1,620 bytes; 3-bit codes of 5 values lose 0.68 bits.
    assert min(best["bitmask"], best.get("rice", 1 << 30)) <= 1.04 * bound + at.size * 0.1 + 1620
    assert ("rice" in best) == (density < 0.35)


@pytest.mark.parametrize("site", ["opset 17", "opset 17, functions", "opset 17, no shapes"])
@pytest.mark.parametrize(
    ("columns", "full", "density"),
    [(400, 60, 0.4), (40, 20, 0.6), (60_000, 9, 0.9)],
    ids=["clumps", "no long gaps", "gaps that are cut"],
)
def test_gaps_of_clumps(columns: int, full: int, density: float, site: str) -> None:
    rng = np.random.default_rng(0)
    mask = (rng.random((240_000 // columns, columns)) < density) & (np.arange(columns) < full)
    values = mask * rng.integers(1, 6, mask.shape) * np.float32(0.37)
    made = [plan for plan in plans(values, SITES[site]) if "density" in plan.figures]
    found = {each.encoding: price(each, SITES[site]) for each in made}
    assert found["gaps-huffman"] < min(found["rice"], found["bitmask"]) + 1600
    assert_rebuilt(values, SITES[site], [each for each in made if each.encoding == "gaps-huffman"])


@pytest.mark.parametrize("size", [3000, 300_000], ids=["matrix", "tree"])
def test_a_table_that_counts_is_not_in_the_file(size: int) -> None:
    shares = 0.6 ** np.arange(1, 10)
    rng = np.random.default_rng(0)
    values = rng.choice(np.arange(1, 10, dtype=np.int32), size, p=shares / shares.sum())
    site = SITES["opset 17, functions"]
    (plan,) = ENCODINGS["codebook-huffman"].plans(Contents(values), site)
    own, _ = own_and_common(plan.root)
    assert isinstance(plan.root, Step)
    assert plan.root.op == ("Sub" if size == 3000 else "Add")
    assert not any(isinstance(part, Payload) and part.shape == (9,) for part in own)
    assert_rebuilt(values, site, [plan])


@pytest.mark.parametrize("site", [SITES["opset 17"], SITES["opset 21"]], ids=["17", "21"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize(("shape", "axis"), [
    ((12, 64), 0), ((64, 12), 1), ((12, 4, 4, 4), 0), ((8, 12, 4, 4), 1), ((4, 16, 12), 2),
])  # fmt: skip
def test_rebuilds_a_codebook_per_channel(
    shape: tuple[int, ...], axis: int, dtype: npt.DTypeLike, site: Site
) -> None:
    rng = np.random.default_rng(3)
    rows = np.stack([rng.permutation(np.arange(5) + 10 * c) for c in range(12)]).astype(dtype)
    codes = rng.integers(0, 5, (12, int(np.prod(shape)) // 12))
    values = np.take_along_axis(rows, codes, 1)
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    values = np.ascontiguousarray(np.moveaxis(values.reshape(moved), 0, axis))
    found = [plan for plan in plans(values, site) if plan.figures.get("per") == "channel"]
    assert any(plan.figures["bits"] == 3 and plan.figures["clusters"] == 5 for plan in found)
    assert_rebuilt(values, site)


@pytest.mark.parametrize("dtype", [
    np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16,
    np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_,
])  # fmt: skip
def test_every_type_folds(dtype: npt.DTypeLike) -> None:
    values = np.random.default_rng(0).integers(0, 2, (16, 24)).astype(dtype)
    site = SITES["opset 21"]
    for plan in plans(values, site):
        model = identity_model(values, site)
        store(model, plan)
        left = [
            node.op_type for node in optimized_graph(model.to_proto(), level="basic").graph.node
        ]
        assert set(left) <= {"Identity"}, (plan.encoding, left)


@settings(deadline=None, max_examples=60)
@given(values=weights(), site=st.sampled_from(list(SITES.values())))
def test_prices_are_the_bytes_of_the_file(values: Array, site: Site) -> None:
    dense, *others = plans(values, site)
    before = identity_model(values, site).to_proto().ByteSize()
    for plan in others:
        model = identity_model(values, site)
        store(model, plan)
        saved = before - model.to_proto().ByteSize()
        # Assumed are two-letter names where the first ones have one letter; the lengths of
        # the frames around (node, graph, function) may take a byte more or less each. A Constant
        # node has its name twice.
        leaf = 2 if site.as_nodes else 1
        names = sum(1 + len(p.inputs) if isinstance(p, Step) else leaf for p in _parts(plan))
        assert 0 <= saved - (price(dense, site) - price(plan, site)) <= names + 8, plan.encoding


def _parts(plan: Plan) -> list[Any]:
    own, common = own_and_common(plan.root)
    return [*own, *common]


@given(st.integers(0, 2**63 - 1))
def test_varint_bytes(value: int) -> None:
    tensor = onnx.TensorProto()
    tensor.int64_data.append(value)
    assert varint_bytes(value) == len(tensor.SerializeToString()) - 2


def test_negative_zero_counts_as_a_value() -> None:
    values = np.zeros((40, 40), np.float32)
    values[3, 5] = -0.0
    (plan,) = ENCODINGS["sparse"].plans(Contents(values), SITES["opset 17"])
    assert isinstance(plan.root, Payload)
    assert plan.root.entries == 1


def test_functions_and_old_files_get_no_sparse_initializers() -> None:
    values = np.eye(50, dtype=np.float32)
    for site in (Site(17, as_nodes=True), Site(17, ir_version=5)):
        assert not any("sparse" in plan.encoding for plan in plans(values, site))


def test_shared_tables_are_one_part() -> None:
    rng = np.random.default_rng(0)
    site = SITES["opset 17"]
    roots = []
    for _ in range(2):
        contents = Contents(rng.integers(0, 16, (64, 64)).astype(np.float32))
        roots.append(next(iter(ENCODINGS["codebook-packed"].plans(contents, site))).root)
    first, second = (set(own_and_common(root)[1]) for root in roots)
    assert first == second
    assert any(isinstance(part, Step) and part.op == "Mod" for part in first)


def test_a_weight_too_large_to_fold_gets_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim_passes.storage.contents.FOLD_LIMIT_BYTES", 1000)
    values = np.zeros((16, 16), np.float32)
    assert {plan.encoding for plan in plans(values, SITES["opset 21"])} == {"dense", "sparse"}


def test_short_names_are_short_and_unique() -> None:
    names = list(itertools.islice(short_names(), 4000))
    assert len(set(names)) == len(names)
    assert [len(name) for name in names] == sorted(len(name) for name in names)
    assert len(names[51]) == 1
    assert len(names[52]) == 2
