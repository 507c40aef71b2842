"""quantize-static: 16-bit activations, and other formats for some nodes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Constant, Model, check_model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.static_schemes import StaticOverride
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


WEIGHTS = {
    "w1": noise(16, 16, 3, 3, seed=1),
    "w2": noise(16, 16, 3, 3, seed=2),
    "w3": noise(16, 16, 3, 3, seed=3),
    "b1": noise(16, seed=4),
}


def chain(opset: int = 13) -> Model:
    """Three convolutions in a row, and a Softmax."""
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[N, 16, 12, 12] x) => (float[N, 16, 12, 12] y) {{
        a = Conv <pads: ints = [1, 1, 1, 1]> (x, w1, b1)
        b = Conv <pads: ints = [1, 1, 1, 1]> (a, w2)
        c = Conv <pads: ints = [1, 1, 1, 1]> (b, w3)
        y = Softmax (c)
    }}""")
    for node, name in zip(proto.graph.node, ("one", "two", "three", "last"), strict=True):
        node.name = name
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in WEIGHTS.items())
    return Model.from_proto(proto)


FEEDS = [{"x": noise(2, 16, 12, 12, seed=seed, scale=1.0)} for seed in range(3)]


def quantize(model: Model, **options: Any) -> PassResult:
    options = {"placement": "everywhere", **options}
    return QuantizeStatic(**options).apply(model, Context(samples=Samples.from_feeds(FEEDS)))


def sqnr(model: Model) -> float:
    check_model(model)
    with open_session(chain()) as reference, open_session(model) as candidate:
        return compare_outputs(reference, candidate, FEEDS).sqnr_db


def types_around(model: Model, name: str) -> tuple[list[str], list[str]]:
    """The types of the last pair in front of a node, and of those behind it."""

    def code(node: Any) -> str:
        zero = node.inputs[2]
        assert isinstance(zero, Constant)
        return str(zero.dtype)

    node = model.graph.node(name)
    maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    front = [code(maker)] if maker is not None and maker.op == "DequantizeLinear" else []
    return front, [code(t) for t in node.outputs[0].outputs if t.op == "QuantizeLinear"]


def wide(*nodes: str) -> tuple[StaticOverride, ...]:
    return tuple(StaticOverride(nodes=name, activations="uint16") for name in nodes)


@pytest.mark.parametrize("placement", ["everywhere", "pays"])
def test_named_nodes_have_16_bits_and_others_stay_on_integers(placement: str) -> None:
    model = chain()
    result = quantize(model, overrides=wide("two"), placement=placement)
    decisions = {decision.where: decision for decision in result.decisions}
    assert "uint16 activations; ONNX Runtime has no 16-bit kernels" in decisions["two"].reason
    assert decisions["two"].taken
    # What an 8-bit kernel makes has 8 bits; 16 are put behind it, and 8 again behind those.
    assert types_around(model, "one") == (["uint8"], ["uint8"])
    assert types_around(model, "two") == (["uint16"], ["uint16"])
    assert types_around(model, "three") == (["uint8"], ["uint8"])
    assert model.opset == 21
    kernels = [node.op_type for node in optimized_graph(model, weights=False).graph.node]
    assert kernels.count("QLinearConv") == 2
    assert kernels.count("Conv") + kernels.count("FusedConv") == 1
    assert sqnr(model) > 30


def test_16_bits_everywhere_round_the_weights_alone() -> None:
    narrow, model, weights = chain(), chain(), chain()
    quantize(narrow)
    quantize(model, activations="uint16")
    for constant in weights.constants():
        if constant.name.startswith("w"):
            scale = np.abs(constant.values).max(axis=(1, 2, 3), keepdims=True) / 127
            constant.values = np.rint(constant.values / scale) * scale
    assert sqnr(model) > sqnr(narrow) + 1
    assert sqnr(model) == pytest.approx(sqnr(weights), abs=0.5)


def test_placement_pays_writes_no_16_bits_unless_a_node_is_named() -> None:
    model = chain()
    result = quantize(model, activations="int16", placement="pays")
    assert not result.changed
    reasons = {decision.where: decision.reason for decision in result.decisions}
    assert "no 16-bit kernels on CPU" in reasons["two"]


@pytest.mark.parametrize("observer", ["min-max", "percentile", "entropy", "mse"])
def test_observers_know_how_many_codes_there_are(observer: str) -> None:
    model = chain()
    quantize(model, activations="int16", symmetric=True, observer=observer)
    # Without clipping to speak of, the weights' rounding is what is left.
    assert sqnr(model) > 35
    zeros = [n.inputs[2].values for n in model.graph.nodes if n.op == "QuantizeLinear"]
    assert not any(zero.any() for zero in zeros)


def test_one_weight_may_have_another_type_and_one_scale() -> None:
    model = chain()
    overrides = (
        StaticOverride(nodes="w2", weights="uint8", per_channel=False),
        StaticOverride(nodes="t*", symmetric=True),
    )
    result = quantize(model, overrides=overrides)
    reasons = {decision.where: decision.reason for decision in result.decisions}
    assert reasons["two"].startswith("uint8 weights per tensor, uint8 activations")
    assert reasons["three"].startswith("int8 weights per channel, uint8 activations")
    scale = model.graph.node("two").inputs[1].inputs[0].inputs[1]
    assert scale.size == 1
    pairs = [node for node in model.graph.nodes if node.op == "QuantizeLinear"]
    middles = sum(int(node.inputs[2].values) == 128 for node in pairs)
    assert middles >= 2
    assert sqnr(model) > 25


def test_per_channel_of_one_node_brings_its_opset() -> None:
    model = chain(opset=11)
    override = StaticOverride(nodes="three", per_channel=True)
    quantize(model, per_channel=False, overrides=(override,))
    assert model.opset == 13
    assert model.graph.node("three").inputs[1].inputs[0].inputs[1].size == 16
    assert model.graph.node("one").inputs[1].inputs[0].inputs[1].size == 1


def test_every_tensor_has_its_makers_format() -> None:
    model = chain()
    quantize(model, placement="all", overrides=wide("last", "three"))
    assert types_around(model, "two") == (["uint8"], ["uint8"])
    assert types_around(model, "three")[1] == ["uint16"]
    assert types_around(model, "last") == (["uint16"], ["uint16"])
    assert sqnr(model) > 25


def test_names_that_do_nothing_are_said() -> None:
    with pytest.raises(UnknownNameError, match=r"`overrides`: 'thre'\. Did you mean 'three'\?"):
        quantize(chain(), overrides=wide("thre"))
    result = quantize(chain(), overrides=wide("last"))
    (idle,) = [decision for decision in result.decisions if decision.where == "last"]
    assert not idle.taken
    assert "nothing that it matches could run on integers" in idle.reason


def test_16_bits_survive_saving_and_a_second_run() -> None:
    model = chain()
    quantize(model, activations="uint16", overrides=())
    reread = Model.from_proto(onnx.load_from_string(model.to_proto().SerializeToString()))
    assert not quantize(reread, activations="uint16").changed
    zero_types = {
        t.data_type for t in model.to_proto().graph.initializer if t.name.endswith("zero_point")
    }
    assert TensorProto.UINT16 in zero_types
