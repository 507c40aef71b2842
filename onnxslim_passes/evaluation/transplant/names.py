"""Names of tensors and functions in messages, bodies included."""

from collections.abc import Callable, Sequence

import onnx

Names = Callable[[str], str]


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        body
        for attribute in node.attribute
        for body in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
    ]


def _defined(graph: onnx.GraphProto) -> set[str]:
    names = {entry.name for entry in (*graph.input, *graph.initializer)}
    return names | {name for node in graph.node for name in node.output}


def free_names(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies take from outside."""
    names = {name for name in node.input if name}
    for body in _bodies(node):
        inner = {name for held in body.node for name in free_names(held)}
        names |= (inner | {entry.name for entry in body.output}) - _defined(body)
    return names


def renamed_node(node: onnx.NodeProto, names: Names, outputs: Sequence[str]) -> onnx.NodeProto:
    """A copy of a node that takes and makes tensors of other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = ""
    copy.input[:] = [names(name) if name else "" for name in node.input]
    copy.output[:] = outputs
    for body in _bodies(copy):
        _rename_outer(body, names, frozenset())
    return copy


def _rename_outer(graph: onnx.GraphProto, names: Names, inner: frozenset[str]) -> None:
    """Renames what a body takes from outside."""
    inner = inner | _defined(graph)
    for node in graph.node:
        node.input[:] = [name if not name or name in inner else names(name) for name in node.input]
        for body in _bodies(node):
            _rename_outer(body, names, inner)


def rename_functions(proto: onnx.ModelProto, suffix: str) -> None:
    """Gives model-local functions other names, so that those of two models do not meet."""
    if not suffix or not proto.functions:
        return
    local = {(function.domain, function.name) for function in proto.functions}
    for function in proto.functions:
        function.name += suffix
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            if (node.domain, node.op_type) in local:
                node.op_type += suffix
            pending.extend(body.node for body in _bodies(node))
