"""Errors layer by layer, of pairs made by this package, by onnxruntime's quantizer and by hand."""

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)

from onnxslim_passes import (
    ClusterWeights,
    ConvertFloat,
    Pipeline,
    QuantizeDynamic,
    QuantizeStatic,
    Samples,
)
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.evaluation.layers import compare_layers
from onnxslim_passes.evaluation.transplant import Twins
from onnxslim_passes.model import load
from onnxslim_passes.passes.fuse_batch_norm import FuseBatchNorm
from onnxslim_passes.runtime import open_session

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[batch, 3, 12, 12] image) => (float[batch, 10] scores)
<float[16, 3, 3, 3] w1, float[16, 16, 3, 3] w2, float[16, 16, 3, 3] w3, float[16, 10] w4>
{
    [one] a1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1)
    [relu1] r1 = Relu (a1)
    [two] a2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r1, w2)
    [relu2] r2 = Relu (a2)
    [three] a3 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r2, w3)
    [sum] a4 = Add (a3, r1)
    [pool] p = GlobalAveragePool (a4)
    [flatten] f = Flatten (p)
    [head] scores = MatMul (f, w4)
}
"""


@pytest.fixture
def model():
    return load(built(MODEL))


def built(text):
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for declared in list(proto.graph.value_info):
        shape = [dim.dim_value for dim in declared.type.tensor_type.shape.dim]
        values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor = numpy_helper.from_array(values.astype(np.float32), declared.name)
        proto.graph.initializer.append(tensor)
    del proto.graph.value_info[:]
    return proto


def feeds():
    random = np.random.default_rng(1)
    return [{"image": random.standard_normal((4, 3, 12, 12), np.float32)} for _ in range(4)]


def samples():
    return Samples.from_feeds(feeds())


def compressed(model, *passes):
    return Pipeline(passes, store=False).run(model, samples=samples(), measure=False).model


def coarse(model, name, levels=8):
    """A copy in which the values of one weight are rounded to a few levels."""
    work = model.copy()
    for constant in work.constants():
        if constant.name == name:
            step = np.abs(constant.values).max() / levels
            constant.values = (np.round(constant.values / step) * step).astype(np.float32)
    return work


def of(errors, name):
    return next(layer for layer in errors.layers if layer.name == name)


@pytest.mark.parametrize(("weight", "node"), [("w1", "one"), ("w2", "two"), ("w4", "head")])
def test_one_changed_weight_is_the_only_changed_layer(model, weight, node):
    errors = compare_layers(model, coarse(model, weight), feeds)
    assert [layer.name for layer in errors.ranked()] == [node]
    assert errors.mended.after_db > 100
    at = [layer.name for layer in errors.layers].index(node)
    assert all(layer.accumulated_db > 100 for layer in errors.layers[:at])
    assert of(errors, node).accumulated_db == pytest.approx(of(errors, node).local_db, abs=0.1)


def test_figures_are_those_of_plain_runs(model):
    """The judge is ONNX Runtime on the two models by themselves."""
    candidate = coarse(model, "w2")
    errors = compare_layers(model, candidate, feeds)
    with open_session(model) as one, open_session(candidate) as other:
        expected = compare_outputs(one, other, feeds()).sqnr_db
    layer = of(errors, "two")
    assert layer.output_db == pytest.approx(expected, abs=0.01)
    assert errors.mended.before_db == pytest.approx(expected, abs=0.01)
    assert of(errors, "head").accumulated_db == pytest.approx(expected, abs=0.01)
    assert of(errors, "head").local_db == math.inf


def test_a_layer_with_a_huge_outlier_ranks_first_in_both(model):
    work = model.copy()
    weight = next(c for c in work.constants() if c.name == "w3")
    values = weight.values.copy()
    values[0, 0, 0, 0] = 60.0
    weight.values = values
    int8 = compressed(work, QuantizeStatic(per_channel=False, placement="everywhere"))
    errors = compare_layers(work, int8, feeds)
    ranked = errors.ranked()
    assert ranked[0].nodes == ("three",)
    assert min(errors.ranked(), key=lambda layer: layer.local_db).nodes == ("three",)
    assert errors.mended.layers[0].nodes == ("three",)
    assert errors.mended.after_db > errors.mended.before_db + 6


@pytest.mark.parametrize(
    "passes",
    [
        [QuantizeStatic(placement="everywhere")],
        [QuantizeStatic()],
        [QuantizeDynamic()],
        [ConvertFloat()],
    ],
    ids=lambda passes: passes[0].to_table()["name"],
)
def test_all_layers_of_the_other_model_make_that_model(model, passes):
    """Layers are a partition: with all of them moved, a hybrid is the other model."""
    candidate = compressed(model, *passes)
    twins = Twins(model, candidate)
    layers = [layer for layer in twins.layers if layer.changed]
    for base, whole in (("reference", candidate), ("candidate", model)):
        with open_session(twins.hybrid(layers, base)) as one, open_session(whole) as other:
            assert compare_outputs(other, one, feeds()).sqnr_db > 40


class Reader(CalibrationDataReader):
    def __init__(self):
        self._feeds = iter(feeds())

    def get_next(self):
        return next(self._feeds, None)


def test_files_of_another_tool(model, tmp_path):
    source, prepared, target = (tmp_path / f"{name}.onnx" for name in ("a", "b", "c"))
    model.save(source)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    errors = compare_layers(model, load(target), feeds)
    assert {"one", "two", "three", "head"} <= {layer.name for layer in errors.ranked()}
    for layer in errors.ranked():
        assert 15 < layer.local_db < 60, layer
    # It gives convolutions the names of the Relu behind, which saturation makes superfluous.
    tensors = {layer.name: layer.tensor for layer in errors.ranked()}
    assert tensors["one"] == "a1"
    assert errors.mended.after_db > errors.mended.before_db


def test_a_merged_normalization_is_no_error():
    text = MODEL.replace(
        "[relu2] r2 = Relu (a2)",
        "[norm] n2 = BatchNormalization (a2, s, b, m, v)\n    [relu2] r2 = Relu (n2)",
    ).replace(
        "float[16, 10] w4", "float[16, 10] w4, float[16] s, float[16] b, float[16] m, float[16] v"
    )
    proto = built(text)
    for tensor in proto.graph.initializer:
        if tensor.name == "v":
            values = np.abs(numpy_helper.to_array(tensor)) + 0.5
            tensor.CopyFrom(numpy_helper.from_array(values, "v"))
        if tensor.name == "s":
            tensor.CopyFrom(numpy_helper.from_array(np.linspace(3, -2, 16, dtype="f"), "s"))
    model = load(proto)
    candidate = compressed(model, FuseBatchNorm())
    errors = compare_layers(model, candidate, feeds)
    assert [layer.nodes for layer in errors.ranked()] == [("two",)]
    assert errors.ranked()[0].local_db > 90
    everywhere = QuantizeStatic(placement="everywhere")
    for passes, least in (([], 25), ([ClusterWeights(bits=2)], 2)):
        candidate = compressed(model, FuseBatchNorm(), *passes, everywhere)
        errors = compare_layers(model, candidate, feeds)
        assert of(errors, "two").tensor == "n2"
        assert all(layer.local_db > least for layer in errors.layers)


def test_a_layer_that_makes_constants_is_an_error(model):
    work = model.copy()
    for constant in work.constants():
        if constant.name == "w2":
            constant.values = np.zeros_like(constant.values)
    errors = compare_layers(model, work, feeds)
    assert [layer.nodes for layer in errors.ranked()] == [("two",)]
    assert of(errors, "two").local_db == pytest.approx(0)


def test_channels_scaled_on_purpose_are_no_error(model):
    """Equalization: what one layer multiplies, the next one divides."""
    work = model.copy()
    scale = np.geomspace(0.1, 10, 16, dtype=np.float32)
    for constant in work.constants():
        if constant.name == "w2":
            constant.values = constant.values * scale[:, None, None, None]
        if constant.name == "w3":
            constant.values = constant.values / scale[:, None, None]
    errors = compare_layers(model, work, feeds)
    assert all(layer.local_db > 90 for layer in errors.layers)
    assert [layer.nodes for layer in errors.ranked()] == [("two", "three")]


BRANCH = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[batch, 8] x, bool flag) => (float[batch, 4] y)
<float[8, 8] w1, float[8, 4] w2>
{
    [one] h = MatMul (x, w1)
    [switch] g = If (flag) <
        then_branch = a () => (float[batch, 8] t) { t = Relu (h) },
        else_branch = b () => (float[batch, 8] e) { e = Tanh (h) }
    >
    [two] y = MatMul (g, w2)
}
"""


@pytest.mark.parametrize("flag", [True, False])
def test_bodies_that_take_outer_tensors(flag):
    model = load(built(BRANCH))
    x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    errors = compare_layers(model, coarse(model, "w1"), lambda: [{"x": x, "flag": np.array(flag)}])
    assert errors.ranked()[0].name == "one"
    assert errors.mended.after_db > 100


def test_equal_models_have_no_changed_layers(model):
    errors = compare_layers(model, model.copy(), feeds)
    assert errors.ranked() == []
    assert errors.mended is None
    assert errors.falls() == []
    assert all(layer.accumulated_db > 100 for layer in errors.layers)


def test_models_of_different_opsets(model):
    newer = coarse(model, "w2")
    newer.convert_opset(20)
    errors = compare_layers(model, newer, feeds)
    assert errors.ranked()[0].name == "two"


def test_top_limits_the_layers_that_are_tried(model):
    candidate = coarse(coarse(model, "w1"), "w2", levels=4)
    errors = compare_layers(model, candidate, feeds, top=1)
    ranked = errors.ranked()
    assert [layer.name for layer in ranked] == ["two", "one"]
    assert ranked[1].output_db is None


def test_without_samples(model):
    with pytest.raises(SamplesError, match="no samples"):
        compare_layers(model, coarse(model, "w1"), list)


def test_models_with_nothing_in_common(model):
    other = load(built(BRANCH))
    with pytest.raises(UnsupportedModelError, match="no tensors of the same name"):
        Twins(model, other)


RECURRENT = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[steps, batch, 5] x) => (float[steps, 1, batch, 6] y, float[1, batch, 6] state)
<float[1, 24, 5] w, float[1, 24, 6] r>
{
    [cell] y, state = LSTM <hidden_size = 6> (x, w, r)
}
"""


def test_a_node_with_several_outputs_is_one_layer():
    model = load(built(RECURRENT))
    x = np.random.default_rng(0).standard_normal((7, 2, 5), np.float32)
    errors = compare_layers(model, coarse(model, "r"), lambda: [{"x": x}])
    assert [layer.name for layer in errors.ranked()] == ["cell"]
    assert errors.mended.after_db > 100
