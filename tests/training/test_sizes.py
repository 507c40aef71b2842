"""Sizes that the data fixes."""

import numpy as np
import pytest

from onnxslim_passes.errors import UnknownNameError, UsageError
from onnxslim_passes.runtime import InputSpec
from onnxslim_passes.training.sizes import common_sizes, fix_sizes
from tests.training.nets import mlp

FLOAT = np.dtype(np.float32)


def specs(**shapes):
    return [InputSpec(name=name, dtype=FLOAT, shape=shape) for name, shape in shapes.items()]


def test_free_axes_of_one_size_are_found_and_the_first_stays_free():
    inputs = specs(x=("N", 3, None, None), state=(2, "N", "hidden"), rate=())
    feeds = [
        {"x": (1, 3, 48, 320), "state": (2, 1, 8), "rate": ()},
        {"x": (1, 3, 48, 100), "state": (2, 1, 8), "rate": ()},
    ]
    # The second axis of the state is the batch, by its symbol.
    assert common_sizes(inputs, feeds) == {"x": [None, 3, 48, None], "state": [None, None, 8]}


def test_axes_of_one_symbol_are_fixed_together_or_not_at_all():
    inputs = specs(a=("N", "T"), b=("N", "T"))
    assert common_sizes(inputs, [{"a": (1, 5), "b": (1, 6)}]) == {}
    found = common_sizes(inputs, [{"a": (1, 5), "b": (1, 5)}])
    assert found == {"a": [None, 5], "b": [None, 5]}


def test_sizes_are_declared_and_said():
    model = mlp()
    decisions = fix_sizes(model, {"x": [6, 4]})
    assert model.graph.inputs[0].shape == [6, 4]
    assert [decision.reason for decision in decisions] == ["axis 0 has size 6 in all of training"]
    assert mlp().graph.inputs[0].shape == ["N", 4]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"y": [1, 4]}, UnknownNameError, "Unknown input: 'y'"),
        ({"x": [1]}, UsageError, "has 2 axes, got sizes for 1"),
        ({"x": [None, 5]}, UsageError, "has size 4 along axis 1, got 5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, error, message):
    with pytest.raises(error, match=message):
        fix_sizes(mlp(), sizes)
