"""A body as a model of its own, and back."""

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, check_model, load
from onnxslim_passes.model.bodies import bodies, body_model, captured, holder, put_back
from onnxslim_passes.runtime import open_session

NESTED = """<ir_version: 8, opset_import: ["": 18]>
g (float[N, 2] x, bool flag) => (float[N, 2] y) <float[2] outer = {1.0, 2.0}> {
  h = Neg(x)
  y = If (flag) <
    then_branch = g1 () => (float[N, 2] a) {
      s = Add(h, outer)
      a = If (flag) <
        then_branch = g2 () => (float[N, 2] b) { b = Mul(s, outer) },
        else_branch = g3 () => (float[N, 2] c) { c = Identity(x) }
      >
    },
    else_branch = g4 () => (float[N, 2] d) { d = Relu(h) }
  >
}"""


def nested() -> Model:
    return load(onnx.parser.parse_model(NESTED))


def run(model: Model, **feed: object) -> list[np.ndarray]:
    with open_session(model) as session:
        return list(session.run(feed).values())


X = np.array([[1, -2], [3, 4]], np.float32)


def test_outer_bodies_come_first_and_say_what_they_capture() -> None:
    found = bodies(nested())
    assert [body.name for body in found] == ["g1", "g4", "g2", "g3"]
    names = [{tensor.name for tensor in captured(body)} for body in found]
    assert names == [{"h", "outer", "flag", "x"}, {"h"}, {"s", "outer"}, {"x"}]


def test_the_copy_of_a_body_runs_alone() -> None:
    model = nested()
    outer, _, inner, _ = bodies(model)
    before = model.to_proto().SerializeToString(deterministic=True)
    (inside,) = run(body_model(model, inner), s=X)
    assert np.array_equal(inside, X * [1, 2])
    (around,) = run(body_model(model, outer), h=X, flag=np.array(False), x=-X)
    assert np.array_equal(around, -X)
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_edits_come_back() -> None:
    model = nested()
    for body in bodies(model)[::-1]:
        part = body_model(model, body)
        made = part.graph.outputs[0]
        doubled = part.graph.add_node("Add", [made, made])
        doubled.outputs[0].dtype, doubled.outputs[0].shape = made.dtype, made.shape
        part.graph.outputs = [doubled.outputs[0]]
        put_back(model, body, part)
    check_model(model)
    (then,) = run(model, x=X, flag=np.array(True))
    assert np.array_equal(then, 4 * (-X + [1, 2]) * [1, 2])
    (otherwise,) = run(model, x=X, flag=np.array(False))
    assert np.array_equal(otherwise, 2 * np.maximum(-X, 0))
    assert [constant.name for constant in model.constants()].count("outer") == 1
    assert all(holder(model, body)[0].graph is (body.parent or body) for body in bodies(model))


def test_a_body_put_back_as_it_was_changes_nothing() -> None:
    model = nested()
    before = model.to_proto().SerializeToString(deterministic=True)
    for body in bodies(model)[::-1]:
        put_back(model, body, body_model(model, body))
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_a_constant_that_only_an_edited_body_took_goes() -> None:
    model = nested()
    (_, _, inner, _) = bodies(model)
    outer = next(body for body in bodies(model) if body.name == "g1")
    part = body_model(model, inner)
    node = part.graph.nodes[0]
    node.inputs[1] = part.graph.add_constant("other", np.array([5, 5], np.float32))
    put_back(model, inner, part)
    assert {constant.where for constant in model.constants()} == {"outer", f"{inner.path}/other"}
    assert np.array_equal(run(model, x=X, flag=np.array(True))[0], 5 * (-X + [1, 2]))
    assert outer.path


def test_an_unknown_type_is_an_error() -> None:
    proto = onnx.parser.parse_model(
        NESTED.replace("h = Neg(x)", "h = custom.Op(x)").replace(
            '["": 18]', '["": 18, "custom": 1]'
        )
    )
    model = load(proto)
    with pytest.raises(UnsupportedModelError, match="element type of 'h' is not known"):
        body_model(model, bodies(model)[0])
