"""Operators replaced by the function bodies that the ONNX standard defines them with."""

import onnx
from onnx import defs, helper, inliner

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, Node
from onnxslim_passes.model.exporting import Exporter
from onnxslim_passes.model.inlining import graft
from onnxslim_passes.training.emitter import Emitter


def has_body(emit: Emitter, node: Node) -> bool:
    """Whether the operator of a node is defined by other operators in the model's opset."""
    if node.domain:
        return False
    try:
        schema = defs.get_schema(node.op, emit.model.opset, "")
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def expand(emit: Emitter, node: Node) -> None:
    """Puts the nodes that define an operator in the place of one use of it.

    Raises:
        UnsupportedModelError: the standard's body does not cover this use.
    """
    outline = _alone(emit, node)
    flat = inliner.inline_selected_functions(outline, [("", node.op)], inline_schema_functions=True)
    if any(made.op_type == node.op and made.name == node.name for made in flat.graph.node):
        raise UnsupportedModelError(
            f"Node {node.where!r}: ONNX has no definition of {node.op} for these inputs."
        )
    inputs = {tensor.name: tensor for tensor in node.inputs if not tensor.is_empty()}
    prefix = f"{node.name or node.op}/"
    made = graft(emit.graph, Model.from_proto(flat), inputs, prefix)
    outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
    for tensor in outputs:
        emit.model.replace_uses(tensor, made[tensor.name])
    emit.graph.remove_node(node)
    emit.learn()


def _alone(emit: Emitter, node: Node) -> onnx.ModelProto:
    """A model of this node only."""
    exporter = Exporter(emit.model.ir_version)
    names = dict.fromkeys(tensor.name for tensor in node.inputs if not tensor.is_empty())
    by_name = {tensor.name: tensor for tensor in node.inputs}
    graph = helper.make_graph(
        [exporter.node(node)],
        "operator",
        [
            helper.make_tensor_value_info(
                name, emit.elem_type(by_name[name]), list(emit.shape(by_name[name]))
            )
            for name in names
        ],
        [
            helper.make_tensor_value_info(tensor.name, emit.elem_type(tensor), None)
            for tensor in node.outputs
            if not tensor.is_empty()
        ],
    )
    opset = helper.make_opsetid("", emit.model.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=emit.model.ir_version)
