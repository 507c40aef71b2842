"""Losses of the user's own, and what is wrong with them."""

import numpy as np
import pytest

from onnxslim_passes.errors import UnknownNameError, UsageError
from tests.training.losses.test_values import LABELS, NUMBERS, Objective, X, measured, mlp

FILE = """
import onnx.parser
HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

def squared():
    return onnx.parser.parse_model(HEAD + '''
    loss (float[N, 3] y, float[N, 5] h, float[N, 3] labels) => (float error, float size) {
        d = Sub (y, labels)
        s = Mul (d, d)
        error = ReduceMean <keepdims = 0> (s)
        a = Abs (h)
        size = ReduceMean <keepdims = 0> (a)
    }''')

def stranger():
    return onnx.parser.parse_model(HEAD + '''
    loss (float[N, 3] hh) => (float error) { error = ReduceMean <keepdims = 0> (hh) }''')

def rows():
    return onnx.parser.parse_model(HEAD + '''
    loss (float[N, 3] y) => (float[N, 3] error) { error = Mul (y, y) }''')

def nothing():
    return None
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(FILE)
    return lambda name: f"{path}:{name}"


def test_a_model_is_a_loss(spec):
    value, metric, gradient = measured(mlp(), Objective(loss=spec("squared")), NUMBERS)
    same, _, expected = measured(mlp(), Objective(loss="mse"), NUMBERS)
    weights = {c.name: c.values for c in mlp().constants()}
    assert value == pytest.approx(same, rel=1e-6)
    assert metric == pytest.approx(np.abs(X @ weights["w1"] + weights["b1"]).mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("stranger", UnknownNameError, "'hh'. Did you mean 'h'"),
        ("rows", UsageError, r"output 'error' has shape \('N', 3\); expected a single float"),
        ("nothing", UsageError, "returned NoneType, expected an onnx.ModelProto"),
        ("squarred", UsageError, "has no function 'squarred'. Did you mean 'squared'"),
    ],
)
def test_what_is_no_loss_is_refused(spec, name, error, message):
    with pytest.raises(error, match=message):
        measured(mlp(), Objective(loss=spec(name)), LABELS)
