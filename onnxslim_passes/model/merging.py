"""One model inside another: a teacher beside its student, a loss behind an output."""

from collections.abc import Mapping

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model.importing import DEFAULT_DOMAINS
from onnxslim_passes.model.ir import Constant, Graph, Variable
from onnxslim_passes.model.model import Model

__all__ = ["merge"]


def merge(
    model: Model, other: Model, *, prefix: str, inputs: Mapping[str, Variable | Constant]
) -> dict[str, Variable | Constant]:
    """Moves the nodes and constants of another model's main graph into a model.

    Args:
        model: takes them; its inputs and outputs stay as they are.
        other: is empty afterwards; of the same opsets, without functions of its own.
        prefix: goes in front of all names that come in.
        inputs: a tensor of `model` for every input of `other`, by the input's name.

    Returns:
        Every tensor that came in, and those of `inputs`, by the name it had in `other`.

    Raises:
        UnsupportedModelError: the opsets differ, or `other` calls functions of its own.
    """
    if other.functions or model.opset != other.opset:
        raise UnsupportedModelError(
            f"A model of opset {other.opset} with {len(other.functions)} functions of its own "
            f"cannot be merged into one of opset {model.opset}; convert and inline it first."
        )
    target, source = model.graph, other.graph
    tensors: dict[str, Variable | Constant] = {}
    for tensor in list(source.inputs):
        replacement = inputs[str(tensor.name)]
        other.replace_uses(tensor, replacement, only=list(dict.fromkeys(tensor.outputs)))
        for graph in other.graphs():
            graph.outputs = [replacement if held is tensor else held for held in graph.outputs]
        tensors[str(tensor.name)] = replacement
    for graph in list(other.graphs()):
        tensors.update(_renamed(graph, target, prefix, is_main=graph is source))
    for node in list(source.nodes):
        node.graph = target
        for _, body in node.bodies():
            body.parent = target
    target.nodes.extend(source.nodes)
    for constant in source.initializers:
        constant.owner = target
    target.initializers.extend(source.initializers)
    for entry in other.proto.opset_import:
        if entry.domain not in model.opsets and entry.domain not in DEFAULT_DOMAINS:
            model.proto.opset_import.add(domain=entry.domain, version=entry.version)
    return tensors


def _renamed(
    graph: Graph, target: Graph, prefix: str, *, is_main: bool
) -> dict[str, Variable | Constant]:
    """Gives the tensors and nodes of a graph fresh names in `target`; tensors by old name."""
    made = [tensor for node in graph.nodes for tensor in node.outputs if not tensor.is_empty()]
    held: list[Variable | Constant] = [*made, *graph.initializers]
    if not is_main:
        held.extend(tensor for tensor in graph.inputs if tensor not in held)
    before = {str(tensor.name): tensor for tensor in held}
    for tensor in held:
        tensor.name = target.fresh_name(f"{prefix}{tensor.name}")
    for node in graph.nodes:
        node.name = target.fresh_node_name(f"{prefix}{node.name}")
    graph.names = target.names
    # Outputs are declared by name; those of the main graph become inner tensors.
    declared = graph.output_infos
    graph.output_infos = {}
    for name, info in declared.items():
        made_here = before.get(name)
        if isinstance(made_here, Variable) and is_main:
            made_here.info = made_here.info or info
        elif made_here is not None:
            graph.output_infos[str(made_here.name)] = info
    return before if is_main else {}
