"""Functions, bodies and whole models put in line with the nodes of a graph."""

from collections.abc import Mapping

from onnx import TensorProto, inliner

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model.exporting import held
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.model import SMALL_BYTES, Model
from onnxslim_passes.model.payload import Payload, TensorPayload


def inline_functions(model: Model) -> Model:
    """A model in which every call of a model-local function is replaced by the function's nodes.

    It shares the payloads of the weights. Functions of another opset are converted.

    Raises:
        UnsupportedModelError: ONNX cannot convert a function.
    """
    table: dict[str, Payload] = {}

    def write(constant: Constant) -> TensorProto:
        inside = constant.owner is not None and constant.owner.is_function
        if inside or constant.nbytes <= SMALL_BYTES:
            return held(constant)
        table[constant.name] = constant.payload
        return TensorProto(name=constant.name, dims=constant.shape, data_type=constant.elem_type)

    def read(tensor: TensorProto) -> Payload:
        known = table.get(tensor.name)
        return known if known is not None else TensorPayload(tensor)

    outline = model.export(write)
    try:
        flat = inliner.inline_local_functions(outline, convert_version=True)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"ONNX cannot inline the model's functions: {error}") from error
    return Model(flat, read, model.path)


def inline_body(model: Model, node: Node, body: Graph) -> None:
    """Replaces a node by what one of its bodies computes; the body must not take inputs.

    Args:
        model: the model that holds the node.
        node: an If, whose outputs are those of each body.
        body: the body that is always chosen.
    """
    made = list(node.outputs)
    results = list(body.outputs)
    body.outputs = []
    _move(body, node.graph)
    for old, new in zip(made, results, strict=True):
        model.replace_uses(old, new)
    node.attrs = {key: value for key, value in node.attrs.items() if value is not body}
    node.graph.remove_node(node)


def graft(
    graph: Graph, other: Model, bindings: Mapping[str, Variable | Constant], prefix: str
) -> dict[str, Variable | Constant]:
    """Moves another model's main graph into `graph`; `other` is used up.

    Args:
        graph: where to.
        other: a model of the same opsets, without functions.
        bindings: for each input of `other`, by name, the tensor that takes its place.
        prefix: put before the names of all its tensors and nodes.

    Returns:
        The tensors that were its outputs, by the names they had.

    Raises:
        UnsupportedModelError: it has functions, or an input without binding.
    """
    if other.functions:
        raise UnsupportedModelError("A model with functions cannot be grafted; inline them first.")
    missing = [tensor.name for tensor in other.graph.inputs if tensor.name not in bindings]
    if missing:
        raise UnsupportedModelError(f"Nothing is bound to input {missing[0]!r}.")
    outputs = [tensor.name for tensor in other.graph.outputs]
    for tensor in list(other.graph.inputs):
        other.replace_uses(tensor, bindings[tensor.name])
    results = list(other.graph.outputs)
    _rename(other, graph, prefix)
    _move(other.graph, graph)
    return dict(zip(outputs, results, strict=True))


def _rename(other: Model, graph: Graph, prefix: str) -> None:
    for body in other.graphs():
        body.names = graph.names
        inner = [] if body is other.graph else list(body.inputs)
        made = [tensor for node in body.nodes for tensor in node.outputs if not tensor.is_empty()]
        infos = [body.output_infos.get(tensor.name) for tensor in body.outputs]
        for tensor in (*body.initializers, *inner, *made):
            tensor.name = graph.fresh_name(f"{prefix}{tensor.name}")
        body.output_infos = {
            tensor.name: info
            for tensor, info in zip(body.outputs, infos, strict=True)
            if info is not None
        }
        body.foreign_infos = []
        for node in body.nodes:
            node.name = graph.fresh_node_name(f"{prefix}{node.name or node.op}")


def _move(source: Graph, target: Graph) -> None:
    for constant in source.initializers:
        constant.owner = target
    target.initializers.extend(source.initializers)
    for node in source.nodes:
        node.graph = target
        for _, body in node.bodies():
            body.parent = target
    target.nodes.extend(source.nodes)
    source.initializers = []
    source.nodes = []
