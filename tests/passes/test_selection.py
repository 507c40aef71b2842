"""Which weights options choose, and names that do not exist."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.model import Model
from onnxslim_passes.passes.selection import Selection


def two_layers() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 2] y) {
            h = MatMul(x, "fc1.weight")  r = Relu(h)  y = Gemm(r, "fc2.weight[0]", "fc2.bias")
        }""".replace('"fc1.weight"', "w1")
        .replace('"fc2.weight[0]"', "w2")
        .replace('"fc2.bias"', "b2")
    )
    first, _, second = proto.graph.node
    first.name, second.name = "/fc1/MatMul", "/fc2/Gemm"
    first.input[1], second.input[1], second.input[2] = "fc1.weight", "fc2.weight[0]", "fc2.bias"
    for name, shape in (("fc1.weight", (4, 8)), ("fc2.weight[0]", (8, 2)), ("fc2.bias", (2,))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    return Model.from_proto(proto)


def chosen(selection: Selection, model: Model) -> list[str]:
    selection.check(model)
    return [weight.name for weight in model.weights() if selection.verdict(weight) is None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["fc1.weight", "fc2.weight[0]", "fc2.bias"]),
        ({"include": ("fc1*",)}, ["fc1.weight"]),
        ({"include": ("/fc2/Gemm",)}, ["fc2.weight[0]", "fc2.bias"]),
        ({"include": ("/fc?/*",), "exclude": ("*.bias",)}, ["fc1.weight", "fc2.weight[0]"]),
        ({"include": ("fc2.weight[0]",)}, ["fc2.weight[0]"]),
        ({"op_types": ("MatMul",)}, ["fc1.weight"]),
        ({"min_elements": 16}, ["fc1.weight", "fc2.weight[0]"]),
        ({"exclude": ("*",)}, []),
    ],
)
def test_patterns_name_weights_or_their_nodes(
    options: dict[str, object], expected: list[str]
) -> None:
    assert chosen(Selection(**options), two_layers()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("fc3.weight",)}, "`include`: 'fc3.weight'. Did you mean 'fc1.weight'?"),
        ({"exclude": ("/fc2/Gem",)}, "`exclude`: '/fc2/Gem'. Did you mean '/fc2/Gemm'?"),
        ({"include": ("fc1*", "conv*")}, "`include`: 'conv*'"),
        ({"op_types": ("Matmul",)}, "`op_types`: 'Matmul'. Did you mean 'MatMul'?"),
        ({"op_types": ("Conv",)}, "`op_types`: 'Conv'. Known: Gemm, MatMul, Relu."),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        Selection(**options).check(two_layers())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude": ("fc1*",)}, "excluded by 'fc1*'"),
        ({"include": ("fc2*",)}, "not matched by include"),
        ({"op_types": ("Gemm",)}, "taken by MatMul; op_types is Gemm"),
        ({"min_elements": 33}, "has fewer elements than min_elements=33"),
    ],
)
def test_a_verdict_says_why(options: dict[str, object], reason: str) -> None:
    verdict = Selection(**options).verdict(two_layers().weights()[0])
    assert verdict is not None
    assert (verdict.where, verdict.taken, verdict.reason) == ("fc1.weight", False, reason)


def test_a_path_names_one_body(if_model: onnx.ModelProto) -> None:
    model = Model.from_proto(if_model)
    paths = [weight.where for weight in model.weights() if weight.name != "outer"]
    assert len(paths) == len(set(paths)) == 2
    for path in paths:
        selection = Selection(include=(path,))
        selection.check(model)
        matched = [w.where for w in model.weights() if selection.verdict(w) is None]
        assert matched == [path]
