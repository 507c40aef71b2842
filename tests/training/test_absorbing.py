"""Affine maps behind convolutions: the same loss and gradients, with fewer passes over activations.

The gradients are held against those of the graph as it was, whose rules have checks of their own.
"""

import numpy as np
import pytest

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training import Emitter, gradients, lower
from onnxslim_passes.training.absorbing import absorb_affine
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build
from tests.training.nets import with_weights

HEAD = '<ir_version: 9, opset_import: ["" : 18]>\n'
NORM = "float[4] s, float[4] b, float[4] m, float[4] v"
IMAGE = "net (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)"

CASES = {
    "2-D": f"""net (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y) <float[4, 3, 3, 3] w, {NORM}>
        {{ c = Conv (x, w) y = BatchNormalization (c, s, b, m, v) }}""",
    "1-D with bias": f"""net (float[N, 3, 9] x) => (float[N, 4, 9] y)
        <float[4, 3, 3] w, float[4] w_bias, {NORM}>
        {{ c = Conv <pads = [1, 1]> (x, w, w_bias)
           y = BatchNormalization <epsilon = 0.1> (c, s, b, m, v) }}""",
    "3-D": f"""net (float[N, 2, 4, 4, 4] x) => (float[N, 4, 2, 2, 2] y)
        <float[4, 2, 3, 3, 3] w, {NORM}>
        {{ c = Conv <strides = [2, 2, 2], pads = [1, 1, 1, 1, 1, 1]> (x, w)
           y = BatchNormalization (c, s, b, m, v) }}""",
    "depthwise": f"""{IMAGE} <float[4, 1, 3, 3] w, {NORM}>
        {{ c = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w)
           y = BatchNormalization (c, s, b, m, v) }}""",
    "Mul and Add": f"""{IMAGE}
        <float[4, 4, 1, 1] w, float[4, 1, 1] s, float[1, 4, 1, 1] b>
        {{ c = Conv (x, w) d = Mul (s, c) y = Add (d, b) }}""",
    "constants shared": f"""{IMAGE} <float[4, 4, 1, 1] w, float[4, 4, 1, 1] u, {NORM}>
        {{ c = Conv (x, w) d = BatchNormalization (c, s, b, m, v) e = Relu (d)
           f = Conv (e, u) y = BatchNormalization (f, s, b, m, v) }}""",
    "weight shared": f"""{IMAGE} <float[4, 4, 1, 1] w, {NORM}>
        {{ c = Conv (x, w) d = BatchNormalization (c, s, b, m, v) y = Conv (d, w) }}""",
}  # fmt: skip

KEPT = {
    "read elsewhere": f"""{IMAGE} <float[4, 4, 1, 1] w, {NORM}>
        {{ c = Conv (x, w) d = BatchNormalization (c, s, b, m, v) y = Add (d, c) }}""",
    "squared": f"{IMAGE} <float[4, 4, 1, 1] w> {{ c = Conv (x, w) y = Mul (c, c) }}",
    "by place": f"""{IMAGE} <float[4, 4, 1, 1] w, float[6, 6] s>
        {{ c = Conv (x, w) y = Mul (c, s) }}""",
}


def model_of(text, **values):
    values.setdefault("v", np.linspace(0.5, 2, 4))
    return Model.from_proto(with_weights(HEAD + text, **values))


def differentiated(model, *, absorbing, held=()):
    """A graph of the output and its gradients by every weight but those held, and its operators."""
    lowered = lower(model).model
    emit = Emitter(lowered)
    weights = [c for c in list(lowered.constants()) if c.name not in ("m", "v", *held)]
    feed = {str(c.name): np.array(c.values) for c in weights}
    for weight in weights:
        emit.promote(weight)
    tensors = {str(t.name): t for t in lowered.graph.inputs}
    (out,) = lowered.graph.outputs
    # A weight for each element, so that nothing cancels; no matter the size of the batch.
    loss = emit.reduce_sum(emit.mul(out, emit.op("Sin", out)))
    lowered.graph.outputs = []
    if absorbing:
        absorb_affine(emit)
    lowered.graph.outputs = [loss]
    lowered.remove_unused()
    operators = [node.op for node in lowered.graph.nodes]
    found = gradients(emit, loss, [tensors[name] for name in ("x", *feed)])
    for name in ("x", *feed):
        emit.output(found[tensors[name]], f"d {name}")
    shape = [2, *tensors["x"].shape[1:]]
    feed["x"] = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    with open_session(lowered) as session:
        return session.run(feed), operators


def assert_same(model, held=()):
    wanted, before = differentiated(model, absorbing=False, held=held)
    found, after = differentiated(model, absorbing=True, held=held)
    for (name, value), other in zip(wanted.items(), found.values(), strict=True):
        # Float32 sums in another order.
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(other, value, atol=2e-5 * scale, rtol=1e-4, err_msg=name)
    return before, after


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_stay(name):
    before, after = assert_same(model_of(CASES[name]))
    assert "BatchNormalization" in before or name == "Mul and Add"
    assert "BatchNormalization" not in after
    assert after.count("Conv") == before.count("Conv")


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_map_of_the_channels_alone_stays(name):
    before, after = assert_same(model_of(KEPT[name]))
    assert after == before


def test_a_scale_of_0_keeps_its_gradient():
    model = model_of(CASES["2-D"], s=[0, 1, 0, -1])
    assert_same(model)
    found, _ = differentiated(model, absorbing=True)
    assert np.all(found["d s"] != 0)
    assert not found["d w"][[0, 2]].any()


def test_behind_a_frozen_weight_only_frozen_maps_are_taken_in():
    # Otherwise the scale's gradient would cost that of the weight, which nobody asked for.
    model = model_of(CASES["2-D"])
    _, after = assert_same(model, held=("w",))
    assert "BatchNormalization" in after
    _, after = assert_same(model, held=("w", "s", "b"))
    assert "BatchNormalization" not in after


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_only_frozen_statistics_go_into_weights(statistics):
    program = build(
        model_of(CASES["2-D"]),
        objective=Objective(loss="mse"),
        update=Update(),
        parameters=Parameters(batch_norm=statistics),
    )
    (conv,) = (node for node in program.training.nodes() if node.op == "Conv")
    behind = {reader.op for reader in conv.outputs[0].outputs}
    assert ("BatchNormalization" in behind) == (statistics == "batch")


def test_a_bias_input_that_is_empty_is_none():
    proto = with_weights(HEAD + CASES["2-D"], v=np.linspace(0.5, 2, 4))
    proto.graph.node[0].input.append("")
    _, after = assert_same(Model.from_proto(proto))
    assert "BatchNormalization" not in after
