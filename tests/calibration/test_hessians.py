"""Gram matrices of layer inputs: against the plain definition, however they are cut."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.calibration.hessians import (
    Key,
    Layout,
    Patches,
    Vectors,
    collect_grams,
    gram_bytes,
    in_groups,
)
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Model

Array = npt.NDArray[Any]

CONV = Patches(
    channels=6,
    group=2,
    kernel=(3, 2),
    strides=(2, 1),
    dilations=(1, 2),
    pads=(1, 0, 0, 1),
)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model() -> Model:
    """Two tensors of the main graph, x and h."""
    text = """<ir_version: 9, opset_import: ["": 17]>
        g (float[N,6,H,W] x) => (float[N,6,H,W] y) { h = Relu(x)  y = Neg(h) }"""
    return Model.from_proto(onnx.parser.parse_model(text))


def grams(*feeds: Array, layouts: dict[str, Layout]) -> dict[str, Any]:
    samples = Samples.from_feeds([{"x": feed} for feed in feeds])
    found = collect_grams(model(), layouts.items(), samples)
    return {name: gram for (name, _), gram in found.items()}


def by_definition(values: Array) -> Array:
    """H of CONV, patch by patch."""
    padded = np.pad(values, ((0, 0), (0, 0), (1, 0), (0, 1))).astype(np.float64)
    total = np.zeros((2, 18, 18))
    for image in padded:
        for top in range(0, image.shape[1] - 2, 2):
            for left in range(image.shape[2] - 2):
                patch = image[:, top : top + 3, left : left + 3 : 2]
                for group in range(2):
                    column = patch[3 * group : 3 * group + 3].reshape(-1)
                    total[group] += np.outer(column, column)
    return total


@pytest.mark.parametrize("piece", [1, 400, 2000, 1 << 21])
def test_patches_in_pieces_of_any_size(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim_passes.calibration.hessians._PIECE", piece)
    values = noise(3, 6, 8, 7)
    gram = grams(values, layouts={"x": CONV})["x"]
    np.testing.assert_allclose(gram.matrix, by_definition(values), rtol=1e-12, atol=1e-12)
    assert gram.positions == 3 * 4 * 6  # every group has as many
    assert gram.matrix.nbytes == gram_bytes(CONV)


def test_inner_tensors_and_feeds_of_other_shapes() -> None:
    one, two = noise(2, 6, 8, 7), noise(1, 6, 5, 9, seed=1)
    gram = grams(one, two, layouts={"h": CONV})["h"]
    wanted = by_definition(np.maximum(one, 0)) + by_definition(np.maximum(two, 0))
    np.testing.assert_allclose(gram.matrix, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, -2])
def test_vectors_along_either_axis(axis: int) -> None:
    values = noise(2, 6, 5, 5)
    gram = grams(values, layouts={"x": Vectors(5, axis)})["x"]
    columns = np.moveaxis(values, axis, 0).reshape(5, -1).astype(np.float64)
    np.testing.assert_allclose(gram.matrix[0], columns @ columns.T, rtol=1e-12)
    assert gram.positions == 2 * 6 * 5


def test_a_window_larger_than_the_input_sees_nothing() -> None:
    gram = grams(noise(1, 6, 1, 1), layouts={"x": CONV})["x"]
    assert gram.positions == 0
    assert not gram.matrix.any()


def test_what_is_not_finite_shows() -> None:
    with pytest.raises(SamplesError, match="NaN or infinite"):
        grams(np.full((1, 6, 8, 7), np.inf, np.float32), layouts={"x": CONV})
    huge = np.full((1, 6, 8, 7), 3e38, np.float32)
    assert np.isfinite(grams(huge, layouts={"x": CONV})["x"].matrix).all()


def test_groups_keep_to_the_limit_and_the_order() -> None:
    keys: dict[str, list[Key]] = {
        "a": [("x", Vectors(7))],
        "b": [("x", Vectors(7))],  # costs nothing more
        "c": [("h", Vectors(7))],
        "d": [("h", CONV)],
    }
    samples = Samples.from_feeds([{"x": noise(1, 6, 8, 7)}])
    matrix, tensor = 8 * 49, 4 * 6 * 8 * 7
    for limit, groups in {
        1: [["a"], ["b"], ["c"], ["d"]],
        matrix + tensor: [["a", "b"], ["c"], ["d"]],
        2 * (matrix + tensor): [["a", "b", "c"], ["d"]],
        1 << 30: [["a", "b", "c", "d"]],
    }.items():
        assert in_groups(model(), keys, samples, limit) == groups
