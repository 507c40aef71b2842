"""Codebooks of groups and of blocks, and tables of codes that all channels share."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.numerics.scaled_codebooks import scaled_codebook
from onnxslim_passes.runtime import open_session
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Plan
from onnxslim_passes.storage.contents import Contents
from tests.storage.test_encodings import SITES, Array, identity_model, price, store


def grouped(shape: tuple[int, ...], group: int, clusters: int, axis: int = 0) -> Array:
    """Values that share groups within the channels of `axis`."""
    rng = np.random.default_rng(0)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    table = rng.normal(size=(clusters, group)).astype(np.float32)
    rows = table[rng.integers(0, clusters, int(np.prod(shape)) // group)].reshape(moved)
    return np.ascontiguousarray(np.moveaxis(rows, 0, axis))


def assert_rebuilt(plan: Plan, values: Array, site: str = "opset 17") -> None:
    model = identity_model(values, SITES[site])
    store(model, plan)
    for optimize in ("none", "all"):
        with open_session(model.to_proto(), optimize=optimize) as session:
            assert session.run({})["y"].tobytes() == values.tobytes()


def plan_of(name: str, values: Array, site: str = "opset 17"):
    plans = list(ENCODINGS[name].plans(Contents(values), SITES[site]))
    return min(plans, key=lambda plan: price(plan, SITES[site]))


@settings(max_examples=12)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([3, 16, 100, 256]),
    st.sampled_from([((32, 64), 0), ((32, 64), 1), ((8, 16, 3, 3), 0), ((3, 16, 8), 2)]),
    st.sampled_from([np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8]),
    st.sampled_from(["opset 7", "opset 17", "opset 21"]),
)
def test_groups_are_rebuilt(group, clusters, place, dtype, site):
    shape, axis = place
    values = grouped(shape, group, clusters, axis)
    values = (values * 40).astype(np.int8) if dtype == np.int8 else values.astype(dtype)
    plan = plan_of("codebook-vectors", values, site)
    assert plan.figures["group"] >= group or plan.figures["clusters"] <= 256
    assert_rebuilt(plan, values, site)


def test_what_groups_take():
    values = grouped((256, 256), 4, 256)
    plan = plan_of("codebook-vectors", values)
    assert plan.figures == {"clusters": 256, "per": "tensor", "group": 4, "bits": 8}
    codes, table = values.size // 4, 256 * 4 * 4
    assert codes + table < price(plan, SITES["opset 17"]) < codes + table + 150


def test_bits_decide_what_a_group_is():
    values = grouped((16, 32), 2, 8)
    values[0, 0] = -0.0
    assert_rebuilt(plan_of("codebook-vectors", values), values)


@pytest.mark.parametrize("values", [np.zeros((3, 0), np.float32), np.ones((3, 5), np.float32)])
def test_groups_that_do_not_divide(values):
    assert not list(ENCODINGS["codebook-vectors"].plans(Contents(values), SITES["opset 17"]))


def test_ordinary_weights_have_no_groups():
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for name in ("codebook-vectors", "codebook-blocks"):
        assert not list(ENCODINGS[name].plans(Contents(values), SITES["opset 17"]))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_have_their_own_tables(axis, dtype):
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(640, 4)).astype(dtype)
    # 320 values in each of 8 channels: too many for tables of theirs.
    rows = np.take_along_axis(tables, rng.integers(0, 4, (640, 64)), 1).reshape(8, 5120)
    values = np.ascontiguousarray(np.moveaxis(rows, 0, axis))
    plans = list(ENCODINGS["codebook-blocks"].plans(Contents(values), SITES["opset 17"]))
    best = min(plans, key=lambda plan: price(plan, SITES["opset 17"]))
    assert best.figures == {"clusters": 4, "per": "block of 64", "bits": 2}
    for plan in plans:
        assert_rebuilt(plan, values)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_one_table_of_codes_for_all_channels(group):
    rng = np.random.default_rng(0)
    rows = rng.laplace(size=(64, 256)) * np.exp(rng.normal(size=(64, 1)))
    bits = 4 if group == 1 else 7
    book = scaled_codebook(rows.astype(np.float32), 1 << bits, group=group)
    values = np.ascontiguousarray(book.values(np.float32).T)
    plan = plan_of("grid", values)
    codes, scales = values.size // group * bits // 8, 64 * 2
    # As float16 where the codes are packed, as int8 for groups.
    table = 2 * group << bits
    assert price(plan, SITES["opset 17"]) < codes + scales + table + 1000
    assert_rebuilt(plan, values)
