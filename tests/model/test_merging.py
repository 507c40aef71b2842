"""One model inside another."""

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.model.merging import merge
from onnxslim_passes.runtime import open_session

HOST = '<ir_version: 9, opset_import: ["" : 18]> g (float[N, 2] x) => (float[N, 2] y) '


def model(body):
    return Model.from_proto(parser.parse_model(f"{HOST}{{ {body} }}"))


def test_both_run_side_by_side():
    host, guest = model("y = Neg (x)"), model("t = Exp (x) y = Add (t, x)")
    found = merge(host, guest, prefix="guest/", inputs={"x": host.graph.inputs[0]})
    assert found["y"].name == "guest/y"
    assert found["x"] is host.graph.inputs[0]
    host.graph.outputs.append(found["y"])
    x = np.float32([[1, 2]])
    with open_session(host) as session:
        both = session.run({"x": x})
    np.testing.assert_allclose(both["y"], -x)
    np.testing.assert_allclose(both["guest/y"], np.exp(x) + x, rtol=1e-6)


def test_branches_and_their_weights_come_along(if_model: onnx.ModelProto):
    host, guest = Model.from_proto(if_model), Model.from_proto(if_model)
    inputs = {tensor.name: tensor for tensor in host.graph.inputs}
    found = merge(host, guest, prefix="guest/", inputs=inputs)
    host.graph.outputs.append(found["y"])
    check_model(host)
    with open_session(host) as session:
        for flag in (True, False):
            both = session.run({"x": np.float32([[1, 2], [3, 4]]), "flag": np.array(flag)})
            np.testing.assert_array_equal(both["y"], both["guest/y"])


def test_other_opsets_are_refused():
    guest = model("y = Neg (x)")
    guest.at_least_opset(20)
    host = model("y = Neg (x)")
    with pytest.raises(UnsupportedModelError, match="opset 20"):
        merge(host, guest, prefix="guest/", inputs={"x": host.graph.inputs[0]})
