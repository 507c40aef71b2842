"""fuse-scales: arithmetic in front of convolutions moves into them, around padding, too."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.fuse_scales import FuseScales
from onnxslim_passes.runtime import open_session
from tests.zoo_small import feeds, noise, parsed

# Rounding of float32 products; 100 dB is five digits.
EXACT_DB = 100.0

HEAD = "g (float[N, 4, 7, 7] x) => (float[N, 6, M, M] y)"
WEIGHTS: dict[str, Any] = {
    "w": noise(6, 4, 3, 3, seed=1),
    "b": noise(6, seed=2),
    "g": noise(6, 2, 3, 3, seed=3),
    "s": noise(1, 4, 1, 1, seed=4, scale=2.0) + np.float32(3),
    "t": noise(4, 1, 1, seed=5),
    "one": np.array([1.7], np.float32),
    "half": np.float32(0.5),
    "row": noise(7, seed=6),
}


def fuse(body: str) -> tuple[Model, Model, PassResult]:
    before = Model.from_proto(parsed(f"{HEAD} {{ {body} }}", WEIGHTS))
    after = before.copy()
    return before, after, FuseScales().apply(after, Context())


def assert_same(before: Model, after: Model) -> None:
    with open_session(before, optimize="none") as a, open_session(after, optimize="none") as b:
        assert compare_outputs(a, b, feeds(x=(2, 4, 7, 7))).sqnr_db >= EXACT_DB


@pytest.mark.parametrize(
    ("body", "left"),
    [
        pytest.param("a = Mul (x, s) y = Conv (a, w, b)", ["Conv"], id="scale"),
        pytest.param("a = Mul (one, x) c = Add (a, half) y = Conv (c, w)", ["Conv"], id="numbers"),
        pytest.param("a = Add (x, t) c = Div (a, s) y = Conv (c, w, b)", ["Conv"], id="channels"),
        pytest.param("a = Sub (x, t) y = Conv <group = 2> (a, g)", ["Conv"], id="groups"),
        pytest.param("a = Mul (x, s) y = Conv <pads = [1, 1, 1, 1]> (a, w)", ["Conv"], id="padded"),
        pytest.param(
            "a = Mul (x, s) c = Add (a, t) y = Conv <pads = [1, 1, 1, 1]> (c, w, b)",
            ["Add", "Conv"],
            id="the shift stays in front of padding",
        ),
        pytest.param(
            'a = Mul (x, one) c = Add (a, half) y = Conv <auto_pad = "SAME_UPPER"> (c, w)',
            ["Add", "Conv"],
            id="padding by name",
        ),
    ],
)
def test_fused(body: str, left: list[str]) -> None:
    before, after, result = fuse(body)
    assert result.changed
    assert sorted(node.op for node in after.nodes()) == left
    assert_same(before, after)
    assert not FuseScales().apply(after, Context()).changed


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(
            "a = Add (x, t) y = Conv <pads = [1, 1, 1, 1]> (a, w)", "padding", id="padding"
        ),
        pytest.param("a = Mul (x, row) y = Conv (a, w)", "one a channel", id="columns"),
        pytest.param(
            "a = Mul (x, s) c = Conv (a, w) d = ReduceMax (a) y = Add (c, d)",
            "other nodes",
            id="shared",
        ),
        pytest.param(
            "a = Mul (x, s) v = Mul (w, half) y = Conv (a, v)", "is computed", id="computed weight"
        ),
    ],
)
def test_what_stays_has_a_reason(body: str, reason: str) -> None:
    _, _, result = fuse(body)
    assert not result.changed
    assert reason in result.decisions[0].reason


def test_no_candidate() -> None:
    for body in ("a = Relu (x) y = Conv (a, w)", "a = Sub (half, x) y = Conv (a, w)"):
        assert fuse(body)[2].decisions == ()


def test_a_weight_of_two_convolutions_is_not_scaled_for_both() -> None:
    before, after, result = fuse("a = Mul (x, s) c = Conv (a, w) d = Conv (x, w) y = Sub (c, d)")
    assert result.changed
    assert_same(before, after)


@settings(deadline=None, max_examples=10)
@given(
    chain=st.lists(
        st.tuples(
            st.sampled_from(["Mul", "Div", "Add", "Sub"]), st.sampled_from(["s", "t", "one"])
        ),
        min_size=1,
        max_size=4,
    ),
    pads=st.sampled_from(["", "<pads = [1, 0, 0, 1]>"]),
)
def test_any_chain_gives_the_same(chain: list[tuple[str, str]], pads: str) -> None:
    steps = ["x", *(f"v{number}" for number in range(len(chain)))]
    body = " ".join(
        f"{steps[n + 1]} = {op} ({steps[n]}, {constant})" for n, (op, constant) in enumerate(chain)
    )
    before, after, _ = fuse(f"{body} y = Conv {pads} ({steps[-1]}, w, b)")
    assert_same(before, after)
