"""The smallest networks that show the thing, with data that they can learn."""

import numpy as np
import onnx
from onnx import numpy_helper, parser

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model

MLP = """
<ir_version: 9, opset_import: ["" : 18], producer_name: "test">
net (float[N, 4] x) => (float[N, 3] y)
<float[4, 5] w1, float[5] b1, float[5, 3] w2, float[3] b2>
{
    [first] h = Gemm (x, w1, b1)
    [relu] a = Relu (h)
    [second] y = Gemm (a, w2, b2)
}
"""
ENDING = {
    "softmax": MLP.replace("] y = Gemm", "] z = Gemm").replace(
        "b2)\n}", "b2)\n    y = Softmax <axis = 1> (z)\n}"
    ),
    "sigmoid": MLP.replace("] y = Gemm", "] z = Gemm").replace(
        "b2)\n}", "b2)\n    y = Sigmoid (z)\n}"
    ),
    "dropout": MLP.replace("Gemm (a, w2", "Gemm (d, w2").replace(
        "    [second]", "    d = Dropout (a, ratio)\n    [second]"
    ),
}


def with_weights(text, seed=0, **values):
    """A model from ONNX text whose declared tensors have the values given, or random ones."""
    proto = parser.parse_model(text)
    random = np.random.default_rng(seed)
    for declared in list(proto.graph.value_info):
        tensor_type = declared.type.tensor_type
        shape = [dim.dim_value for dim in tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type)
        array = values.get(declared.name, random.standard_normal(shape))
        proto.graph.initializer.append(
            numpy_helper.from_array(np.asarray(array, dtype), declared.name)
        )
    del proto.graph.value_info[:]
    return proto


def mlp(text=MLP, seed=0, **values):
    """Four numbers in, three out, two layers."""
    return Model.from_proto(with_weights(text, seed, **values))


def points(count=60, seed=1):
    """Inputs of `mlp`, and which of three it should say: a rule that can be learned."""
    x = np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)
    labels = np.argmax(x[:, :3] + 0.3 * x[:, 3:], axis=1)
    return x, labels


def samples(count=60, *, labelled=True, seed=1):
    """`points` as samples."""
    x, labels = points(count, seed)
    feed = {"x": x, "labels": labels} if labelled else {"x": x}
    return Samples.from_feeds([feed], name="points")
