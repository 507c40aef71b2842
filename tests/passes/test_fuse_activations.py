"""fuse-activations: HardSigmoid from its arithmetic, and a reason where it stays."""

from typing import Any

import numpy as np
import pytest

from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.fuse_activations import FuseActivations
from onnxslim_passes.runtime import open_session
from tests.zoo_small import noise, parsed

# One rounding of x / 6 + 1 / 2 instead of two: float32 has 7 digits.
EXACT_DB = 120.0

HEAD = "g (float[N, 4, 3, 3] x) => (float[N, 4, 3, 3] y)"
NUMBERS: dict[str, Any] = {
    "three": np.float32(3),
    "zero": np.float32(0),
    "six": np.float32(6),
    "sixth": np.array([1 / 6], np.float32),
    "five": np.float32(5),
}


def fuse(body: str, opset: int = 18, head: str = HEAD) -> tuple[Model, Model, PassResult]:
    before = Model.from_proto(parsed(f"{head} {{ {body} }}", NUMBERS, opset=opset))
    after = before.copy()
    return before, after, FuseActivations().apply(after, Context())


def assert_same(before: Model, after: Model) -> None:
    # Values on both sides of -3 and 3.
    feeds = [{"x": noise(2, 4, 3, 3, seed=5, scale=4.0)}]
    with open_session(before, optimize="none") as a, open_session(after, optimize="none") as b:
        assert compare_outputs(a, b, feeds).sqnr_db >= EXACT_DB


@pytest.mark.parametrize(
    ("body", "left"),
    [
        pytest.param(
            "a = Add (x, three) c = Clip (a, zero, six) m = Mul (x, c) y = Div (m, six)",
            ["HardSigmoid", "Mul"],
            id="product, then division",
        ),
        pytest.param(
            "a = Add (three, x) c = Clip (a, zero, six) d = Div (c, six) y = Mul (d, x)",
            ["HardSigmoid", "Mul"],
            id="division, then product",
        ),
        pytest.param(
            "a = Add (x, three) c = Clip (a, zero, six) m = Mul (c, x) y = Mul (sixth, m)",
            ["HardSigmoid", "Mul"],
            id="times a sixth",
        ),
        pytest.param(
            "a = Add (x, three) c = Clip (a, zero, six) y = Div (c, six)",
            ["HardSigmoid"],
            id="HardSigmoid",
        ),
        pytest.param(
            "a = Add (x, five) c = Clip (a, zero, three) y = Div (c, three)",
            ["HardSigmoid"],
            id="other numbers",
        ),
    ],
)
def test_fused(body: str, left: list[str]) -> None:
    before, after, result = fuse(body)
    assert result.changed
    assert sorted(node.op for node in after.nodes()) == left
    assert_same(before, after)
    assert not FuseActivations().apply(after, Context()).changed


def test_bounds_as_attributes() -> None:
    before, after, result = fuse(
        "a = Add (x, three) c = Clip <min = 0.0, max = 6.0> (a) y = Div (c, six)", opset=9
    )
    assert result.changed
    assert_same(before, after)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("a = Add (x, three) c = Clip (a, zero, six) y = Div (c, three)", id="1 / 2"),
        pytest.param("a = Add (x, three) c = Clip (a, zero, six) y = Div (six, c)", id="reverse"),
        pytest.param("a = Add (x, three) c = Clip (a, three, six) y = Div (c, six)", id="low end"),
        pytest.param("a = Add (x, three) c = Clip (a, zero) y = Div (c, six)", id="no high end"),
        pytest.param("a = Add (x, x) c = Clip (a, zero, six) y = Div (c, six)", id="no number"),
        pytest.param("c = Clip (x, zero, six) y = Div (c, six)", id="no shift"),
    ],
)
def test_no_candidate(body: str) -> None:
    _, _, result = fuse(body)
    assert not result.changed
    assert result.decisions == ()


def test_a_value_that_others_take_stays() -> None:
    _, _, result = fuse(
        "a = Add (x, three) c = Clip (a, zero, six) d = Div (c, six) y = Mul (d, a)"
    )
    assert not result.changed
    assert [d.reason for d in result.decisions] == [
        "another node takes a value from between its nodes"
    ]


def test_unknown_rank_stays() -> None:
    # With a number of shape (1,), HardSigmoid of a scalar would lose the axis.
    _, _, result = fuse(
        "a = Add (x, three) c = Clip (a, zero, six) y = Mul (c, sixth)",
        head="g (float x) => (float[1] y)",
    )
    assert not result.changed
    assert "rank" in result.decisions[0].reason
