"""`inline-functions`: calls of the model's own functions become the nodes of the functions.

Exporters write layers as functions that are called again and again. The runtime puts them in line
when it loads the file; a pass that comes before sees one body for all calls, so that tensors of
different calls cannot get ranges, scales or densities of their own.
"""

from collections import Counter
from typing import ClassVar

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Graph, Model
from onnxslim_passes.model.inlining import inline_functions
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.storage.base import FUNCTION_DOMAIN

__all__ = ["InlineFunctions"]


@pass_options
class InlineFunctions(Pass):
    """Puts the model's functions in line; weights inside a function are copied for each call."""

    name: ClassVar[str] = "inline-functions"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "calls of the model's own functions become their nodes"
    references: ClassVar[tuple[str, ...]] = ("ONNX IR specification, model-local functions",)
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Puts all functions in line, or none where ONNX cannot or where they decode weights."""
        functions = {function.path: function for function in model.functions}
        if not functions:
            return PassResult(changed=False)
        if any(_domain(function) == FUNCTION_DOMAIN for function in model.functions):
            return _left(functions, "the weights are stored: `unpack` makes them dense first")
        calls = Counter(
            function.path for node in model.nodes() if (function := model.called_function(node))
        )
        try:
            model.become(inline_functions(model))
        except UnsupportedModelError as error:
            return _left(functions, str(error))
        decisions = [
            Decision(
                where=path,
                taken=True,
                reason="put in line" if calls[path] else "removed: no node calls it",
                figures={"calls": calls[path], "nodes": len(function.nodes)},
            )
            for path, function in functions.items()
        ]
        return PassResult(changed=True, decisions=tuple(decisions))


def _domain(function: Graph) -> str:
    return "" if function.proto is None else str(function.proto.domain)


def _left(functions: dict[str, Graph], reason: str) -> PassResult:
    decisions = tuple(Decision(where=path, taken=False, reason=reason) for path in functions)
    return PassResult(changed=False, decisions=decisions)
