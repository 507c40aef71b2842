"""placement=profile: times go to the sites they belong to, and islands that gain nothing go."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.passes import static_placement
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.placement import (
    Labels,
    Measured,
    Survey,
    measured,
    separate_islands,
    survey,
)
from onnxslim_passes.passes.placement.choice import Estimate
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.static_profile import Comparison, slower_sites
from onnxslim_passes.runtime import ProfiledGraph, open_session, optimized_graph, profile_in_turn

Array = npt.NDArray[Any]

CONV = "Conv <pads: ints = [1, 1, 1, 1]>"
# Two islands: h stands between an integer convolution and one behind float operators.
TWO_ISLANDS = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[1, 32, 16, 16] x) => (float[1, 32, 16, 16] y) {{
    h = {CONV} (x, w)
    c = HardSigmoid <alpha: float = 0.16666667> (h)
    s = Mul (h, c)
    e = Erf (s)
    k = {CONV} (e, v)
    r = Relu (k)
    y = {CONV} (r, w)
}}"""


def build(text: str = TWO_ISLANDS) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in ("w", "v"):
        values = (rng.normal(size=(32, 32, 3, 3)) * 0.1).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return Model.from_proto(proto)


FEEDS = [
    {"x": np.random.default_rng(seed).normal(size=(1, 32, 16, 16)).astype(np.float32)}
    for seed in range(4)
]


def quantize(model: Model, **options: Any) -> PassResult:
    return QuantizeStatic(**options).apply(model, Context(samples=Samples.from_feeds(FEEDS)))


def sites(model: Model) -> Survey:
    return survey(model, lambda weight: None)


# ---------------- times by site


def labelled(model: Model, insert: Callable[[Model], object] = lambda copy: None) -> Model:
    copy, labels = model.copy(), Labels(model)
    originals = labels.originals(copy)
    insert(copy)
    labels.attach(copy, originals)
    return copy


def timed(model: Model, **seconds_of: float) -> ProfiledGraph:
    """The optimized graph with made-up times by operator, 1 for those not named."""
    graph = optimized_graph(model, weights=False).graph
    return ProfiledGraph(graph, {n.name: seconds_of.get(n.op_type, 1.0) / 1e9 for n in graph.node})


def test_times_of_what_was_fused_go_with_the_layer() -> None:
    """HardSwish and Relu are parts of float convolutions, and nodes of their own in between."""
    model = build()
    found = sites(model)
    chosen = {"h", "k", "y"}
    floating = labelled(model)
    integer = labelled(model, lambda copy: quantize(copy, placement="everywhere"))
    times = measured(
        found,
        chosen,
        Labels(model),
        timed(floating, Conv=100.0),
        timed(integer, QLinearConv=10.0, HardSigmoid=3.0, Mul=5.0, QuantizeLinear=7.0),
    )
    assert {key: cost.floating for key, cost in times.sites.items()} == dict.fromkeys(chosen, 100.0)
    assert times.sites["h"].integer == 10 + 3 + 5
    assert times.sites["k"].integer == times.sites["y"].integer == 10
    # One QuantizeLinear, and at least no change of layout that float does without.
    assert times.conversions["x"] >= 7 - 1
    assert times.conversions["e"] >= 7 - 1


def test_labels_leave_a_model_that_computes_the_same() -> None:
    model = build()
    with open_session(model) as before, open_session(labelled(model)) as after:
        expected, found = before.run(FEEDS[0]), after.run(FEEDS[0])
    assert len(expected) == len(found) == 1
    np.testing.assert_array_equal(*found.values(), *expected.values())


def test_islands_end_where_float_operators_stand() -> None:
    found = sites(build())
    groups = separate_islands(found, {"h", "k", "y"})
    # A shared weight goes together: it would be stored twice.
    assert [{site.key for site in group} for group in groups] == [{"h", "k", "y"}]
    assert [{s.key for s in group} for group in separate_islands(found, {"h", "k"})] == [
        {"h"},
        {"k"},
    ]


@pytest.mark.parametrize(
    ("integer", "conversion", "slower"),
    [(30.0, 10.0, set()), (30.0, 70.0, {"h"}), (99.0, 0.0, {"h"}), (130.0, 0.0, {"h"})],
)
def test_an_island_has_to_gain_with_its_conversions(
    integer: float, conversion: float, slower: set[str]
) -> None:
    model = build()
    conversions = dict.fromkeys(("x", "h"), 0.0) | {"x": conversion}
    times = Measured(
        sites={"h": Estimate(integer=integer, floating=100.0)}, conversions=conversions
    )
    assert slower_sites(sites(model), {"h"}, times) == slower


# ---------------- the pass


class _Known:
    """In the place of what runs models: the second island loses by these times."""

    whole = Comparison(before_s=2e-3, after_s=1e-3)

    def __init__(self, work: Model, found: Survey, *_: object) -> None:
        self._found = found

    def times(self, chosen: Collection[str]) -> Measured:
        """Microseconds that are easy to find again."""
        slow = {"k", "y"}
        costs = {
            key: Estimate(integer=660e3 if key in slow else 100e3, floating=410e3) for key in chosen
        }
        names = [str(t.name) for s in self._found.sites for t in (*s.inputs, *s.outputs)]
        return Measured(sites=costs, conversions=dict.fromkeys(names, 0.0))

    def compare(self, before: Collection[str], after: Collection[str]) -> Comparison:
        """The same whatever is compared."""
        assert set(after) < set(before)
        return self.whole


class _KnownWorse(_Known):
    whole = Comparison(before_s=1e-3, after_s=2e-3)


def unshared() -> Model:
    """The two islands without a common weight."""
    proto = build().to_proto()
    proto.graph.node[-1].input[1] = "v"
    return Model.from_proto(proto)


def test_islands_that_lose_go_back_to_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_placement, "ProfiledTrial", _Known)
    model = unshared()
    result = quantize(model, placement="profile")
    check_model(model)
    by_key = {d.where: d for d in result.decisions if "measured_float_us" in d.figures}
    taken = {where: d.taken for where, d in by_key.items()}
    assert sorted(taken.values()) == [False, False, True]
    (lost, *_) = [d for d in by_key.values() if not d.taken]
    assert "float 0.410 ms, integers 0.660 ms" in lost.reason
    assert lost.figures["measured_integer_us"] == 660.0
    (whole,) = [d for d in result.decisions if d.where == "the whole graph"]
    assert whole.taken
    assert "2 nodes" in whole.reason
    assert "2.00 ms with them, 1.00 ms without; back to float" in whole.reason
    operators = [n.op_type for n in optimized_graph(model).graph.node]
    assert operators.count("QLinearConv") == 1


def test_they_stay_where_the_whole_model_does_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_placement, "ProfiledTrial", _KnownWorse)
    model, plain = unshared(), unshared()
    result = quantize(model, placement="profile")
    quantize(plain, placement="pays")
    assert model.to_proto() == plain.to_proto()
    (whole,) = [d for d in result.decisions if d.where == "the whole graph"]
    assert not whole.taken
    assert any("no gain by the profile" in d.reason for d in result.decisions if d.taken)


def test_every_quantized_site_is_measured() -> None:
    """With the runtime's own profile: which sites stay is up to this machine."""
    model = unshared()
    result = quantize(model, placement="profile")
    check_model(model)
    known = [d for d in result.decisions if "measured_float_us" in d.figures]
    assert len(known) == 3
    assert all(float(d.figures["measured_float_us"]) > 0 for d in known)
    assert all(float(d.figures["measured_integer_us"]) > 0 for d in known)
    with open_session(model) as session:
        assert np.isfinite(session.run(FEEDS[0])["y"]).all()


def test_models_are_profiled_in_turn() -> None:
    models = [labelled(build()), labelled(build(), lambda copy: quantize(copy))]
    profiles = profile_in_turn(models, FEEDS[:2], rounds=2)
    for profiled in profiles:
        assert {node.name for node in profiled.graph.node} == profiled.seconds.keys()
        assert all(0 <= seconds < 1 for seconds in profiled.seconds.values())
    kinds = [{node.op_type for node in profiled.graph.node} for profiled in profiles]
    assert "QLinearConv" not in kinds[0]
    assert "QLinearConv" in kinds[1]
