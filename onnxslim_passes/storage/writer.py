"""Puts decoders into a graph, and takes them out again."""

from collections.abc import Iterator

from onnxslim_passes.model import Constant, Graph, Model, Node, Variable, short_names
from onnxslim_passes.storage.base import (
    FUNCTION_DOMAIN,
    Argument,
    Expression,
    Function,
    Literal,
    Payload,
    Step,
)

__all__ = ["Replacement", "Writer", "short_names"]

Tensor = Variable | Constant


def may_have_functions(model: Model) -> bool:
    """Whether decoders may bring functions along: from IR version 8, if their domain is free."""
    return model.ir_version >= 8 and FUNCTION_DOMAIN not in model.opsets


class Writer:
    """Writes the decoders of one graph; equal expressions without payload become one tensor.

    Args:
        model: the model.
        graph: the graph, body or function of it that holds the weights.
        names: candidates for names, shared by the writers of a model.
    """

    def __init__(self, model: Model, graph: Graph, names: Iterator[str]) -> None:
        self._model = model
        self._graph = graph
        self._names = names
        self._written: dict[Expression, Tensor] = {}

    def place(self, constant: Constant) -> int:
        """The index of a constant among the initializers of the graph."""
        return self._graph.initializers.index(constant)

    def store(self, constant: Constant, root: Step) -> Variable:
        """Replaces a constant of the graph by a decoder's output, which takes over its name."""
        rebuilt = Variable(constant.name)
        self._node(root, rebuilt)
        self._model.replace_uses(constant, rebuilt)
        self._graph.initializers.remove(constant)
        return rebuilt

    def restore(self, constant: Constant, rebuilt: Variable, place: int) -> None:
        """Puts a constant back at its place and removes what only its decoder used."""
        self._model.replace_uses(rebuilt, constant)
        self._graph.initializers.insert(place, constant)
        self._remove(rebuilt)

    def _emit(self, expression: Expression) -> Tensor:
        known = self._written.get(expression)
        if known is not None:
            return known
        tensor: Tensor
        if isinstance(expression, Step):
            name = self._graph.fresh_name(self._unused_name())
            tensor = Variable(name, expression.declaration(name))
            self._node(expression, tensor)
        else:
            assert not isinstance(expression, Argument | Function)  # no tensors of this graph
            tensor = self._constant(expression)
        self._written[expression] = tensor
        return tensor

    def _node(self, step: Step, output: Variable) -> None:
        inputs = [self._emit(operand) for operand in step.inputs]
        attrs = {
            name: list(value) if isinstance(value, tuple) else value for name, value in step.attrs
        }
        if step.function is not None:
            self._model.add_function(step.function.to_proto())
        node = self._graph.add_node(
            step.op, inputs, outputs=[output], attrs=attrs, domain=step.domain
        )
        node.name = ""  # a name is bytes, and this node is known by its output

    def _constant(self, leaf: Payload | Literal) -> Constant:
        values = leaf.make() if isinstance(leaf, Payload) else leaf.values()
        constant = self._graph.add_constant(self._unused_name(), values)
        if isinstance(leaf, Payload) and leaf.sparse:
            constant.sparse = True
        return constant

    def _unused_name(self) -> str:
        return next(name for name in self._names if name not in self._graph.names)

    def _remove(self, tensor: Tensor) -> None:
        gone = remove_unused_makers(self._model, self._graph, tensor)
        self._written = {e: made for e, made in self._written.items() if made not in gone}


def remove_unused_makers(model: Model, graph: Graph, tensor: Tensor) -> set[Tensor]:
    """Removes a tensor that nobody takes with its makers, as far up as nobody else takes theirs."""
    pending = [tensor]
    gone: set[Tensor] = set()
    while pending:
        unused = pending.pop()
        if unused.outputs or unused in gone:
            continue
        gone.add(unused)
        if isinstance(unused, Constant):
            graph.initializers.remove(unused)
            continue
        node: Node = unused.inputs[0]
        operands = list(dict.fromkeys(node.inputs))
        graph.remove_node(node)
        if node.domain == FUNCTION_DOMAIN:
            model.remove_unused_function(node.domain, node.op)
        pending.extend(operands)
    return gone


class Replacement:
    """A weight stored in another form, which can be undone.

    Args:
        constant: the weight, a constant of the writer's graph.
        root: its new form: a decoder, or a payload that says dense or sparse.
        writer: of its graph.
    """

    def __init__(self, constant: Constant, root: Expression, writer: Writer) -> None:
        self.constant = constant
        self._root = root
        self._writer = writer
        self._payload = constant.payload
        self._place = 0
        self._rebuilt: Variable | None = None

    def apply(self) -> None:
        """Stores the weight in its new form."""
        if isinstance(self._root, Step):
            self._place = self._writer.place(self.constant)
            self._rebuilt = self._writer.store(self.constant, self._root)
        else:
            self.constant.sparse = isinstance(self._root, Payload) and self._root.sparse

    def with_root(self, root: Expression) -> "Replacement":
        """Another form for the same weight; this one must be undone, or never applied."""
        return Replacement(self.constant, root, self._writer)

    def undo(self) -> None:
        """Puts it back as it was; exactly so if the latest replacement is undone first."""
        if self._rebuilt is None:
            self.constant.payload = self._payload
        else:
            self._writer.restore(self.constant, self._rebuilt, self._place)
            self._rebuilt = None
