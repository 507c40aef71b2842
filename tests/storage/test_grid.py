"""Grids and narrow types: rebuilt bit for bit in every type, at the price of their codes."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from onnxslim_passes.numerics.weight_formats import WeightFormat, block_layout, quantize_weight
from onnxslim_passes.storage.base import Plan, Site
from tests.storage.test_encodings import SITES, assert_rebuilt, plans, price

Array = npt.NDArray[Any]

MOMENTS = {np.int8: (-30, 9), np.uint8: (150, 30), ml_dtypes.bfloat16: (0, 1e9)}


def quantized(
    shape: tuple[int, ...], axis: int | None, block: int | None, kind: WeightFormat, dtype: Any
) -> Array:
    values = np.random.default_rng(0).laplace(0, 0.1, shape).astype(dtype)
    return quantize_weight(values, block_layout(shape, axis, block), kind)


def cheapest(values: Array, site: Site) -> Plan:
    return min(plans(values, site), key=lambda plan: price(plan, site))


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [((48, 64), 0, 16), ((64, 48), 1, 16), ((16, 12, 4, 4), 0, 32), ((2, 64, 32), 1, 8)],
)
def test_blocks_are_rebuilt(
    shape: tuple[int, ...], axis: int, block: int, dtype: Any, site: Site
) -> None:
    values = quantized(shape, axis, block, WeightFormat(4, "asymmetric", 4), dtype)
    found = [plan for plan in plans(values, site) if plan.encoding == "grid"]
    assert {plan.figures["block"] for plan in found} == {block}
    assert min(plan.figures["bits"] for plan in found) == 4
    assert_rebuilt(values, site, found)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits(bits: int, scheme: Any) -> None:
    values = quantized((256, 512), 0, 32, WeightFormat(bits, scheme, 4), np.float32)
    site = SITES["opset 17"]
    best = cheapest(values, site)
    assert_rebuilt(values, site, [best])
    # Up to 7 bits for the scale and `bits` for the zero point of each 32 codes; 3 kB of decoder.
    assert price(best, site) <= values.size * (bits + (7 + bits) / 32) / 8 + 3000


def test_channels_of_eight_bits_keep_their_axis() -> None:
    values = quantized((128, 256), 1, None, WeightFormat(8), np.float32)
    best = cheapest(values, SITES["opset 17"])
    assert (best.encoding, best.figures["block"]) == ("grid", 128)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float16, "float16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (ml_dtypes.float8_e5m2, "float8_e5m2"),
        (np.int8, "int8"),
        (np.uint8, "uint8"),
    ],
)
def test_the_shortest_type_is_found(dtype: Any, expected: str) -> None:
    mean, deviation = MOMENTS.get(dtype, (0, 1))
    drawn = np.random.default_rng(0).normal(mean, deviation, (64, 64))
    values = drawn.astype(np.float32).astype(dtype).astype(np.float32)
    site = SITES["opset 21"]
    found = [plan for plan in plans(values, site) if plan.encoding == "narrow"]
    assert [plan.figures["type"] for plan in found] == [expected]
    assert_rebuilt(values, site)


def test_other_weights_have_no_such_plans() -> None:
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    assert [plan.encoding for plan in plans(values, SITES["opset 21"])] == ["dense"]
