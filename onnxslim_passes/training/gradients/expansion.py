"""Operators replaced by the function bodies that the ONNX standard defines them with."""

import onnx
from onnx import FunctionProto, TypeProto, defs, helper

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, Node
from onnxslim_passes.model.exporting import Exporter
from onnxslim_passes.model.inlining import graft, inline_functions
from onnxslim_passes.training.branches import choose_branches
from onnxslim_passes.training.emitter import Emitter, Tensor

_DOMAIN = "onnxslim_passes.bodies"


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
    flat = inline_functions(Model.from_proto(_call(emit, node)))
    inputs = {tensor.name: tensor for tensor in node.inputs if not tensor.is_empty()}
    made = graft(emit.graph, flat, inputs, f"{node.name or node.op}/")
    outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
    names = [tensor.name for tensor in outputs]
    for tensor, name in zip(outputs, names, strict=True):
        emit.model.replace_uses(tensor, made[name])
    emit.graph.remove_node(node)
    choose_branches(emit.model)
    emit.learn()


def _call(emit: Emitter, node: Node) -> onnx.ModelProto:
    """A model of this node only, as the call of a function with the body of the operator."""
    message = Exporter(emit.model.ir_version).node(node)
    _state_defaults(message, emit.model.opset)
    function = _body(emit, node, message)
    message.domain = _DOMAIN
    by_name = {tensor.name: tensor for tensor in node.inputs if not tensor.is_empty()}
    graph = helper.make_graph(
        [message],
        "operator",
        [
            helper.make_tensor_value_info(name, emit.elem_type(tensor), list(emit.shape(tensor)))
            for name, tensor in by_name.items()
        ],
        [
            helper.make_tensor_value_info(tensor.name, emit.elem_type(tensor), None)
            for tensor in node.outputs
            if not tensor.is_empty()
        ],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", emit.model.opset), helper.make_opsetid(_DOMAIN, 1)],
        ir_version=emit.model.ir_version,
        functions=[function],
    )


def _state_defaults(message: onnx.NodeProto, opset: int) -> None:
    """Adds the attributes that were left out: a function has no defaults of its own."""
    given = {attribute.name for attribute in message.attribute}
    for name, attribute in defs.get_schema(message.op_type, opset, "").attributes.items():
        if name not in given and attribute.default_value.name:
            message.attribute.append(attribute.default_value)


def _body(emit: Emitter, node: Node, message: onnx.NodeProto) -> FunctionProto:
    schema = defs.get_schema(node.op, emit.model.opset, "")
    function = FunctionProto()
    if schema.has_context_dependent_function:
        types = [_type(emit, tensor).SerializeToString() for tensor in node.inputs]
        opset = max(
            version
            for version in schema.context_dependent_function_opset_versions
            if version <= emit.model.opset
        )
        try:
            body = schema.get_context_dependent_function_with_opset_version(
                opset, message.SerializeToString(), types
            )
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"Node {node.where!r}: ONNX has no definition of {node.op} for these inputs."
            ) from error
        function.ParseFromString(body)
    else:
        function.CopyFrom(schema.function_body)
    function.domain, function.name, function.overload = _DOMAIN, node.op, ""
    return function


def _type(emit: Emitter, tensor: Tensor) -> TypeProto:
    if tensor.is_empty():
        return TypeProto()
    made: TypeProto = helper.make_tensor_type_proto(
        emit.elem_type(tensor), list(emit.shape(tensor))
    )
    return made
