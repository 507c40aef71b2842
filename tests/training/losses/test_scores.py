"""What a loss is on."""

import numpy as np
import onnx
import pytest

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter, lower
from onnxslim_passes.training.losses.scores import class_axis, find_output, find_scores
from tests.training.nets import ENDING, mlp, with_weights

OLD = """
<ir_version: 7, opset_import: ["" : 12]>
net (float[N, T, 4] x) => (float[N, T, 3] y) <float[4, 3] w>
{ z = MatMul (x, w)
  y = Softmax <axis = AXIS> (z) }
"""
CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 18, "ai.onnx.ml" : 1]>
net (float[N, 4] x) => (int64[N] label, float[N, 3] probability) <float[4, 3] w, int64[3] classes>
{ z = MatMul (x, w)
  probability = Softmax <axis = 1> (z)
  best = ArgMax <axis = 1> (probability)
  chosen = ai.onnx.ml.ArrayFeatureExtractor (classes, best)
  shape = Constant <value_ints = [-1]> ()
  label = Reshape (chosen, shape) }
"""


def scores_of(model, output=None):
    emit = Emitter(lower(model).model)
    return emit, find_scores(emit, find_output(emit.graph, output))


@pytest.mark.parametrize(("text", "kind"), [("softmax", "softmax"), ("sigmoid", "sigmoid")])
def test_a_final_activation_is_passed_by(text, kind):
    _, scores = scores_of(mlp(ENDING[text]))
    assert (scores.tensor.name, scores.kind) == ("z", kind)
    assert "the logits in front of the final" in scores.decisions[0].reason


def test_without_one_the_output_is_meant():
    _, scores = scores_of(mlp())
    assert scores.tensor is scores.output
    assert not scores.decisions


def test_a_softmax_of_an_old_opset_is_found_behind_its_conversion():
    emit, scores = scores_of(Model.from_proto(with_weights(OLD.replace("AXIS", "2"))))
    assert (scores.tensor.name, class_axis(emit, scores, None)) == ("z", 2)
    # Over two axes at once it is no distribution over classes.
    _, scores = scores_of(Model.from_proto(with_weights(OLD.replace("AXIS", "1"))))
    assert scores.kind == "logits"


def test_the_scores_behind_a_classifiers_labels_are_meant():
    model = Model.from_proto(with_weights(CLASSIFIER, classes=np.arange(3)))
    _, scores = scores_of(model)
    assert scores.tensor.name == "z"


def test_outputs_that_are_no_numbers_are_refused():
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (int64[1] y) { y = Shape (x) }'
    )
    with pytest.raises(UnsupportedModelError, match="None of the outputs \\('y'\\)"):
        scores_of(Model.from_proto(onnx.parser.parse_model(text)))


@pytest.mark.parametrize(("shape", "axis"), [("N, 3", 1), ("N, T, 3", 2), ("N, 3, 5, 5", 1)])
def test_classes_are_where_they_usually_are(shape, axis):
    text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[{shape}] x) => (float[{shape}] y)'
    emit, scores = scores_of(Model.from_proto(onnx.parser.parse_model(text + "{ y = Neg (x) }")))
    assert class_axis(emit, scores, None) == axis
    assert class_axis(emit, scores, 0) == 0
    with pytest.raises(UnsupportedModelError, match="class_axis=9"):
        class_axis(emit, scores, 9)


def test_integers_stand_for_the_numbers_before_they_were_rounded():
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    net (float[N, 4] x) => (uint8[N, 3] q) <float[4, 3] w, float s>
    { y = MatMul (x, w)
      r = QuantizeLinear (y, s)
      shape = Constant <value_ints = [-1, 3]> ()
      q = Reshape (r, shape) }
    """
    _, scores = scores_of(Model.from_proto(with_weights(text, s=0.1)))
    assert scores.tensor.name == "y"
