"""Rules against finite differences on the smallest graphs; the sweep over ONNX's cases is apart."""

import numpy as np
import pytest
from onnx import parser

from tests.training.gradients.checking import compare

CASES = {
    "broadcast": "(float[2, 3] a, float[3] b) => (float[2, 3] y) { y = Add(a, b) }",
    "sub": "(float[2, 1] a, float[3] b) => (float[2, 3] y) { y = Sub(a, b) }",
    "mul": "(float[2, 3] a, float[2, 1] b) => (float[2, 3] y) { y = Mul(a, b) }",
    "div": "(float[2, 3] a, float[1, 3] b) => (float[2, 3] y) { y = Div(a, b) }",
    "gemm": "(float[4, 2] a, float[3, 4] b, float[3] c) => (float[2, 3] y)"
    " { y = Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>(a, b, c) }",
    "matmul": "(float[2, 1, 3, 4] a, float[5, 4, 2] b) => (float[2, 5, 3, 2] y)"
    " { y = MatMul(a, b) }",
    "rows": "(float[2, 5, 3] a, float[3, 4] b) => (float[2, 5, 4] y) { y = MatMul(a, b) }",
    "vectors": "(float[3] a, float[3] b) => (float y) { y = MatMul(a, b) }",
    "row": "(float[3] a, float[2, 3, 4] b) => (float[2, 4] y) { y = MatMul(a, b) }",
    "column": "(float[2, 3, 4] a, float[4] b) => (float[2, 3] y) { y = MatMul(a, b) }",
    "softmax": "(float[2, 3, 4] a) => (float[2, 3, 4] y) { y = Softmax<axis = 1>(a) }",
    "log-softmax": "(float[2, 5] a) => (float[2, 5] y) { y = LogSoftmax(a) }",
    "mean": "(float[2, 3, 4] a) => (float[2, 4] y) <int64[1] axes = {1}>"
    " { y = ReduceMean<keepdims = 0>(a, axes) }",
    "chain": "(float[2, 3] a) => (float[6] y) <int64[1] s = {-1}>"
    " { t = Tanh(a) u = Transpose(t) v = Exp(u) y = Reshape(v, s) }",
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES.keys())
def test_gradient_is_the_finite_difference(text: str) -> None:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> g {text}')
    generator = np.random.default_rng(0)
    feed = {
        info.name: generator.uniform(
            0.5, 1.5, [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in proto.graph.input
    }
    found = compare(proto, feed)
    assert found.dtype == np.float64
    assert found.holds, found
