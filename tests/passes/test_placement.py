"""The choice of sites is the cheapest one, and ranges lose only ends that make no difference."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.model import Model
from onnxslim_passes.passes.placement import (
    CPU,
    Costs,
    Survey,
    chained,
    choose,
    estimate,
    gains,
    survey,
    without_flat_ends,
)

CHANNELS = 16

FUNCTIONS = {
    "hard swish": "a = Add(h, three) c = Clip(a, zero, six) m = Mul(h, c) y = Div(m, six)",
    "silu": "s = Sigmoid(h) y = Mul(h, s)",
    "gelu": "d = Div(h, root) e = Erf(d) a = Add(e, one) m = Mul(h, a) y = Mul(m, half)",
    "tanh": "y = Tanh(h)",
    "two results": "t = Tanh(h) s = Sigmoid(h) y = Concat <axis = 1> (t, s)",
    "linear": "m = Mul(h, three) y = Add(m, one)",
}
SCALARS = {"three": 3.0, "six": 6.0, "zero": 0.0, "one": 1.0, "half": 0.5, "root": 2**0.5}


def build(body: str) -> Model:
    """Nodes behind x and convolutions with weights w (16 channels to 16)."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, {CHANNELS}, 8, 8] x) => (float[1, C, H, W] y) {{ {body} }}"""
    )
    weights = {"w": np.ones((CHANNELS, CHANNELS, 1, 1), np.float32)}
    weights |= {name: np.float32(value) for name, value in SCALARS.items()}
    proto.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in weights.items()
    )
    model = Model.from_proto(proto)
    model.remove_unused()
    return model


# ---------------- the choice


def total_cost(found: Survey, chosen: set[str], elements: dict[str, float], costs: Costs) -> float:
    """What a choice costs, added up without any network."""
    total = 0.0
    for site in found.sites:
        cost = estimate(site, elements, costs)
        total += cost.integer if site.key in chosen else cost.floating
    makers = {t: s for s in found.sites for t in s.outputs if s.integer_output}
    for tensor in {t for site in found.sites for t in (*site.inputs, *site.outputs)}:
        takers = [site for site in found.sites if tensor in site.inputs]
        strangers = sum(node not in {s.node for s in takers} for node in set(tensor.outputs))
        made = tensor in makers and makers[tensor].key in chosen
        wanted = [site.key in chosen for site in takers]
        if made:
            borders = max(strangers, not takers) + wanted.count(False)
            total += borders * (costs.launch + elements[tensor.name] * costs.dequantize)
        elif any(wanted):
            total += costs.launch + elements[tensor.name] * costs.quantize
    return total


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from("xabcdefy"), st.floats(1, 1e6), min_size=8, max_size=8),
    st.floats(0, 3),
    st.floats(0, 1e5),
)
def test_no_other_choice_is_cheaper(
    elements: dict[str, float], conversion: float, launch: float
) -> None:
    model = build(
        "a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Add(c, b) e = Erf(c) "
        "f = Conv(d, w) y = Add(e, f)"
    )
    # A shared weight ties its users; here they are to be free.
    for node in [node for node in model.graph.nodes if node.op == "Conv"]:
        node.inputs[1] = model.graph.add_constant("w_own", node.inputs[1].values)
    costs = Costs(quantize=conversion, dequantize=conversion, launch=launch)
    found = survey(model, lambda weight: None)
    sizes = {
        t.name: elements.get(t.name, 1e4) for s in found.sites for t in (*s.inputs, *s.outputs)
    }
    chosen = choose(found, sizes, costs)
    keys = [site.key for site in found.sites]
    best = min(
        total_cost(found, {k for k, yes in zip(keys, picks, strict=True) if yes}, sizes, costs)
        for picks in itertools.product((False, True), repeat=len(keys))
    )
    # Costs become whole capacities of 2**-28 of their sum.
    assert total_cost(found, chosen, sizes, costs) <= best * (1 + 1e-4) + 1e-6


@given(
    st.dictionaries(st.sampled_from("xabcdefy"), st.floats(1, 1e6), min_size=8, max_size=8),
    st.floats(0, 3),
)
def test_a_gain_is_what_one_float_site_costs_more(
    elements: dict[str, float], conversion: float
) -> None:
    model = build(
        "a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Add(c, b) e = Erf(c) "
        "f = Conv(d, w) y = Add(e, f)"
    )
    costs = Costs(quantize=conversion, dequantize=conversion / 2)
    found = survey(model, lambda weight: None)
    sizes = {
        t.name: elements.get(t.name, 1e4) for s in found.sites for t in (*s.inputs, *s.outputs)
    }
    every = {site.key for site in found.sites}
    saved = gains(found, sizes, costs)
    assert saved.keys() == {site.key for site in found.sites if site.weight is not None}
    for key, gain in saved.items():
        more = total_cost(found, every - {key}, sizes, costs)
        less = total_cost(found, every, sizes, costs)
        assert gain == pytest.approx(more - less, abs=1e-6 * less)


@pytest.mark.parametrize(
    ("body", "inside"),
    [
        ("a = Conv(x, w) b = Conv(a, w) c = Conv(b, w) y = Erf(c)", {"b"}),
        ("a = Conv(x, w) b = Conv(a, w) c = Conv(b, w) d = Erf(b) y = Add(c, d)", set()),
        ("a = Conv(x, w) b = Erf(a) c = Conv(b, w) y = Erf(c)", set()),
    ],
)
def test_chained_sites_have_integers_on_all_sides(body: str, inside: set[str]) -> None:
    found = survey(build(body), lambda weight: None)
    keys = chained(found)
    assert {str(s.outputs[0].name) for s in found.sites if s.key in keys} == inside


def test_users_of_one_weight_go_together() -> None:
    model = build("a = Conv(x, w) e = Erf(a) y = Conv(e, w)")
    found = survey(model, lambda weight: None)
    sizes = {"x": 1e5, "a": 1e5, "e": 1e5, "y": 1e5}
    for forced in ({"a"}, {"y"}):
        assert choose(found, sizes, CPU, floating=forced) == set()
        assert choose(found, sizes, CPU, integer=forced) == {"a", "y"}


def test_what_lies_between_needs_integers_on_both_sides() -> None:
    model = build(
        "a = Conv(x, w) b = MaxPool <kernel_shape = [1, 1]> (a) c = Conv(b, w) "
        "y = MaxPool <kernel_shape = [1, 1]> (c)"
    )
    found = survey(model, lambda weight: None)
    assert [site.key for site in found.sites] == ["a", "b", "c"]


# ---------------- ranges


@settings(max_examples=30)
@given(
    low=st.floats(-40, -0.5, width=32),
    high=st.floats(0.5, 40, width=32),
    name=st.sampled_from(sorted(FUNCTIONS)),
)
def test_saturating_at_the_narrowed_range_makes_no_difference(
    low: float, high: float, name: str
) -> None:
    model = build(f"h = Conv(x, w) {FUNCTIONS[name]}")
    tensor = next(t for node in model.graph.nodes for t in node.outputs if t.name == "h")
    lo, hi = without_flat_ends(model, [tensor], {"h": (low, high)})["h"]
    assert low <= lo < hi <= high
    x = np.linspace(low, high, 2000)
    for function in REFERENCES[name]:
        room = np.ptp(function(x)) / 1024
        # A little more than promised: the ramp is float32 and has 4097 points only.
        assert np.abs(function(np.clip(x, lo, hi)) - function(x)).max() <= 1.2 * room + 1e-5


def sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return 1 / (1 + np.exp(-x))


REFERENCES: dict[str, list[Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]] = {
    "hard swish": [lambda x: x * np.clip(x + 3, 0, 6) / 6],
    "silu": [lambda x: x * sigmoid(x)],
    "gelu": [lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))],
    "tanh": [np.tanh],
    "two results": [np.tanh, sigmoid],
    "linear": [lambda x: 3 * x + 1],
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hard swish", (-3, 20)), ("silu", (-6, 20)), ("tanh", (-3.5, 3.5)), ("linear", (-20, 20))],
)
def test_flat_ends_are_cut(name: str, expected: tuple[float, float]) -> None:
    model = build(f"h = Conv(x, w) {FUNCTIONS[name]}")
    tensor = next(t for node in model.graph.nodes for t in node.outputs if t.name == "h")
    found = without_flat_ends(model, [tensor], {"h": (-20.0, 20.0)})["h"]
    np.testing.assert_allclose(found, expected, atol=1.5)


def test_a_tensor_that_others_see_keeps_its_range() -> None:
    model = build("h = Conv(x, w) t = Tanh(h) y = Concat <axis = 1> (t, h)")
    tensor = next(t for node in model.graph.nodes for t in node.outputs if t.name == "h")
    assert without_flat_ends(model, [tensor], {"h": (-20.0, 20.0)})["h"] == (-20.0, 20.0)
