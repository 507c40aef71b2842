"""Fixtures shared by all tests."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

# The same examples at every run, and no verdict by the clock of a busy machine.
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")

SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of large real models that lies beside a developer's checkout, if it is there."""
    if not (SHARED_MODELS / "tasks.py").is_file():
        pytest.skip("the folder of real models is not beside this checkout")
    return SHARED_MODELS


@pytest.fixture
def if_model() -> onnx.ModelProto:
    """An If whose branches own initializers of one name; one of them captures an outer weight."""

    def matrix(name: str, value: float) -> onnx.TensorProto:
        return numpy_helper.from_array(np.full((2, 2), value, np.float32), name)

    def branch(label: str, nodes: list[onnx.NodeProto], value: float) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{label}_y", TensorProto.FLOAT, [2, 2])
        return helper.make_graph(nodes, label, [], [made], [matrix("inner", value)])

    then = [helper.make_node("MatMul", ["x", "inner"], ["then_y"], name="then_mm")]
    otherwise = [
        helper.make_node("MatMul", ["x", "inner"], ["m"], name="else_mm"),
        helper.make_node("Add", ["m", "outer"], ["else_y"], name="else_sum"),
    ]
    choose = helper.make_node(
        "If",
        ["flag"],
        ["y"],
        name="choose",
        then_branch=branch("then", then, 2.0),
        else_branch=branch("else", otherwise, 3.0),
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([choose], "g", inputs, [output], [matrix("outer", 5.0)])
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
