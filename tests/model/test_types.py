"""Types of tensors, as far as ONNX infers them."""

import onnx.parser
import pytest

from onnxslim_passes.model import Model

# Paddle writes attention like this: the sizes of a Reshape are computed from the input's.
COMPUTED_SIZES = """
    s = Shape (x) n = Slice (s, zero, one) r = Concat <axis: int = 0> (n, rest)
    v = Reshape (x, r) y = Transpose <perm: ints = [0, 2, 1]> (v)"""


def network(opset: int) -> Model:
    constants = "int64[1] zero = {0}, int64[1] one = {1}, int64[2] rest = {-1, 12}"
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[N, 4, 6] x) => (float[A, B, C] y) <{constants}> {{ {COMPUTED_SIZES} }}"""
    return Model.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("opset", [12, 13, 17])
def test_computed_sizes_have_a_rank_in_every_opset(opset: int) -> None:
    model = network(opset)
    types = model.types()
    made = {str(tensor.name): tensor for node in model.graph.nodes for tensor in node.outputs}
    known = types.of(made["v"])
    assert known is not None
    assert known.rank == 3
    assert known.shape is not None
    assert known.shape[2] == 12
    assert model.opset == opset
