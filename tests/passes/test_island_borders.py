"""What is said of conversions that the runtime still executes."""

import onnx
from onnx import helper

from onnxslim_passes.passes.placement.islands import border_decisions


def optimized(first: int, second: int, third: int) -> onnx.GraphProto:
    """A graph as ONNX Runtime writes it, with its numbers in the names that it made up."""
    nodes = [
        helper.make_node("ReorderOutput", ["x"], ["r"], name=f"ReorderOutput_token_{first}"),
        helper.make_node("QuantizeLinear", ["r", "s"], ["q"], name="q"),
        helper.make_node("Transpose", ["q"], ["y"], name=f"Transpose_token_{second}"),
        helper.make_node("Reshape", ["q", "n"], ["z"], name=f"Reshape_token_{third}"),
    ]
    return helper.make_graph(nodes if second < third else [*nodes[:2], *nodes[:1:-1]], "g", [], [])


def test_the_same_is_said_whatever_numbers_the_runtime_gives() -> None:
    assert border_decisions(optimized(1, 2, 3)) == border_decisions(optimized(7, 9, 8))
    (decision,) = border_decisions(optimized(1, 2, 3))
    assert "'ReorderOutput' to Reshape 'Reshape', Transpose 'Transpose'" in decision.reason
