"""Mean squares of inputs, along the axes of the weights that they meet."""

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import NoProgress
from onnxslim_passes.passes.input_moments import input_importance

Array = npt.NDArray[np.float32]


def importance(text: str, feed: Array, *shape: int) -> Array | None:
    """Of a weight of ones of this shape in a graph ``y = ...`` of x."""
    dims = ", ".join(map(str, feed.shape))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{dims}] x) => (float[] y) {{ {text} }}"""
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), "w"))
    model = Model.from_proto(proto)
    weights = model.weights()
    found = input_importance(model, weights, Samples.from_feeds([{"x": feed}] * 3), NoProgress())
    return found.get(weights[0].constant)


def along(shape: tuple[int, ...], axis: int) -> Array:
    """Channels of sizes 1, 2, 3..."""
    aligned = [1] * len(shape)
    aligned[axis] = shape[axis]
    sizes = np.arange(1, shape[axis] + 1, dtype=np.float32).reshape(aligned)
    return np.broadcast_to(sizes, shape).copy()


@pytest.mark.parametrize(
    ("text", "x", "axis", "shape", "own"),
    [
        ("y = MatMul(x, w)", (4, 3), 1, (3, 5), 0),
        ("y = MatMul(x, w)", (2, 4, 3), 2, (3, 5), 0),
        ("y = MatMul(w, x)", (3, 4), 0, (5, 3), 1),
        ("y = Gemm(x, w)", (4, 3), 1, (3, 5), 0),
        ("y = Gemm<transB = 1>(x, w)", (4, 3), 1, (5, 3), 1),
        ("y = Gemm<transA = 1>(x, w)", (3, 4), 0, (3, 5), 0),
        ("y = Gemm<transA = 1>(w, x)", (3, 4), 0, (3, 5), 0),
        ("y = Gemm<transB = 1>(w, x)", (4, 3), 1, (5, 3), 1),
        ("y = Conv(x, w)", (1, 3, 6, 6), 1, (5, 3, 2, 2), 1),
        ("y = ConvTranspose(x, w)", (1, 3, 6, 6), 1, (3, 5, 2, 2), 0),
    ],
)
def test_moments_stand_along_the_axis_that_is_summed(text, x, axis, shape, own) -> None:
    found = importance(text, along(x, axis), *shape)
    assert found is not None
    assert found.shape[own] == 3
    assert found.size == 3
    relative = found.reshape(-1) - 0.01
    np.testing.assert_allclose(relative / relative[0], [1, 4, 9], rtol=1e-4)


def test_groups_of_channels_meet_their_own_filters() -> None:
    found = importance("y = Conv<group = 2>(x, w)", along((1, 4, 6, 6), 1), 6, 2, 1, 1)
    assert found is not None
    assert found.shape == (6, 2, 1, 1)
    rows = found[:, :, 0, 0] - 0.01
    np.testing.assert_allclose(rows[0] / rows[0, 0], [1, 4], rtol=1e-4)
    np.testing.assert_allclose(rows[5] / rows[0, 0], [9, 16], rtol=1e-4)


def test_uses_add_up() -> None:
    feed = along((4, 3), 1)
    text = "h = MatMul(x, w)  t = Mul(x, x)  k = MatMul(t, w)  y = Add(h, k)"
    found = importance(text, feed, 3, 5)
    assert found is not None
    relative = found.reshape(-1) - 0.01
    np.testing.assert_allclose(relative / relative[0], [1, 10, 45], rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)",
        "h = MatMul(x, w)  k = Mul(x, w)  y = MatMul(h, k)",
        "y = Mul(x, w)",
    ],
)
def test_other_uses_have_none(text: str) -> None:
    assert importance(text, along((3, 3), 1), 3, 3) is None


def test_dead_and_infinite_inputs_have_none() -> None:
    assert importance("y = MatMul(x, w)", np.zeros((4, 3), np.float32), 3, 5) is None
    huge = np.full((4, 3), 3e38, np.float32)
    assert importance("y = MatMul(x, w)", huge, 3, 5) is None
