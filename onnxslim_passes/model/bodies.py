"""A body as a model of its own: for whatever runs or edits main graphs only.

What the body captures from outside becomes inputs, or initializers where it is constant. Edits come
back with `put_back`; tensors keep their names throughout.
"""

from collections.abc import Iterator, Mapping

from onnx import helper

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.model import Model
from onnxslim_passes.model.types import Types

Tensor = Variable | Constant

_NAME = "body"


def bodies(model: Model) -> list[Graph]:
    """The bodies of control-flow nodes, outer ones before inner; those of functions left out."""
    found: list[Graph] = []
    pending = [model.graph]
    while pending:
        inner = [body for node in pending.pop(0).nodes for _, body in node.bodies()]
        found += inner
        pending += inner
    return found


def function_graphs(model: Model) -> list[Graph]:
    """The functions of a model and the bodies within them."""
    return [graph for function in model.functions for graph in _graphs(function)]


def holder(model: Model, body: Graph) -> tuple[Node, str]:
    """The node that a body hangs on, and the attribute; "branches[1]" in a list of bodies."""
    for node in model.nodes():
        for key, candidate in node.bodies():
            if candidate is body:
                return node, key
    raise ValueError(f"{body.path or body.name!r} is no body in this model")


def twin(other: Model, model: Model, body: Graph) -> Graph:
    """The body of a copy or conversion of a model that stands where `body` stands in `model`."""
    # Paths are kept by copies, whatever was edited; where nodes have one name, order tells.
    place = [found for found in bodies(model) if found.path == body.path].index(body)
    return [found for found in bodies(other) if found.path == body.path][place]


def captured(body: Graph) -> list[Tensor]:
    """The tensors of outer graphs that a body or one within it takes, each once."""
    inside = {tensor for graph in _graphs(body) for tensor in _own(graph)}
    taken = {
        tensor: None
        for graph in _graphs(body)
        for tensor in (*(t for node in graph.nodes for t in node.inputs), *graph.outputs)
    }
    return [tensor for tensor in taken if tensor not in inside and not tensor.is_empty()]


def body_model(model: Model, body: Graph) -> Model:
    """A copy of a body as a model.

    Args:
        model: stays as it is.
        body: of `model`, not of a function.

    Returns:
        Its inputs are the body's own, then the captured variables.

    Raises:
        UnsupportedModelError: the element type of an input or of a captured variable is not known.
    """
    copy = model.copy()
    types, graph = copy.types(), twin(copy, model, body)
    replaced: dict[Tensor, Tensor] = {}
    for tensor in captured(graph):
        if isinstance(tensor, Constant):
            replaced[tensor] = Constant(tensor.name, tensor.payload, graph)
            graph.initializers.append(replaced[tensor])
        else:
            replaced[tensor] = Variable(tensor.name, tensor.info)
            graph.inputs.append(replaced[tensor])
            _declare(replaced[tensor], tensor, types, body)
    for tensor in graph.inputs[: len(body.inputs)]:
        _declare(tensor, tensor, types, body)
    _replace(graph, replaced)
    graph.declared_inputs = list(graph.inputs)
    graph.name, graph.parent = graph.name or _NAME, None
    copy.graph = graph
    return copy


def put_back(model: Model, body: Graph, edited: Model) -> None:
    """Gives a body the contents that its copy has now.

    Args:
        model: is edited.
        body: of `model`, as it was when the copy was taken.
        edited: what `body_model` returned, with other nodes and initializers; used up.
    """
    outer: dict[str, Tensor] = {str(tensor.name): tensor for tensor in captured(body)}
    graph = edited.graph
    own, entering = graph.inputs[: len(body.inputs)], graph.inputs[len(body.inputs) :]
    replaced: dict[Tensor, Tensor] = {tensor: outer[tensor.name] for tensor in entering}
    for constant in graph.initializers:
        original = outer.get(constant.name)
        if isinstance(original, Constant) and original.payload is constant.payload:
            replaced[constant] = original
    _replace(graph, replaced)
    for node in list(body.nodes):
        body.remove_node(node)
    body.inputs, body.declared_inputs = own, list(own)
    body.nodes, body.outputs = graph.nodes, graph.outputs
    body.initializers = [constant for constant in graph.initializers if constant not in replaced]
    for constant in body.initializers:
        constant.owner = body
    model.graph.names |= graph.names
    for node in body.nodes:
        node.graph = body
        for _, inner in node.bodies():
            inner.parent = body
    for inner in _graphs(body):
        inner.names = model.graph.names
    model.remove_unused()


def _graphs(body: Graph) -> Iterator[Graph]:
    """The body and those within it."""
    pending = [body]
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(inner for node in graph.nodes for _, inner in node.bodies())


def _own(graph: Graph) -> Iterator[Tensor]:
    """The tensors that a graph defines."""
    yield from graph.inputs
    yield from graph.initializers
    for node in graph.nodes:
        yield from node.outputs


def _declare(target: Variable, source: Tensor, types: Types, body: Graph) -> None:
    """Gives an input the type that the runtime must be told."""
    if target.info is not None and target.info.type.WhichOneof("value"):
        return
    known = types.of(source)
    if known is None or not known.elem_type:
        raise UnsupportedModelError(
            f"{body.path}: the element type of {source.name!r} is not known; declare it in the "
            "model (value_info) or infer shapes first."
        )
    target.info = helper.make_tensor_value_info(target.name, known.elem_type, known.shape)
    target.dtype, target.shape = known.dtype, None if known.shape is None else list(known.shape)


def _replace(body: Graph, replaced: Mapping[Tensor, Tensor]) -> None:
    """Exchanges tensors wherever a body or one within it takes them."""
    for graph in _graphs(body):
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs):
                if tensor in replaced:
                    node.inputs[index] = replaced[tensor]
        graph.outputs = [replaced.get(tensor, tensor) for tensor in graph.outputs]
